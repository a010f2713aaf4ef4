"""The columns of a row: each is read, known to say nothing about training, or refused by its name.

What a column that is not read could hold is not guessed at: a rejection, a weight, a tool or an image that
goes unnoticed would teach the wrong thing.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches
from typing import Any

Row = Mapping[str, Any]

QUESTIONS = ("instruction", "query", "prompt")
"""Columns of a question as text; a `prompt` may be a list of messages too."""
ANSWERS = ("chosen", "completion", "output", "response", "answer", "chosen_response")
REJECTED = ("rejected", "rejected_response", "rejected_messages", "rejected_answer", "rejected_completion")
LABELS = ("label", "kto_tag", "desirable")
_TYPABLE = (
    *("messages", "conversations", "system", "input", "history", "audios", "weight", "rejected_audios"),
    *("chosen", "completion", "output", "response", *QUESTIONS, *REJECTED, *LABELS),
)
"""Columns for which a name that looks like theirs is taken for a slip of the pen."""
_MESSAGE_KEYS = ("role", "from", "content", "value", "loss", "loss_scale", "weight", "train")
_ABOUT_A_MESSAGE = re.compile(
    r"(name|(\w+_)?id|uuid|time\w*|date|index|idx|turn|speaker|lang\w*|model|source|meta\w*)$"
)
_STEERING = re.compile(
    r"(^|_)(un|non|dis|mis|in|up|down)?(reject|chosen|choice|prefer|winn|los[et]|better|worse|best|worst|good|bad|"
    r"positive|negative|label|kto|desir|thumb|like|vote|feedback|approv|accept|correct|wrong|scor|rating|rank|"
    r"reward|margin|weight|loss|mask|train|system|tool|function|history|image|video|message|conversation|"
    r"instruct|prompt|respon|completion|candidate|neg(_|$))"
)
"""Beginnings of words in names of columns that may say what to train on, or how."""
_ABOUT = ("id", "prompt_id", "axis", "agreement", "source")
"""Columns that are read of some kinds of records and steer none."""
_CLIP = re.compile(r"\.(wav|mp3|flac|ogg|opus|m4a|aac|webm|wma|amr|aiff?)\W*$", re.IGNORECASE)
_INERT: Mapping[str, object] = {"loss": True, "train": True, "weight": 1, "loss_scale": 1, "loss_weight": 1}
"""Values that say what happens anyway."""
_EMPTY: tuple[object, ...] = (None, "", [], {}, "[]", "{}", ())


class BadRow(ValueError):
    """A row cannot be read, or a record cannot be written, in a format."""


def is_empty(value: object) -> bool:
    """Whether a value of a column says nothing; False and 0 say something."""
    return not isinstance(value, bool | int | float) and value in _EMPTY


class Columns:
    """Hands out the columns of a row, and refuses those that nobody asked for."""

    def __init__(self, row: Row, ignored: Collection[str] = ()) -> None:
        self._row = {str(name): value for name, value in row.items() if name not in ignored}
        self._unread = dict(self._row)

    def __contains__(self, name: str) -> bool:
        return name in self._row

    def peek(self, name: str) -> Any:
        """The value of a column, which stays unread."""
        return self._row.get(name)

    def names(self) -> str:
        """The names of the columns, for messages."""
        return ", ".join(self._row)[:200] or "none"

    def take(self, *names: str) -> Any:
        """The value under these names, of which several may be there if they say the same.

        Raises:
            BadRow: they say different things.
        """
        values = self.take_each(*names)
        if any(value != values[0] for value in values[1:]):
            raise BadRow(f"has {' and '.join(self._there(names))}, which differ; keep one")
        return values[0] if values else None

    def take_each(self, *names: str) -> list[Any]:
        """The values under these names, without nulls."""
        for name in names:
            self._unread.pop(name, None)
        return [self._row[name] for name in self._there(names)]

    def _there(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if self._row.get(name) is not None]

    def refuse_unread(self, has_clips: bool) -> None:
        """Refuse the first column that was not taken and may say something about training.

        Where no clips were taken, a column that names one is among them.

        Raises:
            BadRow: naming it.
        """
        for name, value in self._unread.items():
            if name not in _ABOUT and not is_empty(value) and value != _INERT.get(name, ...):
                if not has_clips and _CLIP.search(str(value)):
                    raise BadRow(f"has a column {name[:80]!r} that names a clip; call it 'audios'")
                _refuse(name, value, _TYPABLE, "column")


def refuse_message_keys(message: Row, is_target: bool) -> None:
    """Refuse what a message says beside its author and text.

    Raises:
        BadRow: naming it.
    """
    for key, value in message.items():
        if is_empty(value) or key in ("role", "from", "content", "value") or value == _INERT.get(key, ...):
            continue
        if key not in _INERT and not _ABOUT_A_MESSAGE.match(str(key)):
            _refuse(str(key), value, _MESSAGE_KEYS, "message with")
            raise BadRow(
                f"has a message with {str(key)[:80]!r} ({str(value)[:40]!r}), which is not read here"
            )
        if key in _INERT and is_target:
            raise BadRow(
                f"has a message with {key} {str(value)[:40]!r}, but every answer is trained on alike; "
                "leave the row out, or end it before this message"
            )


def _refuse(name: str, value: object, known: Collection[str], what: str) -> None:
    plain = re.sub(r"[\W_]+", "_", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name)).strip("_").lower()
    by_letters = {other.replace("_", ""): other for other in known}
    near = get_close_matches(plain.replace("_", ""), by_letters, n=1, cutoff=0.8)
    said = f"has a {what} {name[:80]!r} ({str(value)[:40]!r})"
    if near and not plain.startswith(("un", "non", "not", "dis")):
        raise BadRow(f"{said}, which is not read here; did you mean {by_letters[near[0]]!r}?")
    if _STEERING.search(plain) or isinstance(value, bool) or _holds_messages(value):
        raise BadRow(
            f"{said}, which is not read here but may say what to train on; remove it, or name it by --ignore"
        )


def _holds_messages(value: object) -> bool:
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, Mapping) and bool({"role", "from", "content"} & set(first))

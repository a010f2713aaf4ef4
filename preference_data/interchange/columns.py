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
_ABOUT_WORDS = frozenset(
    "id uuid key index idx row line number num no n count part shard split fold version hash sha md unnamed "
    "title description caption transcript transcription tag tags topic topics category genre task subset "
    "source src dataset corpus provenance license licence author creator url uri link path file filename "
    "folder audio clip wav sound voice speech recording sample sampling rate hz khz frames channels "
    "format codec duration length seconds s ms sec start end offset time timestamp date created updated at "
    "year snr db level loudness noise room mic microphone close device scene location place city country "
    "region language languages lang locale accent dialect speaker speakers gender age meta metadata info "
    "comment notes extra original is has synthetic annotator batch domain".split()
)
"""A column whose name has no other words is about a recording, or where a row comes from."""
_CLIP_WORDS = frozenset({"audio", "clip", "wav", "sound", "voice", "speech", "recording"})
_ABOUT = ("id", "prompt_id", "axis", "agreement", "source")
"""Columns that are read of some kinds of records and steer none."""
_CLIP = re.compile(r"\.(wav|mp3|flac|ogg|opus|m4a|aac|webm|wma|amr|aiff?)\b", re.IGNORECASE)
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

    def take_id(self, name: str, *parts: object) -> str:
        """The row's own id, or one made from what it says.

        Raises:
            BadRow: it is neither text on one line nor a whole number.
        """
        from preference_data.schema import stable_id  # pydantic takes long to load

        value = self.take(name)
        if is_empty(value):
            return stable_id(*parts)
        text = str(value)
        if (
            isinstance(value, bool)
            or not isinstance(value, str | int)
            or not (text.strip() and text.isprintable())
        ):
            raise BadRow(f"{name} is {text[:80]!r}; it must be text on one line, or a whole number")
        return text

    def _there(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if self._row.get(name) is not None]

    def refuse_unread(self, audios: Collection[str]) -> None:
        """Refuse the columns that were not taken, but for those that cannot say anything about training.

        Args:
            audios: the clips of the row; a column that names others is refused too.

        Raises:
            BadRow: naming them.
        """
        left = {
            name: value
            for name, value in self._unread.items()
            if name not in _ABOUT and not is_empty(value) and not _is_inert(name, value)
        }
        for name, value in left.items():
            if _names_other_clip(name, value, audios):
                raise BadRow(
                    f"has a column {name[:80]!r} that names a clip; call it 'audios', or leave it out"
                )
        if others := [name for name, value in left.items() if not _is_about_recording(name, value)]:
            more = f" (so are {', '.join(map(repr, others[1:]))[:200]})" if others[1:] else ""
            hint = _did_you_mean(others[0], _TYPABLE) or (
                f" but may say what to train on; remove it{more}, or name it by --ignore"
            )
            raise BadRow(f"has a column {_cited(others[0], left[others[0]])}, which is not read here{hint}")


def refuse_message_keys(message: Row, is_target: bool) -> None:
    """Refuse what a message says beside its author and text.

    Raises:
        BadRow: naming it.
    """
    for key, value in message.items():
        if is_empty(value) or key in ("role", "from", "content", "value") or _is_inert(key, value):
            continue
        if key in _INERT and is_target:
            raise BadRow(
                f"has a message with {key} {str(value)[:40]!r}, but every answer is trained on alike; "
                "leave the row out, or end it before this message"
            )
        if key not in _INERT and (not _ABOUT_A_MESSAGE.match(str(key)) or _holds_messages(value)):
            hint = _did_you_mean(str(key), _MESSAGE_KEYS)
            raise BadRow(f"has a message with {_cited(str(key), value)}, which is not read here{hint}")


def _cited(name: str, value: object) -> str:
    return f"{name[:80]!r} ({str(value)[:40]!r})"


def _is_inert(name: str, value: object) -> bool:
    """Whether a value says what happens anyway; tables hold it as text."""
    if name not in _INERT:
        return False
    return value == _INERT[name] or str(value).strip().lower() in ("true", "1", "1.0")


def _words(name: str) -> list[str]:
    return re.findall(r"[^\W\d_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower())


def _is_about_recording(name: str, value: object) -> bool:
    if _holds_messages(value) or (isinstance(value, Mapping) and {*REJECTED, *LABELS} & set(value)):
        return False
    words = _words(name)
    return _ABOUT_WORDS.issuperset(words) if words else str(value).isdecimal()  # a nameless count of rows


def _names_other_clip(name: str, value: object, audios: Collection[str]) -> bool:
    if not _CLIP.search(str(value)) or any(path in str(value) for path in audios):
        return False
    return not audios or not _CLIP_WORDS.isdisjoint(_words(name))


def _did_you_mean(name: str, known: Collection[str]) -> str:
    plain = "_".join(_words(name))
    by_letters = {other.replace("_", ""): other for other in known}
    near = get_close_matches(plain.replace("_", ""), by_letters, n=1, cutoff=0.8)
    if not near or by_letters[near[0]] == name or plain.startswith(("un", "non", "not", "dis")):
        return ""
    return f"; did you mean {by_letters[near[0]]!r}?"


def _holds_messages(value: object) -> bool:
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, Mapping) and bool({"role", "from", "content"} & set(first))

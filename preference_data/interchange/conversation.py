"""The conversation of a row, in whichever columns it stands: questions with clips, answers, a rejected one.

Messages of {role, content} or {from, value}, whose content is text with <audio> or parts {type, text}; or
columns of text, as in Alpaca's rows. Columns that say the same twice must agree.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple
from urllib.parse import unquote

from preference_data.interchange.columns import (
    ANSWERS,
    QUESTIONS,
    REJECTED,
    BadRow,
    Columns,
    is_empty,
    refuse_message_keys,
)

Form = Literal["trl", "llamafactory", "ms-swift"]
RowForm = Literal["trl", "llamafactory", "ms-swift", "choice"]
"""`choice`: multiple-choice questions, which are only read; see `questions`."""
TAG = "<audio>"
DEFAULT_SYSTEM = "You are a helpful assistant."
"""Qwen2-Audio's chat template adds it anyway."""

_BODIES: dict[Form, tuple[str, ...]] = {
    "trl": ("messages", "conversations", "prompt"),
    "llamafactory": ("conversations", "messages", "prompt"),
    "ms-swift": ("messages", "conversations", "conversation", "prompt"),
}
"""Where a conversation may stand as messages, in the order in which a format's readers look."""
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_LABELLED = re.compile(r"(?:Audio \d+:\s*)?<audio>\s*")
_LESS = r"(?:<|＜|&(?:amp;)*(?:lt|#0*60|#x0*3c);|\\u003c)"
_GREATER = r"(?:>|＞|&(?:amp;)*(?:gt|#0*62|#x0*3e);|\\u003e)"
_END_TAG = rf"{_LESS}/audio{_GREATER}"
_ESCAPED_TAG = re.compile(rf"{_LESS}\s*audio\s*/?\s*{_GREATER}(?:\s*{_END_TAG})?", re.IGNORECASE)
_NAMED_CLIP = re.compile(rf"<audio>\s*([^<>\n]*?[^<>\s])\s*{_END_TAG}", re.IGNORECASE)
_BROKEN_TAG = re.compile(r"[<‹〈]\s*[/|]?\s*audio>?|\baudio\s*/?[>›〉]|u003c/?audio", re.IGNORECASE)
_PLACEHOLDER = re.compile(
    r"[\[{]\s*audio\s*[\]}]|<\s*/?\s*(image|img|video|speech|sound)(here)?\s*/?\s*>", re.IGNORECASE
)
"""What stands for a clip, an image or a video in the data of other models."""
_COULD_BE_TAG = re.compile(r"[<>&%]|u003c", re.IGNORECASE)
"""Plain text without any of these holds no tag, however it is escaped."""
_UNSEEN = re.compile("[\u00ad\u200b-\u200f\u2060\ufeff]")


class _Message(NamedTuple):
    """A message: by whom, its text with clips as `TAG`, and the clips that it names itself."""

    role: str
    text: str
    clips: tuple[str, ...] = ()


class Turns(NamedTuple):
    """A conversation: questions, how many clips each brings, and answers; the last may have none."""

    system: str | None
    questions: list[str]
    clips: list[int]
    answers: list[str]
    audios: tuple[str, ...]

    @property
    def prompt_key(self) -> tuple[str, ...]:
        """What tells the first question from others."""
        return (*self.audios, *([self.system] if self.system else ()), self.questions[0])

    @property
    def conversation_key(self) -> tuple[str, ...]:
        """What tells the conversation up to the last question from others."""
        between = zip(self.answers, self.questions[1:], strict=False)
        return (*self.prompt_key, *(text for pair in between for text in pair))

    @property
    def is_open(self) -> bool:
        """Whether the last question has no answer."""
        return len(self.answers) < len(self.questions)


def read_turns(columns: Columns, form: Form) -> tuple[Turns, str | None]:
    """The conversation of a row, and its rejected answer if there is one.

    Raises:
        BadRow: there is none, it says two things, or holds what cannot be trained on.
    """
    messages = _conversation(columns, form)
    rejected = _rejected(columns, messages)
    return _turns(columns, messages), rejected


def _conversation(columns: Columns, form: Form) -> list[_Message]:
    """The messages of a row up to its answer, wherever they stand; places that say it twice must agree."""
    places = [
        _messages(value)
        for name in _BODIES[form]
        if not isinstance(columns.peek(name), str) and not is_empty(value := columns.take(name))
    ]
    whole: list[_Message] = []
    for messages in [*places, _asked(columns)]:
        shorter, longer = sorted((whole, messages), key=len)
        if not _is_same(shorter, longer[: len(shorter)]):
            raise BadRow("holds two different conversations; keep one")
        whole = longer
    for answer in columns.take_each(*ANSWERS):
        whole = _answered(whole, _answer(answer))
    if not whole:
        raise BadRow(f"has no list of messages and no question; there are {columns.names()}")
    return whole


def _asked(columns: Columns) -> list[_Message]:
    """Questions and answers before, and the question, of a row that has them as text."""
    names = [name for name in QUESTIONS if isinstance(columns.peek(name), str)]
    texts = [columns.take(*names) if names else None, columns.take("input")]
    if wrong := [text for text in texts if not isinstance(text, str | None)]:
        raise BadRow(f"its question is {str(wrong[0])[:80]!r}, no text")
    history = columns.take("history")
    messages = []
    for turn in [] if is_empty(history) else history if isinstance(history, list) else [history]:
        if not isinstance(turn, list | tuple) or len(turn) != 2 or not all(isinstance(t, str) for t in turn):
            raise BadRow(f"history holds {str(turn)[:80]!r}, not a question and its answer")
        messages += [_Message("user", *_question(turn[0])), _Message("assistant", turn[1])]
    question = "\n".join(text for text in texts if text)
    if question or any(text is not None for text in texts):
        messages.append(_Message("user", *_question(question)))
    return messages


def _answered(messages: list[_Message], answer: list[_Message]) -> list[_Message]:
    """A conversation with its answer, which may stand alone or after the whole conversation."""
    if answer[0].role != "assistant":
        if not _is_same(messages, answer[: len(messages)]):
            raise BadRow("the chosen answer follows another prompt than the row's")
        return answer
    if messages and messages[-1].role == "assistant":
        if not _is_same(messages[-len(answer) :], answer):
            raise BadRow("has two different answers beside its question; keep one")
        return messages
    return [*messages, *answer]


def _rejected(columns: Columns, conversation: list[_Message]) -> str | None:
    """The text of the rejected answer, to the same prompt about the same clips; None where there is none."""
    values = columns.take_each(*REJECTED)
    if not values:
        return None
    clips = columns.take("rejected_audios")
    if not is_empty(clips) and clips != columns.peek("audios"):
        raise BadRow("rejected_audios differ from audios; a pair here is two answers about the same clips")
    texts = set()
    for *prompt, answer in map(_answer, values):
        if prompt and not _is_same(prompt, conversation[:-1]):
            raise BadRow("the rejected answer follows another prompt than the chosen one")
        if answer.role != "assistant" or not answer.text.strip():
            raise BadRow("the rejected answer is empty or not the assistant's")
        texts.add(without_tag(answer.text.strip(), "an answer"))
    if len(texts) > 1:
        raise BadRow("has two different rejected answers; keep one")
    return texts.pop()


def _is_same(a: Sequence[_Message], b: Sequence[_Message]) -> bool:
    """Whether two conversations say the same; either may leave out which clips it is about."""
    return len(a) == len(b) and all(
        (x.role, x.text.strip()) == (y.role, y.text.strip())
        and (x.clips == y.clips or not (x.clips and y.clips))
        for x, y in zip(a, b, strict=True)
    )


def _answer(value: Any) -> list[_Message]:
    """An answer as messages: it may be text, a message or several."""
    if isinstance(value, str):
        return [_Message("assistant", value)]
    return _messages(value if isinstance(value, list) else [value])


def _messages(rows: Any) -> list[_Message]:
    """Messages of any spelling. A system prompt that is the model's own is left out."""
    if not isinstance(rows, list) or not rows:
        raise BadRow(f"has no list of messages where one is expected (got {str(rows)[:80]!r})")
    messages = []
    for row in rows:
        if not isinstance(row, Mapping):
            raise BadRow(f"a message is a {type(row).__name__}, not an object")
        author, content = _only(row, "role", "from"), _only(row, "content", "value")
        role = _ROLES.get(str(author))
        if role is None:
            raise BadRow(f"a message by {str(author)[:80]!r}; known: {', '.join(_ROLES)}")
        refuse_message_keys(row, is_target=role == "assistant")
        message = _Message(role, *_content(content, role))
        if role != "system" or not _is_default(message.text):
            messages.append(message)
    return messages


def _only(row: Mapping[Any, Any], *names: str) -> Any:
    """The value under any of these names; None where there is none."""
    values = [row[name] for name in names if row.get(name) is not None]
    if any(value != values[0] for value in values[1:]):
        raise BadRow(f"a message holds {' and '.join(names)}, which differ; keep one")
    return values[0] if values else None


def _is_default(system: str) -> bool:
    return system.strip() in ("", DEFAULT_SYSTEM)


def _content(content: Any, role: str) -> tuple[str, tuple[str, ...]]:
    """The text of a message, and the clips that it names."""
    read = _question if role == "user" else lambda text: (text, ())
    if isinstance(content, str):
        return read(content)
    if not isinstance(content, list):
        raise BadRow(f"a message holds {str(content)[:80]!r}, no text")
    text, clips = "", tuple[str, ...]()
    for part in content:
        if not isinstance(part, Mapping):
            raise BadRow(f"a message holds a part {str(part)[:80]!r}, neither audio nor text")
        says = {key: value for key, value in part.items() if not is_empty(value) and key != "type"}
        if part.get("type") == "text" and set(says) <= {"text"} and isinstance(part.get("text"), str):
            more, own = read(part["text"])
        elif part.get("type") in ("audio", "audio_url") and set(says) <= {
            "path",
            "audio",
            "audio_url",
            "url",
        }:
            named = _only(says, *says)
            more, own = TAG, () if named is None else (path_of(named),)
        else:
            raise BadRow(f"a message holds a part {str(part)[:80]!r}, neither audio nor text")
        text, clips = text + more, clips + own
    return text, clips


def _question(text: str) -> tuple[str, tuple[str, ...]]:
    """A question with `TAG` for every clip, however the tag is written, and the clips named within it."""
    text = _ESCAPED_TAG.sub(TAG, text)
    clips = tuple(_NAMED_CLIP.findall(text))
    text = _NAMED_CLIP.sub(TAG, text)
    rest = without_tag(text.replace(TAG, ""), "a question")
    if mark := _PLACEHOLDER.search(_unescaped(rest)):
        raise BadRow(
            f"{mark[0]} stands in a question ({text[:80]!r}); write {TAG} for a clip, and nothing else"
        )
    return text, clips


def _unescaped(text: str) -> str:
    """A text as readers may decode it: of HTML, of an address, of full width, with unseen characters."""
    for _ in range(4):  # escaped more than once
        text = html.unescape(unquote(text))
    return unicodedata.normalize("NFKC", _UNSEEN.sub("", text))


def without_tag(text: str, place: str) -> str:
    """A text that holds no tag of a clip, whole or broken.

    Raises:
        BadRow: it does; with the tag, and the `place` of the text.
    """
    if text.isascii() and not _COULD_BE_TAG.search(text):
        return text
    if tag := _BROKEN_TAG.search(_unescaped(text)):
        raise BadRow(
            f"{tag[0]} stands in {place}, where readers take it for a clip ({text[:80]!r}); {TAG} stands in "
            "questions alone, once for each clip: mend the text, or leave the row out"
        )
    return text


def _turns(columns: Columns, messages: list[_Message]) -> Turns:
    """Questions and answers, which must alternate, and the clips of each question."""
    system = columns.take("system")
    if not isinstance(system, str | None):
        raise BadRow(f"system is {str(system)[:80]!r}, no text")
    if messages[0].role == "system":
        if system and not _is_default(system) and system.strip() != messages[0].text.strip():
            raise BadRow("has two different system prompts, one among the messages; keep one")
        system, messages = messages[0].text, messages[1:]
    roles = [message.role for message in messages]
    if not roles or roles != (["user", "assistant"] * len(roles))[: len(roles)]:
        raise BadRow(f"questions and answers do not alternate: {', '.join(roles[:6])}")
    answers = [without_tag(message.text.strip(), "an answer") for message in messages[1::2]]
    if not all(answers):
        raise BadRow("an answer is empty")
    audios = _audios(columns, [clip for message in messages for clip in message.clips])
    clips = _clips([message.text for message in messages[0::2]], len(audios))
    questions = [_untagged(message.text) for message in messages[0::2]]
    if not all(question or own for question, own in zip(questions, clips, strict=True)):
        raise BadRow("a turn has neither a question nor a clip")
    kept = None if system is None or _is_default(system) else without_tag(system.strip(), "the system prompt")
    return Turns(kept, questions, clips, answers, tuple(audios))


def _clips(questions: Sequence[str], n: int) -> list[int]:
    """How many clips each question brings; without any tag, all come with the first."""
    tags = [question.count(TAG) for question in questions]
    if sum(tags) not in (0, n):
        raise BadRow(f"has {sum(tags)} {TAG} but {n} audios; they must be as many")
    return tags if any(tags) else [n, *tags[1:]]


def _untagged(question: str) -> str:
    """A question without its clips, which must stand before or after it."""
    pieces = [piece for piece in _LABELLED.split(question) if piece.strip()]
    if len(pieces) > 1:
        raise BadRow(f"{TAG} stands in the middle of the question; put clips before it")
    return pieces[0].strip() if pieces else ""


def _audios(columns: Columns, named: list[str]) -> list[str]:
    """The clips of a row, from its column or, as `named`, from its messages."""
    value = columns.take("audios", "audio")
    given = [] if is_empty(value) else value if isinstance(value, list) else [value]
    audios = [path_of(audio) for audio in given]
    if audios and named and audios != named:
        raise BadRow(f"audios are {audios[:3]} but the messages name {named[:3]}")
    return audios or named


def path_of(named: Any) -> str:
    """The path of a clip, as a row names it.

    Raises:
        BadRow: it is none.
    """
    path = named.get("path") or named.get("url") if isinstance(named, Mapping) else named
    if not isinstance(path, str) or not path:
        raise BadRow(f"an audio is {str(named)[:80]!r}, not a path; write the clips to files and name them")
    return path

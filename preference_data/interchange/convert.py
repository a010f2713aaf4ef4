"""Preference pairs, labels and chats <-> the rows of TRL, LLaMA-Factory and ms-swift.

    TRL            prompt, chosen, rejected; prompt, completion, label; or messages: lists of
                   {role, content: [{type, text}]}, or text; audios
    LLaMA-Factory  conversations of {from, value} with <audio>, or instruction, input, output, history;
                   chosen, rejected; or kto_tag; audios; dataset_info.json
    ms-swift       messages of {role, content} with <audio>, the last one chosen, or query, response;
                   rejected_response; or label; audios

Rows say more than ours and ours more than theirs: `id`, `prompt_id`, `axis`, `agreement`, `weight` and
`source` travel as columns that the three ignore, so that what is written and read again is the same. What a
record here cannot hold (a pair with earlier turns, a clip in the middle of a sentence, a message that is not
trained on) is refused with a reason, not bent. Layouts: TRL docs "Dataset formats"; LLaMA-Factory
data/README.md; ms-swift docs/source_en/Customization/Custom-dataset.md.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from itertools import islice
from typing import Any, Literal, NamedTuple

from pydantic import ValidationError
from pydantic_core import PydanticSerializationError

from preference_data.interchange.columns import (
    ANSWERS,
    LABELS,
    QUESTIONS,
    REJECTED,
    BadRow,
    Columns,
    is_empty,
    refuse_message_keys,
)
from preference_data.prompts.prompts import BadExample, refuse_control
from preference_data.schema import Axis, Chat, ContentPart, Label, Message, PreferencePair, Turn, stable_id
from preference_data.store import problem_of

Form = Literal["trl", "llamafactory", "ms-swift"]
Kind = Literal["pairs", "labels", "chats"]
Example = PreferencePair | Label | Chat
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
_ESCAPED_TAG = re.compile(rf"{_LESS}\s*audio\s*/?\s*{_GREATER}", re.IGNORECASE)
_NAMED_CLIP = re.compile(r"<audio>([^<>\n]*[^<>\s])</audio>")
_BROKEN_TAG = re.compile(
    rf"{_LESS}\s*audio\s*/?\s*{_GREATER}|{_LESS}[/|]?audio|\baudio/?{_GREATER}", re.IGNORECASE
)
Row = dict[str, Any]


class _Message(NamedTuple):
    """A message: by whom, its text with clips as `TAG`, and the clips that it names itself."""

    role: str
    text: str
    clips: tuple[str, ...] = ()


class _Turns(NamedTuple):
    """A conversation that ends with an answer: questions, how many clips each brings, and answers."""

    system: str | None
    questions: list[str]
    clips: list[int]
    answers: list[str]
    audios: tuple[str, ...]

    @property
    def prompt_key(self) -> tuple[str, ...]:
        """What tells the first question from others."""
        return (*self.audios, *([self.system] if self.system else ()), self.questions[0])


# ------------------------------------------------------------------- reading


def read_row(
    row: Any, form: Form, axis: Axis = "factuality", source: str = "imported", ignored: Collection[str] = ()
) -> Example:
    """A row as a preference pair, a label or a chat; `audios` as the row names them.

    Args:
        row: what JSON held.
        form: whose row it is.
        axis: of a pair whose row names none.
        source: of a label whose row names none.
        ignored: columns that are not to be read.

    Raises:
        BadRow: it is not such a row, or holds what a record cannot; what, and what to do.
    """
    if not isinstance(row, Mapping):
        raise BadRow(f"is a {type(row).__name__}, not an object")
    columns = Columns(row, ignored)
    try:
        record = _record(columns, form, axis, source)
        columns.refuse_unread(bool(record.audios))
        refuse_control(record.id, *_texts(record))
        record.model_dump_json()  # what cannot be written as UTF-8 is no record
    except ValidationError as error:
        raise BadRow(f"makes no record: {problem_of(error)}") from error
    except BadExample as error:
        raise BadRow(str(error)) from error
    except (UnicodeEncodeError, PydanticSerializationError) as error:
        raise BadRow("holds half of a surrogate pair, which is no character") from error
    except RecursionError as error:
        raise BadRow("is nested too deeply") from error
    return record


def _record(columns: Columns, form: Form, axis: Axis, source: str) -> Example:
    conversation = _conversation(columns, form)
    rejected, label = _rejected(columns, conversation), _label(columns)
    turns = _turns(columns, conversation)
    if rejected is not None and label is not None:
        raise BadRow("has both a rejected answer and a label; leave one out")
    if rejected is None and columns.peek("chosen") is not None:
        raise BadRow(f"has a chosen answer but no rejected one; there are {columns.names()}")
    if rejected is not None:
        return _pair(columns, turns, rejected, axis)
    return _labelled(columns, turns, label, source) if label is not None else _chat(columns, turns)


def _chat(columns: Columns, turns: _Turns) -> Chat:
    """Turns say which clips they bring only where not all come with the first."""
    left = iter(turns.audios)
    own = [tuple(islice(left, n)) if any(turns.clips[1:]) else () for n in turns.clips]
    return Chat(
        id=_id(columns, "id", *turns.prompt_key, *turns.questions[1:], *turns.answers),
        system=turns.system,
        audios=turns.audios,
        turns=tuple(
            Turn(question=question, answer=answer, audios=clips)
            for question, answer, clips in zip(turns.questions, turns.answers, own, strict=True)
        ),
    )


def _pair(columns: Columns, turns: _Turns, rejected: str, axis: Axis) -> PreferencePair:
    if len(turns.questions) > 1:
        n = len(turns.questions)
        raise BadRow(f"has {n} turns; a pair here is one question: keep the last one or leave it out")
    chosen = turns.answers[0]
    if chosen == rejected:
        raise BadRow("chosen and rejected are the same; there is nothing to prefer")
    axis, prompt_id = columns.take("axis") or axis, _id(columns, "prompt_id", *turns.prompt_key)
    return PreferencePair(
        id=_id(columns, "id", prompt_id, chosen, rejected, axis),
        prompt_id=prompt_id,
        system=turns.system,
        audios=turns.audios,
        question=turns.questions[0],
        chosen=chosen,
        rejected=rejected,
        axis=axis,
        agreement=_number(columns, "agreement"),
    )


def _labelled(columns: Columns, turns: _Turns, label: bool, source: str) -> Label:
    earlier = [text for pair in zip(turns.answers[:-1], turns.questions[1:], strict=True) for text in pair]
    prompt_id = _id(columns, "prompt_id", *turns.prompt_key, *earlier)
    prompt = [] if turns.system is None else [_message("system", turns.system)]
    for question, answer, n_clips in zip(turns.questions, turns.answers, turns.clips, strict=True):
        prompt += [_message("user", question, n_clips), _message("assistant", answer)]
    return Label(
        id=_id(columns, "id", prompt_id, turns.answers[-1], label),
        prompt_id=prompt_id,
        prompt=tuple(prompt[:-1]),
        completion=turns.answers[-1],
        audios=turns.audios,
        label=label,
        weight=_number(columns, "weight"),
        source=str(columns.take("source") or source),
    )


def _message(role: Literal["system", "user", "assistant"], text: str, n_clips: int = 0) -> Message:
    clips = [ContentPart(type="audio")] * n_clips
    return Message(role=role, content=(*clips, ContentPart(type="text", text=text)))


def _id(columns: Columns, name: str, *parts: object) -> str:
    """The row's own id, or one made from what it says."""
    value = columns.take(name)
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


def _number(columns: Columns, name: str) -> float:
    value = columns.take(name)
    try:
        return 1.0 if is_empty(value) else float(value)
    except (TypeError, ValueError) as error:
        raise BadRow(f"{name} is {str(value)[:80]!r}, not a number") from error


def _label(columns: Columns) -> bool | None:
    """Whether the row says that its completion is good; None where it has no such column."""
    names = [name for name in LABELS if name in columns]
    if not names:
        return None
    value = columns.take(*LABELS)
    says = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
    if (label := says.get(str(value).strip().lower())) is None:
        raise BadRow(f"{names[0]} is {str(value)[:80]!r}, neither true nor false")
    return label


# ------------------------------------------------------------------- conversations


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
        raise BadRow(f"has no list of messages and no question with its answer; there are {columns.names()}")
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
        texts.add(_without_tag(answer.text.strip(), "an answer"))
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
        author, content = (
            next((row[key] for key in keys if row.get(key) is not None), None)
            for keys in (("role", "from"), ("content", "value"))
        )
        role = _ROLES.get(str(author))
        if role is None:
            raise BadRow(f"a message by {str(author)[:80]!r}; known: {', '.join(_ROLES)}")
        refuse_message_keys(row, is_target=role == "assistant")
        message = _Message(role, *_content(content, role))
        if role != "system" or not _is_default(message.text):
            messages.append(message)
    return messages


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
            more, own = TAG, tuple(map(_path, list(says.values())[:1]))
        else:
            raise BadRow(f"a message holds a part {str(part)[:80]!r}, neither audio nor text")
        text, clips = text + more, clips + own
    return text, clips


def _question(text: str) -> tuple[str, tuple[str, ...]]:
    """A question with `TAG` for every clip, however the tag is written, and the clips named within it."""
    text = _ESCAPED_TAG.sub(TAG, text)
    clips = tuple(_NAMED_CLIP.findall(text))
    text = _NAMED_CLIP.sub(TAG, text)
    _without_tag(text.replace(TAG, ""), "a question")
    return text, clips


def _without_tag(text: str, place: str) -> str:
    """A text that holds no tag of a clip, whole or broken.

    Raises:
        BadRow: it does; with the tag, and the `place` of the text.
    """
    if tag := _BROKEN_TAG.search(text):
        raise BadRow(
            f"{tag[0]} stands in {place}, where readers take it for a clip ({text[:80]!r}); {TAG} stands in "
            "questions alone, once for each clip: mend the text, or leave the row out"
        )
    return text


def _turns(columns: Columns, messages: list[_Message]) -> _Turns:
    """Questions and answers, which must alternate, and the clips of each question."""
    system = columns.take("system")
    if not isinstance(system, str | None):
        raise BadRow(f"system is {str(system)[:80]!r}, no text")
    if messages[0].role == "system":
        if system and not _is_default(system) and system.strip() != messages[0].text.strip():
            raise BadRow("has two different system prompts, one among the messages; keep one")
        system, messages = messages[0].text, messages[1:]
    roles = [message.role for message in messages]
    if not roles or len(roles) % 2 or roles != ["user", "assistant"] * (len(roles) // 2):
        raise BadRow(f"questions and answers do not alternate: {', '.join(roles[:6])}")
    answers = [_without_tag(message.text.strip(), "an answer") for message in messages[1::2]]
    if not all(answers):
        raise BadRow("an answer is empty")
    audios = _audios(columns, [clip for message in messages for clip in message.clips])
    clips = _clips([message.text for message in messages[0::2]], len(audios))
    questions = [_untagged(message.text) for message in messages[0::2]]
    if not all(question or own for question, own in zip(questions, clips, strict=True)):
        raise BadRow("a turn has neither a question nor a clip")
    kept = (
        None if system is None or _is_default(system) else _without_tag(system.strip(), "the system prompt")
    )
    return _Turns(kept, questions, clips, answers, tuple(audios))


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
    audios = (
        [] if is_empty(value) else [_path(audio) for audio in (value if isinstance(value, list) else [value])]
    )
    if audios and named and audios != named:
        raise BadRow(f"audios are {audios[:3]} but the messages name {named[:3]}")
    return audios or named


def _path(named: Any) -> str:
    path = named.get("path") or named.get("url") if isinstance(named, Mapping) else named
    if not isinstance(path, str) or not path:
        raise BadRow(f"an audio is {str(named)[:80]!r}, not a path; write the clips to files and name them")
    return path


# ------------------------------------------------------------------- writing


def write_row(record: Example, audios: Sequence[str], form: Form) -> Row:
    """A record as a row; `audios` are its clips as the reader will find them, before their questions.

    Raises:
        BadRow: a text holds a tag that readers would take for a clip, or a token that steers the model.
    """
    try:
        refuse_control(record.id, *_texts(record))
    except BadExample as error:
        raise BadRow(str(error)) from error
    match record:
        case PreferencePair():
            return {**_pair_row(record, form), "audios": list(audios), **_kept(record, "axis", "agreement")}
        case Label():
            return {**_label_row(record, form), "audios": list(audios), **_kept(record, "weight", "source")}
        case Chat():
            messages = _spoken("system", record.system, form)
            for turn, clips in zip(record.turns, record.audios_per_turn, strict=True):
                messages += _spoken("user", turn.question, form, len(clips))
                messages += _spoken("assistant", turn.answer, form)
            return {_body(form): messages, "audios": list(audios), "id": record.id}


def _kept(record: PreferencePair | Label, *names: str) -> Row:
    """Columns that only we read."""
    return {name: getattr(record, name) for name in ("id", "prompt_id", *names)}


def _pair_row(pair: PreferencePair, form: Form) -> Row:
    question = [
        *_spoken("system", pair.system, form),
        *_spoken("user", pair.question, form, len(pair.audios)),
    ]
    chosen, rejected = _spoken("assistant", pair.chosen, form), _spoken("assistant", pair.rejected, form)
    match form:
        case "trl":
            return {"prompt": question, "chosen": chosen, "rejected": rejected}
        case "llamafactory":
            return {"conversations": question, "chosen": chosen[0], "rejected": rejected[0]}
        case "ms-swift":
            return {"messages": question + chosen, "rejected_response": pair.rejected}


def _label_row(label: Label, form: Form) -> Row:
    prompt = []
    for message in label.prompt:
        text = "".join(part.text or "" for part in message.content)
        prompt += _spoken(message.role, text, form, sum(part.type == "audio" for part in message.content))
    completion = _spoken("assistant", label.completion, form)
    if form == "trl":
        return {"prompt": prompt, "completion": completion, "label": label.label}
    return {_body(form): prompt + completion, "kto_tag" if form == "llamafactory" else "label": label.label}


def _body(form: Form) -> str:
    return "conversations" if form == "llamafactory" else "messages"


def _spoken(role: str, text: str | None, form: Form, n_clips: int = 0) -> list[Row]:
    """The message of a format, if there is a text."""
    if text is None:
        return []
    _without_tag(text, "a text")
    if form == "trl":
        return [
            {
                "role": role,
                "content": [*({"type": "audio"} for _ in range(n_clips)), {"type": "text", "text": text}],
            }
        ]
    if form == "llamafactory":
        return [
            {"from": {"user": "human", "assistant": "gpt"}.get(role, role), "value": TAG * n_clips + text}
        ]
    return [{"role": role, "content": TAG * n_clips + text}]


def _texts(record: Example) -> list[str]:
    """Every text of a record that a policy would read or learn."""
    match record:
        case PreferencePair():
            return [record.system or "", record.question, record.chosen, record.rejected]
        case Label():
            return [*(part.text or "" for m in record.prompt for part in m.content), record.completion]
        case Chat():
            return [
                record.system or "",
                *(text for turn in record.turns for text in (turn.question, turn.answer)),
            ]


def dataset_info(name: str, file_name: str, kind: Kind) -> Row:
    """The entry that LLaMA-Factory's dataset_info.json needs for a file of rows."""
    columns = {"messages": "conversations", "audios": "audios"}
    match kind:
        case "chats":
            return {name: {"file_name": file_name, "formatting": "sharegpt", "columns": columns}}
        case "labels":
            tagged = {**columns, "kto_tag": "kto_tag"}
            return {name: {"file_name": file_name, "formatting": "sharegpt", "columns": tagged}}
        case "pairs":
            ranked = {**columns, "chosen": "chosen", "rejected": "rejected"}
            return {
                name: {"file_name": file_name, "ranking": True, "formatting": "sharegpt", "columns": ranked}
            }

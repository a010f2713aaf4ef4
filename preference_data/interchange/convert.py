"""Preference pairs and chats <-> the rows of TRL, LLaMA-Factory and ms-swift.

    TRL            prompt, chosen, rejected (or messages): lists of {role, content: [{type, text}]}; audios
    LLaMA-Factory  conversations of {from, value} with <audio>; chosen, rejected; audios; dataset_info.json
    ms-swift       messages of {role, content} with <audio>, the last one chosen; rejected_response; audios

Rows say more than ours and ours more than theirs: `id`, `prompt_id`, `axis` and `agreement` travel as columns
that the three ignore, so that what is written and read again is the same. What a record here cannot hold (a
pair with earlier turns, a system prompt of its own, a clip in the middle of a sentence) is refused with a
reason, not bent. Layouts: TRL docs "Dataset formats"; LLaMA-Factory data/README.md; ms-swift
docs/source_en/Customization/Custom-dataset.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any, Literal, NamedTuple

from preference_data.schema import Axis, Chat, PreferencePair, Turn, stable_id

Form = Literal["trl", "llamafactory", "ms-swift"]
TAG = "<audio>"
DEFAULT_SYSTEM = "You are a helpful assistant."
"""Qwen2-Audio's chat template adds it anyway."""

_LABELLED = re.compile(r"(?:Audio \d+:\s*)?<audio>\s*")
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
Row = dict[str, Any]


class BadRow(ValueError):
    """A row cannot be read, or a record cannot be written, in a format."""


class _Message(NamedTuple):
    """A message: by whom, and its text, clips as `TAG`."""

    role: str
    text: str


class _Conversation(NamedTuple):
    """A row, whatever its format: turns that end with the (chosen) answer, and the rejected answer."""

    messages: list[_Message]
    rejected: str | None
    audios: tuple[str, ...]


def pair_row(pair: PreferencePair, audios: Sequence[str], form: Form) -> Row:
    """A preference pair as a row; `audios` are its clips as the reader will find them.

    Raises:
        BadRow: a text holds `<audio>`, which readers would take for a clip.
    """
    prompt, chosen = _written([(pair.question, pair.chosen, len(audios))], form)
    rejected = _written([("", pair.rejected, 0)], form)[1]
    rows: dict[Form, Row] = {
        "trl": {"prompt": [prompt], "chosen": [chosen], "rejected": [rejected]},
        "llamafactory": {"conversations": [prompt], "chosen": chosen, "rejected": rejected},
        "ms-swift": {"messages": [prompt, chosen], "rejected_response": pair.rejected},
    }
    kept = {"id": pair.id, "prompt_id": pair.prompt_id, "axis": pair.axis, "agreement": pair.agreement}
    return {**rows[form], "audios": list(audios), **kept}


def chat_row(chat: Chat, audios: Sequence[str], form: Form) -> Row:
    """A chat as a row; clips come before the question of their turn.

    Raises:
        BadRow: a text holds `<audio>`.
    """
    clips = chat.audios_per_turn
    turns = [(turn.question, turn.answer, len(own)) for turn, own in zip(chat.turns, clips, strict=True)]
    column = "conversations" if form == "llamafactory" else "messages"
    return {column: _written(turns, form), "audios": list(audios), "id": chat.id}


def dataset_info(name: str, file_name: str, kind: Literal["pairs", "chats"]) -> Row:
    """The entry that LLaMA-Factory's dataset_info.json needs for a file of rows."""
    columns = {"messages": "conversations", "audios": "audios"}
    if kind == "chats":
        return {name: {"file_name": file_name, "formatting": "sharegpt", "columns": columns}}
    ranked = {**columns, "chosen": "chosen", "rejected": "rejected"}
    return {name: {"file_name": file_name, "ranking": True, "formatting": "sharegpt", "columns": ranked}}


def read_row(row: Any, form: Form, axis: Axis = "factuality") -> PreferencePair | Chat:
    """A row as a preference pair or, without a rejected answer, a chat; `audios` as the row names them.

    Args:
        row: what JSON held.
        form: whose row it is.
        axis: of a pair whose row names none.

    Raises:
        BadRow: it is not such a row, or holds what a record cannot; what, and what to do.
    """
    if not isinstance(row, dict):
        raise BadRow(f"is a {type(row).__name__}, not an object")
    conversation = _READERS[form](row)
    questions, answers = _turns(conversation.messages)
    clips = _clips(questions, len(conversation.audios))
    questions = [_without_tags(question) for question in questions]
    if any(TAG in text for text in [*answers, conversation.rejected or ""]):
        raise BadRow(f"{TAG} stands in an answer; answers are text here")
    if not all(question or own for question, own in zip(questions, clips, strict=True)):
        raise BadRow("a turn has neither a question nor a clip")
    if conversation.rejected is None:
        key = _text_or(row, "id", stable_id(*conversation.audios, *questions, *answers))
        return _chat(key, questions, answers, clips, conversation.audios)
    if len(questions) > 1:
        raise BadRow(
            f"has {len(questions)} turns; a pair here is one question: keep the last one or leave it out"
        )
    return _pair(row, questions[0], answers[0], conversation.rejected, conversation.audios, axis)


def _chat(
    key: str, questions: Sequence[str], answers: Sequence[str], clips: Sequence[int], audios: tuple[str, ...]
) -> Chat:
    """Turns say which clips they bring only where not all come with the first."""
    left = iter(audios)
    own = [tuple(islice(left, n)) if any(clips[1:]) else () for n in clips]
    turns = tuple(
        Turn(question=question, answer=answer, audios=brought)
        for question, answer, brought in zip(questions, answers, own, strict=True)
    )
    return Chat(id=key, audios=audios, turns=turns)


def _pair(
    row: Row, question: str, chosen: str, rejected: str, audios: tuple[str, ...], axis: Axis
) -> PreferencePair:
    if chosen == rejected:
        raise BadRow("chosen and rejected are the same; there is nothing to prefer")
    prompt_id = _text_or(row, "prompt_id", stable_id(*audios, question))
    try:
        return PreferencePair(
            id=_text_or(row, "id", stable_id(prompt_id, chosen, rejected, axis)),
            prompt_id=prompt_id,
            audios=audios,
            question=question,
            chosen=chosen,
            rejected=rejected,
            axis=row.get("axis") or axis,
            agreement=1.0 if row.get("agreement") is None else row["agreement"],
        )
    except ValueError as error:  # pydantic's
        raise BadRow(f"makes no pair: {str(error).splitlines()[1:3]}") from error


# ------------------------------------------------------------------- reading


def _trl(row: Row) -> _Conversation:
    """Explicit prompt, or chosen and rejected with the prompt in both."""
    audios = _audios(row)
    if "messages" in row:
        return _Conversation(_messages(row["messages"], audios), None, tuple(audios))
    for name in ("chosen", "rejected"):
        if name not in row:
            raise BadRow(f"has no {name}; there are {', '.join(row)}")
    prompt = _messages(row["prompt"], audios) if "prompt" in row else []
    chosen = _messages(row["chosen"], audios)
    rejected = _messages(row["rejected"], list(audios))
    if prompt == [] and chosen[:-1] != rejected[:-1]:
        raise BadRow("chosen and rejected answer different prompts")
    return _Conversation(prompt + chosen, _answer(rejected), tuple(audios))


def _llamafactory(row: Row) -> _Conversation:
    audios = _audios(row)
    prompt = _messages(row.get("conversations", row.get("messages")), audios)
    if "chosen" not in row and "rejected" not in row:
        return _Conversation(prompt, None, tuple(audios))
    chosen, rejected = (_messages(_listed(row.get(name)), audios) for name in ("chosen", "rejected"))
    return _Conversation([*prompt, *chosen], _answer(rejected), tuple(audios))


def _ms_swift(row: Row) -> _Conversation:
    audios = _audios(row)
    messages = _messages(row.get("messages"), audios)
    whole, answer = row.get("rejected_messages"), row.get("rejected_response")
    if whole is None and answer is None:
        return _Conversation(messages, None, tuple(audios))
    if row.get("rejected_audios") not in (None, row.get("audios")):
        raise BadRow("rejected_audios differ from audios; a pair here is two answers about the same clips")
    rejected = _messages(_listed(answer) if whole is None else whole, list(audios))
    if whole is not None and rejected[:-1] != messages[:-1]:
        raise BadRow("rejected_messages answer another prompt than messages")
    return _Conversation(messages, _answer(rejected), tuple(audios))


_READERS: dict[Form, Callable[[Row], _Conversation]] = {
    "trl": _trl,
    "llamafactory": _llamafactory,
    "ms-swift": _ms_swift,
}


def _messages(rows: Any, audios: list[str]) -> list[_Message]:
    """Messages of any spelling; clips named inside them are added to `audios`."""
    if not isinstance(rows, list) or not rows:
        raise BadRow(f"has no list of messages where one is expected (got {str(rows)[:80]!r})")
    messages = []
    for row in rows:
        if not isinstance(row, dict):
            raise BadRow(f"a message is a {type(row).__name__}, not an object")
        author = row.get("role", row.get("from"))
        role = _ROLES.get(str(author))
        if role is None:
            raise BadRow(f"a message by {author!r}; known: {', '.join(_ROLES)}")
        text = _text(row.get("content", row.get("value")), audios)
        if role != "system":
            messages.append(_Message(role, text))
        elif text.strip() not in ("", DEFAULT_SYSTEM):
            raise BadRow(f"has the system prompt {text[:80]!r}; a record here has none, leave it out")
    return messages


def _text(content: Any, audios: list[str]) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadRow(f"a message holds {str(content)[:80]!r}, no text")
    text = ""
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "audio":
            named = next((part[key] for key in ("path", "audio", "audio_url", "url") if part.get(key)), None)
            audios += [_path(named)] if named else []
            text += TAG
        elif kind == "text" and isinstance(part.get("text"), str):
            text += part["text"]
        else:
            raise BadRow(f"a message holds a part {str(part)[:80]!r}, neither audio nor text")
    return text


def _turns(messages: Sequence[_Message]) -> tuple[list[str], list[str]]:
    """Questions and answers, which must alternate."""
    roles = [message.role for message in messages]
    if not roles or len(roles) % 2 or roles != ["user", "assistant"] * (len(roles) // 2):
        raise BadRow(f"questions and answers do not alternate: {', '.join(roles[:6])}")
    texts = [message.text.strip() for message in messages]
    if not all(texts[1::2]):
        raise BadRow("an answer is empty")
    return texts[0::2], texts[1::2]


def _clips(questions: Sequence[str], n: int) -> list[int]:
    """How many clips each question brings; without any tag, all come with the first."""
    tags = [question.count(TAG) for question in questions]
    if sum(tags) not in (0, n):
        raise BadRow(f"has {sum(tags)} {TAG} but {n} audios; they must be as many")
    return tags if any(tags) else [n, *tags[1:]]


def _without_tags(question: str) -> str:
    """A question without its clips, which must stand before or after it."""
    pieces = [piece for piece in _LABELLED.split(question) if piece.strip()]
    if len(pieces) > 1:
        raise BadRow(f"{TAG} stands in the middle of the question; put clips before it")
    return pieces[0].strip() if pieces else ""


def _answer(messages: Sequence[_Message]) -> str:
    if messages[-1].role != "assistant" or not messages[-1].text.strip():
        raise BadRow("the rejected answer is empty or not the assistant's")
    return messages[-1].text.strip()


def _listed(answer: Any) -> list[Any]:
    """An answer as a list of messages: it may be text, a message or several."""
    if isinstance(answer, str):
        return [{"role": "assistant", "content": answer}]
    return answer if isinstance(answer, list) else [answer]


def _audios(row: Row) -> list[str]:
    named = row.get("audios", row.get("audio"))
    return (
        [] if named is None else [_path(audio) for audio in (named if isinstance(named, list) else [named])]
    )


def _path(named: Any) -> str:
    path = named.get("path") if isinstance(named, Mapping) else named
    if not isinstance(path, str) or not path:
        raise BadRow(f"an audio is {str(named)[:80]!r}, not a path; write the clips to files and name them")
    return path


def _text_or(row: Row, key: str, otherwise: str) -> str:
    return str(row[key]) if row.get(key) not in (None, "") else otherwise


# ------------------------------------------------------------------- writing


def _written(turns: Sequence[tuple[str, str, int]], form: Form) -> list[Row]:
    """Questions and answers as messages of a format; each question has its number of clips before it."""
    rows = []
    for question, answer, n in turns:
        for role, text, clips in (("user", _plain(question), n), ("assistant", _plain(answer), 0)):
            if form == "trl":
                parts = [*({"type": "audio"} for _ in range(clips)), {"type": "text", "text": text}]
                rows.append({"role": role, "content": parts})
            elif form == "llamafactory":
                rows.append({"from": "human" if role == "user" else "gpt", "value": TAG * clips + text})
            else:
                rows.append({"role": role, "content": TAG * clips + text})
    return rows


def _plain(text: str) -> str:
    if TAG in text:
        raise BadRow(
            f"the text {text[:80]!r} holds {TAG}, which readers take for a clip; leave the record out"
        )
    return text

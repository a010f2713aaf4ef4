"""Preference pairs, labels, chats and prompts <-> the rows of TRL, LLaMA-Factory and ms-swift.

    TRL            prompt, chosen, rejected; prompt, completion, label; or messages: lists of
                   {role, content: [{type, text}]}, or text; audios
    LLaMA-Factory  conversations of {from, value} with <audio>, or instruction, input, output, history;
                   chosen, rejected; or kto_tag; audios; dataset_info.json
    ms-swift       messages of {role, content} with <audio>, the last one chosen, or query, response;
                   rejected_response; or label; audios

Rows say more than ours and ours more than theirs: `id`, `prompt_id`, `axis`, `agreement`, `weight` and
`source` travel as columns that the three ignore, so that what is written and read again is the same. A
conversation that ends with a question is a prompt, which is only read. What a record here cannot hold (a clip
in the middle of a sentence, a message that is not trained on) is refused with a reason, not bent. Layouts:
TRL docs "Dataset formats"; LLaMA-Factory data/README.md; ms-swift
docs/source_en/Customization/Custom-dataset.md.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import islice
from typing import Any, Literal

from pydantic import ValidationError
from pydantic_core import PydanticSerializationError

from preference_data.interchange.columns import LABELS, BadRow, Columns, is_empty
from preference_data.interchange.conversation import TAG, Form, RowForm, Turns, read_turns, without_tag
from preference_data.interchange.questions import QUESTION_FORM, read_question
from preference_data.prompts.prompts import BadExample, refuse_control, texts_of
from preference_data.schema import Axis, Chat, Label, Message, PreferencePair, Prompt, Turn, conversation
from preference_data.store import problem_of

Kind = Literal["pairs", "labels", "chats"]
Example = PreferencePair | Label | Chat
Row = dict[str, Any]


# ------------------------------------------------------------------- reading


def read_row(
    row: Any,
    form: RowForm,
    axis: Axis = "factuality",
    source: str = "imported",
    ignored: Collection[str] = (),
    question_form: str = QUESTION_FORM,
) -> Example | Prompt:
    """A row as a preference pair, a label, a chat or a prompt; `audios` as the row names them.

    Args:
        row: what JSON held.
        form: whose row it is.
        axis: of a pair whose row names none.
        source: of a label whose row names none.
        ignored: columns that are not to be read.
        question_form: how a multiple-choice question is put.

    Raises:
        BadRow: it is not such a row, or holds what a record cannot; what, and what to do.
    """
    if not isinstance(row, Mapping):
        raise BadRow(f"is a {type(row).__name__}, not an object")
    columns = Columns(row, ignored)
    try:
        record: Example | Prompt = (
            read_question(columns, question_form)
            if form == "choice"
            else _record(columns, form, axis, source)
        )
        columns.refuse_unread(record.audios)
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


def _record(columns: Columns, form: Form, axis: Axis, source: str) -> Example | Prompt:
    turns, rejected = read_turns(columns, form)
    label = _label(columns)
    if rejected is not None and label is not None:
        raise BadRow("has both a rejected answer and a label; leave one out")
    if rejected is None and columns.peek("chosen") is not None:
        raise BadRow(f"has a chosen answer but no rejected one; there are {columns.names()}")
    if turns.is_open:
        if rejected is not None or label is not None:
            what = "a label" if rejected is None else "a rejected answer"
            raise BadRow(f"has {what} but no answer to its last question; there are {columns.names()}")
        return _prompt(columns, turns)
    if rejected is not None:
        return _pair(columns, turns, rejected, axis)
    return _labelled(columns, turns, label, source) if label is not None else _chat(columns, turns)


def _chat(columns: Columns, turns: Turns) -> Chat:
    """Turns say which clips they bring only where not all come with the first."""
    left = iter(turns.audios)
    own = [tuple(islice(left, n)) if any(turns.clips[1:]) else () for n in turns.clips]
    return Chat(
        id=columns.take_id("id", *turns.prompt_key, *turns.questions[1:], *turns.answers),
        system=turns.system,
        audios=turns.audios,
        turns=tuple(
            Turn(question=question, answer=answer, audios=clips)
            for question, answer, clips in zip(turns.questions, turns.answers, own, strict=True)
        ),
    )


def history_of(turns: Turns) -> tuple[Turn, ...]:
    """The turns before the last question, each with its clips."""
    left = iter(turns.audios)
    return tuple(
        Turn(question=question, answer=answer, audios=tuple(islice(left, n)))
        for question, answer, n in zip(turns.questions[:-1], turns.answers, turns.clips, strict=False)
    )


def _prompt(columns: Columns, turns: Turns) -> Prompt:
    """A question to put to policies, with what a row says for judges and rewards."""
    reference, about = columns.take("answer_gt", "reference"), columns.take("meta_info")
    if wrong := [text for text in (reference, about) if not isinstance(text, str | None)]:
        raise BadRow(f"answer_gt or meta_info is {str(wrong[0])[:80]!r}, no text")
    return Prompt(
        id=columns.take_id("id", *turns.conversation_key),
        system=turns.system,
        audios=turns.audios,
        history=history_of(turns),
        question=turns.questions[-1],
        answer_gt=reference or "",
        meta_info=about or "",
        task_name=str(columns.take("task_name", "task") or "chat"),
    )


def _pair(columns: Columns, turns: Turns, rejected: str, axis: Axis) -> PreferencePair:
    chosen = turns.answers[-1]
    if chosen == rejected:
        raise BadRow("chosen and rejected are the same; there is nothing to prefer")
    axis, prompt_id = columns.take("axis") or axis, columns.take_id("prompt_id", *turns.conversation_key)
    return PreferencePair(
        id=columns.take_id("id", prompt_id, chosen, rejected, axis),
        prompt_id=prompt_id,
        system=turns.system,
        audios=turns.audios,
        history=history_of(turns),
        question=turns.questions[-1],
        chosen=chosen,
        rejected=rejected,
        axis=axis,
        agreement=_number(columns, "agreement"),
    )


def _labelled(columns: Columns, turns: Turns, label: bool, source: str) -> Label:
    prompt_id = columns.take_id("prompt_id", *turns.conversation_key)
    return Label(
        id=columns.take_id("id", prompt_id, turns.answers[-1], label),
        prompt_id=prompt_id,
        prompt=conversation(turns.questions[-1], turns.audios, turns.system, history_of(turns)),
        completion=turns.answers[-1],
        audios=turns.audios,
        label=label,
        weight=_number(columns, "weight"),
        source=str(columns.take("source") or source),
    )


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
    prompt = _all_spoken(pair.messages, form)
    chosen, rejected = _spoken("assistant", pair.chosen, form), _spoken("assistant", pair.rejected, form)
    match form:
        case "trl":
            return {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        case "llamafactory":
            return {"conversations": prompt, "chosen": chosen[0], "rejected": rejected[0]}
        case "ms-swift":
            return {"messages": prompt + chosen, "rejected_response": pair.rejected}


def _label_row(label: Label, form: Form) -> Row:
    prompt = _all_spoken(label.prompt, form)
    completion = _spoken("assistant", label.completion, form)
    if form == "trl":
        return {"prompt": prompt, "completion": completion, "label": label.label}
    return {_body(form): prompt + completion, "kto_tag" if form == "llamafactory" else "label": label.label}


def _body(form: Form) -> str:
    return "conversations" if form == "llamafactory" else "messages"


def _all_spoken(messages: Sequence[Message], form: Form) -> list[Row]:
    return [row for m in messages for row in _spoken(m.role, m.text, form, m.n_clips)]


def _spoken(role: str, text: str | None, form: Form, n_clips: int = 0) -> list[Row]:
    """The message of a format, if there is a text."""
    if text is None:
        return []
    without_tag(text, "a text")
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


def _texts(record: Example | Prompt) -> list[str]:
    """Every text of a record that a policy would read or learn."""
    match record:
        case Prompt():
            return [*texts_of(record), *record.choices]
        case PreferencePair():
            return [*texts_of(record), record.chosen, record.rejected]
        case Label():
            return [*(message.text for message in record.prompt), record.completion]
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

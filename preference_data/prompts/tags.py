"""Qwen-Audio's hierarchical tags (arXiv:2311.07919, section 3.2), in two formats.

The order is transcription tag, audio language, task, text language, timestamps, output instruction.
`tags_paper` spells them as the paper does, where a question follows the tag <|question-answer|>;
`tags_released` as the released tokenizer and evaluation do: <|startoftranscript|> without an s, <|keyword|>
for the paper's <|analysis|>, and a question between <|question|> and <|answer|>, with which the prompt ends.
(Where such a task has an output instruction, the rest of the order follows: ours, the release shows none.)
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

from preference_data.prompts.languages import LANGUAGES, TEXT_LANGUAGES, UNKNOWN
from preference_data.prompts.tasks import TASKS, Stamps, Start, TaskTag

TagFormat = Literal["tags_paper", "tags_released"]

TAG = re.compile(r"<\|([^<>|\s]+)\|>")

_STARTS: dict[TagFormat, dict[Start, str]] = {
    "tags_paper": {"transcript": "startoftranscripts", "analysis": "startofanalysis"},
    "tags_released": {"transcript": "startoftranscript", "analysis": "startofanalysis"},
}
_PAPER: dict[TaskTag, str] = {
    "transcribe": "transcribe",
    "translate": "translate",
    "caption": "caption",
    "analysis": "analysis",
    "question-answer": "question-answer",
}
_TASKS: dict[TagFormat, dict[TaskTag, str]] = {
    "tags_paper": _PAPER,
    "tags_released": {**_PAPER, "analysis": "keyword", "question-answer": "question"},
}
_STAMPS: dict[Stamps, str] = {"timestamps": "timestamps", "notimestamps": "notimestamps"}
_AUDIO_LANGUAGES = {code: code for code in (*LANGUAGES, UNKNOWN)}
_TEXT_LANGUAGES = {code: code for code in TEXT_LANGUAGES}
_ANSWER = "answer"
_IN_USE = {(task.tags.task, task.tags.timestamps, task.tags.instruction) for task in TASKS.values()}


class BadTags(ValueError):
    """Tags that are not as the prompt format has them."""


class Tags(NamedTuple):
    """A prompt's tags.

    Of a question without an output instruction the release tells neither text language nor timestamps: both
    are None.
    """

    start: Start
    audio_language: str
    task: TaskTag
    text_language: str | None
    timestamps: Stamps | None
    instruction: tuple[str, ...] = ()
    question: str | None = None


def render(tags: Tags, prompt_format: TagFormat) -> str:
    """The tags as text.

    Raises:
        BadTags: they break a rule of the format.
    """
    check(tags, prompt_format)
    names = [_STARTS[prompt_format][tags.start], tags.audio_language, _TASKS[prompt_format][tags.task]]
    head = "".join(map(_tag, names)) + (tags.question or "")
    if tags.question is not None and prompt_format == "tags_released":
        head += _tag(_ANSWER)
    if tags.text_language is None or tags.timestamps is None:
        return head
    return head + "".join(map(_tag, (tags.text_language, _STAMPS[tags.timestamps], *tags.instruction)))


def check(tags: Tags, prompt_format: TagFormat) -> None:
    """Rules beyond the order.

    Raises:
        BadTags: naming the rule that is broken.
    """
    speech = tags.task in ("transcribe", "translate")
    if tags.start != ("transcript" if speech else "analysis"):
        raise BadTags(f"{tags.start!r} does not begin the task {tags.task!r}")
    if tags.audio_language not in _AUDIO_LANGUAGES or (speech and tags.audio_language == UNKNOWN):
        raise BadTags(f"{tags.audio_language!r} is not an audio language of the task {tags.task!r}")
    if (tags.task == "question-answer") != (tags.question is not None):
        raise BadTags(f"the task {tags.task!r} with the question {tags.question!r}")
    if tags.question is not None and (
        not tags.question.strip() or "<|" in tags.question or "|>" in tags.question
    ):
        raise BadTags(f"the question {tags.question!r} is empty or holds marks of a tag")
    is_bare = tags.text_language is None and tags.timestamps is None
    if is_bare != (prompt_format == "tags_released" and tags.question is not None and not tags.instruction):
        raise BadTags(
            f"text language {tags.text_language!r} and timestamps {tags.timestamps!r} in {prompt_format}"
        )
    if not is_bare and (tags.text_language not in _TEXT_LANGUAGES or tags.timestamps not in _STAMPS):
        raise BadTags(f"text language {tags.text_language!r} and timestamps {tags.timestamps!r}")
    _check_languages(tags)
    if not is_bare and (tags.task, tags.timestamps, tags.instruction) not in _IN_USE:
        raise BadTags(
            f"no task of tasks.yaml has {tags.task!r}, {tags.timestamps!r} and the output instruction "
            f"{'+'.join(tags.instruction)!r}"
        )


def _check_languages(tags: Tags) -> None:
    same = {tags.audio_language, "zh_tr"} if tags.audio_language == "zh" else {tags.audio_language}
    if tags.task == "transcribe" and tags.text_language not in same:
        raise BadTags(f"a transcript of {tags.audio_language} in {tags.text_language} is a translation")
    if tags.task == "translate" and tags.text_language == tags.audio_language:
        raise BadTags(f"a translation of {tags.audio_language} into {tags.text_language} is a transcript")


def names_of(prompt_format: TagFormat) -> list[str]:
    """Every name that may stand in a tag of this prompt format's prompts."""
    instructions = [name for task in TASKS.values() for name in task.tags.instruction]
    end = [_ANSWER] if prompt_format == "tags_released" else []
    everything = [*_STARTS[prompt_format].values(), *_TASKS[prompt_format].values(), *end, *_STAMPS.values()]
    return sorted({*everything, *_AUDIO_LANGUAGES, *_TEXT_LANGUAGES, *instructions})


def _tag(name: str) -> str:
    return f"<|{name}|>"

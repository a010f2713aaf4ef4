"""Qwen-Audio's hierarchical tags (arXiv:2311.07919, section 3.2), in two formats.

The order is transcription tag, audio language, task, text language, timestamps, output instruction.
`tags_paper` spells them as the paper does, where a question follows the tag <|question-answer|>;
`tags_released` as the released tokenizer and evaluation do: <|startoftranscript|> without an s, <|keyword|>
for the paper's <|analysis|>, and a question between <|question|> and <|answer|>, with which the prompt ends.
(Where such a task has an output instruction, the rest of the order follows: ours, the release shows none.)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal, get_args

from preference_data.prompts.languages import LANGUAGES, TEXT_LANGUAGES, UNKNOWN
from preference_data.prompts.tasks import TASKS, Stamps, Start, TaskTag, TaskTags

TagFormat = Literal["tags_paper", "tags_released"]

TAG = re.compile(r"<\|([^<>|\s]+)\|>")

_STARTS: dict[Start, str] = {"transcript": "startoftranscripts", "analysis": "startofanalysis"}
_SPELLINGS: dict[TagFormat, Mapping[str, str]] = {
    "tags_paper": {},
    "tags_released": {
        "startoftranscripts": "startoftranscript",
        "analysis": "keyword",
        "question-answer": "question",
    },
}
"""Names of starts and tasks that a format spells otherwise than the paper."""
_ANSWER = "answer"


def render(tags: TaskTags, question: str | None, prompt_format: TagFormat) -> str:
    """The tags of a task, with the languages of an example, as text.

    Raises:
        ValueError: the languages or the question do not go with the task.
    """
    _check(tags, question)
    spellings = _SPELLINGS[prompt_format]
    start = _STARTS[tags.start]
    head = [spellings.get(start, start), tags.audio_language, spellings.get(tags.task, tags.task)]
    tail = [tags.text_language, tags.timestamps, *tags.instruction]
    if question is not None and prompt_format == "tags_released":
        tail = [_ANSWER, *(tail if tags.instruction else [])]
    return "".join([*map(_tag, head), question or "", *map(_tag, tail)])


def _check(tags: TaskTags, question: str | None) -> None:
    audio, text = tags.audio_language, tags.text_language
    if tags.start == "transcript" and audio == UNKNOWN:
        raise ValueError(f"{audio!r} is not an audio language of the task {tags.task!r}")
    if question is not None and (not question.strip() or "<|" in question or "|>" in question):
        raise ValueError(f"the question {question!r} is empty or holds marks of a tag")
    if tags.task == "transcribe" and text != audio and (audio, text) != ("zh", "zh_tr"):
        raise ValueError(f"a transcript of {audio} in {text} is a translation")
    if tags.task == "translate" and text == audio:
        raise ValueError(f"a translation of {audio} into {text} is a transcript")


def names_of(prompt_format: TagFormat) -> list[str]:
    """Every name that may stand in a tag of this prompt format's prompts."""
    spellings = _SPELLINGS[prompt_format]
    heads = {spellings.get(name, name) for name in (*_STARTS.values(), *get_args(TaskTag))}
    instructions = {name for task in TASKS.values() for name in task.tags.instruction}
    end = {_ANSWER} if prompt_format == "tags_released" else set()
    return sorted({*heads, *end, *get_args(Stamps), *LANGUAGES, UNKNOWN, *TEXT_LANGUAGES, *instructions})


def _tag(name: str) -> str:
    return f"<|{name}|>"

"""Qwen-Audio's hierarchical tags (arXiv:2311.07919, section 3.2), written and strictly read in two formats.

The order is transcription tag, audio language, task, text language, timestamps, output instruction.
`tags_paper` spells them as the paper does, where a question follows the tag <|question-answer|>;
`tags_released` as the released tokenizer and evaluation do: <|startoftranscript|> without an s, <|keyword|>
for the paper's <|analysis|>, and a question between <|question|> and <|answer|>, with which the prompt ends.
(Where such a task has an output instruction, the rest of the order follows: ours, the release shows none.)
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple, TypeVar

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

T = TypeVar("T", bound=str)


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


def parse(text: str, prompt_format: TagFormat) -> Tags:
    """Read what `render` writes, and nothing else.

    Raises:
        BadTags: naming the place and what may stand there.
    """
    read = _Reader(text)
    start = read.one_of(_STARTS[prompt_format], "the transcription tag")
    audio_language = read.one_of(_AUDIO_LANGUAGES, "the audio language")
    task = read.one_of(_TASKS[prompt_format], "the task")
    question = read.words() if task == "question-answer" else None
    if question is not None and prompt_format == "tags_released":
        read.one_of({_ANSWER: _ANSWER}, "the end of the question")
    text_language: str | None = None
    timestamps: Stamps | None = None
    instruction: tuple[str, ...] = ()
    if not (question is not None and prompt_format == "tags_released" and read.at_end()):
        text_language = read.one_of(_TEXT_LANGUAGES, "the text language")
        timestamps = read.one_of(_STAMPS, "the timestamps tag")
        instruction = read.rest()
    tags = Tags(start, audio_language, task, text_language, timestamps, instruction, question)
    check(tags, prompt_format)
    return tags


def check(tags: Tags, prompt_format: TagFormat) -> None:
    """Rules beyond the order.

    Raises:
        BadTags: naming the rule that is broken.
    """
    speech = tags.task in ("transcribe", "translate")
    if tags.start != ("transcript" if speech else "analysis"):
        raise BadTags(f"{tags.start!r} does not begin the task {tags.task!r}")
    if tags.audio_language not in _AUDIO_LANGUAGES or (speech and tags.audio_language == UNKNOWN):
        raise BadTags(f"{tags.audio_language!r} is no audio language of the task {tags.task!r}")
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


class _Reader:
    """Takes a prompt apart from left to right: tags, and the words of a question."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.count = 0

    def at_end(self) -> bool:
        return self.at == len(self.text)

    def one_of(self, allowed: dict[T, str], what: str) -> T:
        """The next tag, which must be spelled like one of `allowed`'s values."""
        found = TAG.match(self.text, self.at)
        self.count += 1
        meant = [key for key, name in allowed.items() if found and found[1] == name]
        if not meant or found is None:
            expected = ", ".join(map(_tag, list(allowed.values())[:8]))
            here = self.text[self.at : self.at + 30] or "the end"
            raise BadTags(f"tag {self.count} is {what}: one of {expected}; found {here!r} in {self.text!r}")
        self.at = found.end()
        return meant[0]

    def words(self) -> str:
        """Everything up to the next tag."""
        found = TAG.search(self.text, self.at)
        end = found.start() if found else len(self.text)
        words, self.at = self.text[self.at : end], end
        return words

    def rest(self) -> tuple[str, ...]:
        """All remaining tags."""
        names = []
        while found := TAG.match(self.text, self.at):
            names.append(found[1])
            self.at = found.end()
        if not self.at_end():
            raise BadTags(f"text after the tags: {self.text[self.at : self.at + 30]!r} in {self.text!r}")
        return tuple(names)

"""The pre-training tasks: `tasks.yaml`, read and checked. `prompts` puts them to a model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, NamedTuple, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from preference_data.prompts.languages import LANGUAGES, UNKNOWN

Start = Literal["transcript", "analysis"]
TaskTag = Literal["transcribe", "translate", "caption", "analysis", "question-answer"]
"""Qwen-Audio's five tasks (arXiv:2311.07919, section 3.2)."""
Stamps = Literal["timestamps", "notimestamps"]


class TaskTags(NamedTuple):
    """A task in Qwen-Audio's order. Languages are those of examples that do not say theirs."""

    start: Start
    audio_language: str
    task: TaskTag
    text_language: str
    timestamps: Stamps
    instruction: tuple[str, ...]


class Task(BaseModel):
    """One task of `tasks.yaml`, whose head explains the keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    family: Literal["speech", "sound", "music", "any"]
    sentence: str = Field(min_length=1)
    tags: TaskTags
    stamps: Literal["words", "spans"] | None = None
    clips: int | None = Field(None, ge=1)
    answer_tags: tuple[str, ...] = ()
    asks_language: bool = False

    @model_validator(mode="after")
    def _hangs_together(self) -> Self:
        for code in (self.tags.audio_language, self.tags.text_language):
            if code not in (*LANGUAGES, UNKNOWN):
                raise ValueError(f"tags: {code!r} is not a language; known: {', '.join(LANGUAGES)}")
        if self.tags.start != ("transcript" if self.tags.task in ("transcribe", "translate") else "analysis"):
            raise ValueError(f"tags: {self.tags.start!r} does not begin the task {self.tags.task!r}")
        if (self.tags.task == "question-answer") != ("{question}" in self.sentence):
            raise ValueError("a task that answers a question has {question} in its sentence, and no other")
        if (self.stamps is None) != (self.tags.timestamps == "notimestamps"):
            raise ValueError("stamps goes with the tag timestamps")
        return self

    @property
    def asks(self) -> bool:
        """Whether an example needs a question."""
        return self.tags.task == "question-answer"


class TaskFile(BaseModel):
    """`tasks.yaml`: its tasks and the tags they may use."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    instructions: dict[Literal["released", "ours"], tuple[str, ...]]
    answer_tags: dict[str, tuple[str, ...]]
    tasks: dict[str, Task]

    @model_validator(mode="after")
    def _tags_are_declared(self) -> Self:
        declared = {name for names in self.instructions.values() for name in names}
        for name, task in self.tasks.items():
            if unknown := sorted({*task.tags.instruction} - declared):
                raise ValueError(f"tasks.{name}: {unknown[0]!r} is not among the instructions")
            if unknown := sorted({*task.answer_tags} - set(self.answer_tags)):
                raise ValueError(f"tasks.{name}: {unknown[0]!r} is not among the answer_tags")
        return self


_FILE = TaskFile.model_validate(yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text("utf-8")))

TASKS: dict[str, Task] = _FILE.tasks


def task_named(name: str) -> Task:
    """The task of this name.

    Raises:
        ValueError: there is none.
    """
    if name not in TASKS:
        raise ValueError(f"unknown pre-training task {name!r}; known: {', '.join(sorted(TASKS))}")
    return TASKS[name]


def answer_tags(task: Task) -> tuple[str, ...]:
    """Names of the tags, time stamps apart, that a target of this task may hold."""
    return tuple(
        tag for group in task.answer_tags for name in _FILE.answer_tags[group] for tag in _each(name)
    )


def _each(name: str) -> list[str]:
    """`midi_pitch_{0..127}` -> midi_pitch_0, midi_pitch_1 ...; another name is itself."""
    match = re.fullmatch(r"(\w*)\{(\d+)\.\.(\d+)\}", name)
    if match is None:
        return [name]
    stem, first, last = match.groups()
    return [f"{stem}{number}" for number in range(int(first), int(last) + 1)]

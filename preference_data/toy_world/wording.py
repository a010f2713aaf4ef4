"""The parts of a phrasebook: slots, AIR-Bench task rules, pre-training targets."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Kind = Literal["closed", "one_word", "check", "absent", "describe"]
"""The form that a question asks for: a sentence, one word, yes or no, an abstention, a description."""

AirBenchTask = Literal[
    "speech_QA",
    "speech_dialogue_QA",
    "sound_QA",
    "sound_generation_QA",
    "music_QA",
    "music_generation_analysis_QA",
    "speech_and_sound_QA",
    "speech_and_music_QA",
]
"""The tasks of AIR-Bench chat (arXiv:2402.07729); its tables group results by them."""


def slots_of(template: str) -> list[str]:
    """The names in a template's braces, in order.

    Raises:
        ValueError: there are braces around something else.
    """
    if set(re.sub(r"\{\w+\}", "", template)) & set("{}"):
        raise ValueError(f"{template!r}: braces may hold the name of a slot and nothing else")
    return re.findall(r"\{(\w+)\}", template)


class Slot(BaseModel):
    """One thing that can be true of a clip."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    values: tuple[str, ...] = Field(min_length=2)
    questions: tuple[str, ...] = Field(min_length=1)
    sentence: str
    absent: str | None = None
    """The answer when the clip has no such thing; slots sharing this sentence share its truth."""
    present_if: dict[str, str] = {}
    """Facts under which the thing is there although this slot has no value (music as a background)."""
    sequence: bool = False
    """The value is one or more of `values`, separated by spaces."""
    denial: str | None = None
    """Makes it a yes/no slot: `sentence` affirms and `denial` denies one value; facts hold a list."""

    def canonical(self, text: str) -> str:
        """Lower-case text that matches `pattern`, in the spelling of `values`."""
        spelled = {value.lower(): value for value in self.values}
        return re.sub(self._value_pattern, lambda match: spelled[match[0]], text)

    @property
    def pattern(self) -> str:
        """A regular expression for a value in lower-case text."""
        value = self._value_pattern
        return rf"(?:{value})(?: (?:{value}))*" if self.sequence else value

    @property
    def _value_pattern(self) -> str:
        longest_first = sorted((value.lower() for value in self.values), key=len, reverse=True)
        return "|".join(map(re.escape, longest_first))

    def check(self, name: str) -> None:
        """Refuse a slot whose sentences could not be read back.

        Raises:
            ValueError: naming the slot and what is wrong.
        """
        templates = [self.sentence, *([self.denial, *self.questions] if self.denial else [])]
        for text in templates:
            if slots_of(text) != [name]:
                raise ValueError(f"slots.{name}: {text!r} must hold {{{name}}} once and no other slot")
        spellings = [value.lower() for value in self.values]
        if doubled := [value for value in spellings if spellings.count(value) > 1]:
            raise ValueError(f"slots.{name}: the value {doubled[0]!r} comes twice")


class TaskRule(BaseModel):
    """Clips whose facts contain `when` belong to this AIR-Bench task; the first rule that fits wins."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: AirBenchTask
    when: dict[str, str | None] = {}


class Target(BaseModel):
    """A pre-training target: clips that have every slot in `text` yield it under `task`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: str
    """A key of `tasks.TASKS`."""
    text: str

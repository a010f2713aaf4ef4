"""The block `reward:`: what a completion is worth, in parts that are weighed, added up and logged each."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator

from align.recipe.config.base import Config, Conflict, RewardModelRef
from align.recipe.config.evaluation import JudgeModel


class FactsReward(Config):
    """Marks by the phrasebook, which knows what is true of every clip; 0 leaves a part out."""

    asked: float = Field(1.0, ge=0)
    """The fact that the prompt asks for is right, whatever else is claimed."""
    clean: float = Field(0.5, ge=0)
    """It is, and nothing false is claimed."""
    form: float = Field(0.5, ge=0)
    """The form is the one asked for: a word, a sentence, an abstention."""

    def conflicts(self) -> Iterator[Conflict]:
        """Something counts."""
        if not (self.asked or self.clean or self.form):
            yield Conflict("asked", "asked, clean and form are all 0: nothing would be rewarded")


class PartReward(Config):
    """A part of its own."""

    weight: float = Field(1.0, gt=0)


class TranscriptReward(PartReward):
    """1 minus the error rate against the prompt's reference: words, or characters of zh and yue."""

    language: Literal["en", "zh", "yue", "other"] = "other"
    """Decides how texts are normalised."""


class ChoiceReward(PartReward):
    """1 for the right one of a prompt's choices; letters and whole texts of choices are read."""


class FormatReward(PartReward):
    """1 for a completion of a form: a known one, or what a regular expression matches as a whole."""

    form: Literal["one_word", "sentence", "think_answer"] | None = None
    pattern: str | None = None

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
        return pattern

    def conflicts(self) -> Iterator[Conflict]:
        """One of them says what is meant."""
        if (self.form is None) == (self.pattern is None):
            yield Conflict("form", "give form, or pattern")


class LengthReward(PartReward):
    """0 up to `max_chars` characters, then falling to minus the weight at twice as many."""

    max_chars: int = Field(ge=1)


class JudgeReward(PartReward, JudgeModel):
    """A judge model's score beside the reference, in both orders, as 0 to 1."""


class ModelReward(PartReward):
    """A reward model's scalar. Its zero and scale are its own, so `weight` decides beside other parts."""

    stage: RewardModelRef


def _kind_of_model(value: Any) -> str:
    """Whether the stage is named alone, or with a weight."""
    return "[RewardModelRef]" if isinstance(value, str) else "[ModelReward]"


class RewardConfig(Config):
    """At least one of these."""

    facts: FactsReward | None = None
    wer: TranscriptReward | None = None
    choice: ChoiceReward | None = None
    format: FormatReward | None = None
    length: LengthReward | None = None
    judge: JudgeReward | None = None
    model: (
        Annotated[
            Annotated[RewardModelRef, Tag("[RewardModelRef]")] | Annotated[ModelReward, Tag("[ModelReward]")],
            Discriminator(_kind_of_model),
        ]
        | None
    ) = None
    """An earlier stage that has trained a reward model: 5_reward, or {stage: 5_reward, weight: 2}."""

    def conflicts(self) -> Iterator[Conflict]:
        """Something is rewarded."""
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if given in ([], ["length"]):
            message = (
                "nothing is rewarded: give facts, wer, choice, format, judge or model, such as facts: {}"
            )
            hint = " (length alone teaches to say nothing)" if given else ""
            yield Conflict("length" if given else "facts", message + hint)

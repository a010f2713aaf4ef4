"""Where prompts come from: a corpus' own, questions about clips, pre-training targets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from align.recipe.config.base import Config, Conflict
from preference_data.prompts.prompts import PromptFormat
from preference_data.prompts.tasks import task_named
from preference_data.toy_world.wording import Kind


class Questions(Config):
    """Prompts that the phrasebook asks about clips whose facts are known."""

    splits: list[Literal["preference", "train"]] = Field(["preference"], min_length=1)
    per_clip: int = Field(1, ge=1)
    """Different questions about each clip; fewer where less can be asked."""
    kinds: list[Kind] | None = Field(None, min_length=1)
    """Of those questions only these kinds; all by default."""


class Targets(Config):
    """Pre-training prompts, as plain text without a chat; their targets are the references."""

    tasks: list[str] = Field(min_length=1)
    """Of `preference_data/prompts/tasks.yaml`, such as transcribe."""
    prompt_format: PromptFormat = "sentences"

    def conflicts(self) -> Iterator[Conflict]:
        """Tasks that no reward can be given for, and those that do not exist."""
        for name in self.tasks:
            try:
                stamps = task_named(name).stamps
            except ValueError as error:
                yield Conflict("tasks", str(error))
            else:
                if stamps:
                    yield Conflict(
                        "tasks", f"targets of {name} are stamped with times, which no reward reads"
                    )


def _kind_of_prompts(value: Any) -> str:
    """Which way of saying where prompts come from is meant."""
    if isinstance(value, str):
        return "[corpus]"
    keys = value if isinstance(value, dict) else getattr(type(value), "model_fields", ())
    return "[Targets]" if "tasks" in keys else "[Questions]"


PromptSource = Annotated[
    Annotated[Literal["corpus"], Tag("[corpus]")]
    | Annotated[Questions, Tag("[Questions]")]
    | Annotated[Targets, Tag("[Targets]")],
    Discriminator(_kind_of_prompts),
]

"""What all stages' files have in common: types of references, and the keys every stage has."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

OutputKind = Literal[
    "corpus",
    "policy",
    "completions",
    "annotations",
    "pairs",
    "evaluation",
    "verdict",
    "alias",
    "checkpoint",
]
"""What a stage leaves. No stage leaves a `checkpoint`: that is someone else's model."""


class Needs(NamedTuple):
    """Marks a field that names an earlier stage producing `kind`."""

    kind: OutputKind


class Outside:
    """Marks a field that names folders or files outside the run, whose contents decide what is made."""


OutsideFolder = Annotated[str, Outside()]
CorpusRef = Annotated[str, Needs("corpus")]
PolicyRef = Annotated[str, Needs("policy")]
CompletionsRef = Annotated[str, Needs("completions")]
AnnotationsRef = Annotated[str, Needs("annotations")]
PairsRef = Annotated[str, Needs("pairs")]
EvaluationRef = Annotated[str, Needs("evaluation")]
VerdictRef = Annotated[str, Needs("verdict")]
CheckpointRef = Annotated[str, Needs("checkpoint")]


class Config(BaseModel):
    """Base of every block: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class StageConfig(Config):
    """Keys every stage has."""

    produces: ClassVar[OutputKind]

    stage: str
    seed: int = Field(0, ge=0)
    """Everything random in this stage follows from it."""

"""What all stages' files have in common: types of references, marks on keys, and what a stage declares.

A stage declares here everything that others need to know about it: what it produces, which TRL config its
`trl:` mapping is passed on to, how much work it is. Nobody else keeps a table of stages.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

OutputKind = Literal[
    "corpus",
    "policy",
    "reward_model",
    "completions",
    "annotations",
    "scores",
    "pairs",
    "labels",
    "evaluation",
    "verdict",
    "alias",
    "checkpoint",
]
"""What a stage leaves. No stage leaves a `checkpoint`: that is someone else's model."""
EngineName = Literal["transformers", "vllm"]
"""What completes prompts: this process, or a server in an environment of its own (`align engine install`)."""


Mark = TypeVar("Mark")


class Needs(NamedTuple):
    """Marks a field that names an earlier stage producing `kind`."""

    kind: OutputKind


class Outside:
    """Marks a field that names folders or files outside the run, whose contents decide what is made."""


class NoEffect(NamedTuple):
    """Marks a key that decides where, how fast or how closely watched a stage runs, but not its result.

    Every other key counts: changing it makes the stage's earlier work outdated.
    """

    unless: str | None = None
    """The key does change the result where this key of the stage is set."""
    names: Collection[str] | None = None
    """Of a mapping, the names that have no effect; None is for all of it."""


OutsideFolder = Annotated[str, Outside()]
CorpusRef = Annotated[str, Needs("corpus")]
PolicyRef = Annotated[str, Needs("policy")]
RewardModelRef = Annotated[str, Needs("reward_model")]
CompletionsRef = Annotated[str, Needs("completions")]
AnnotationsRef = Annotated[str, Needs("annotations")]
ScoresRef = Annotated[str, Needs("scores")]
LabelsRef = Annotated[str, Needs("labels")]
PairsRef = Annotated[str, Needs("pairs")]
EvaluationRef = Annotated[str, Needs("evaluation")]
VerdictRef = Annotated[str, Needs("verdict")]
CheckpointRef = Annotated[str, Needs("checkpoint")]


CONFLICTS = "conflicts"
"""Type of pydantic's error that carries them."""


class Conflict(NamedTuple):
    """What `key` says does not go with what others say."""

    key: str
    message: str


class Config(BaseModel):
    """Base of every block: frozen, unknown keys refused, no text taken for a number."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)

    renamed: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Keys and values of older recipes -> what they are called now, for the error that says so."""

    @field_validator("*")
    @classmethod
    def _can_be_counted(cls, value: Any) -> Any:
        if isinstance(value, int) and abs(value) > 2**53:
            raise ValueError(f"{value} is beyond what can be counted; the most is 2^53")
        return value

    def conflicts(self) -> Iterator[Conflict]:
        """Keys that are right alone and cannot be true together."""
        yield from ()

    @model_validator(mode="after")
    def _has_no_conflict(self) -> Self:
        if conflicts := list(self.conflicts()):
            text = "; ".join(f"{conflict.key}: {conflict.message}" for conflict in conflicts)
            raise PydanticCustomError(CONFLICTS, "{text}", {"text": text, "conflicts": conflicts})
        return self


class StageConfig(Config):
    """Keys every stage has, and what each kind of stage declares about itself."""

    produces: ClassVar[OutputKind]
    epoch: ClassVar[int] = 1
    """Raise it when the stage's code makes something else of the same keys: earlier work is outdated then.
    Changing a default needs it too, because only keys that differ from their defaults are compared."""
    trl_config: ClassVar[str | None] = None
    """TRL's config class whose names the stage's `trl:` mapping may use."""

    stage: str
    seed: int = Field(0, ge=0, lt=2**32)
    """Everything random in this stage follows from it."""

    @classmethod
    def kind(cls) -> str:
        """What `stage:` says of this stage; the module of `align.stages` that runs it is named the same."""
        return str(get_args(cls.model_fields["stage"].annotation)[0])

    @property
    def sequences_per_example(self) -> int:
        """Rows that the model sees for one training example."""
        return 1

    @property
    def has_facts(self) -> bool:
        """Whether it leaves a corpus that knows what is true of every clip."""
        return False

    def needs_facts(self) -> tuple[str, str] | None:
        """The key that asks for the facts of every clip and what to write instead, if one does."""
        return None

    def describe_work(self, clips: Mapping[str, int]) -> str:
        """How much work the stage is, given the clips per split as far as known; empty if it cannot say."""
        return ""


def servers_of(engine: EngineName, processes: int) -> str:
    """The servers that complete prompts, in words behind others; empty where there are none."""
    return "" if engine == "transformers" else f", {processes} vLLM server{'s' if processes > 1 else ''}"


def mark_of(info: FieldInfo, kind: type[Mark]) -> Mark | None:
    """A field's mark of this kind, also one inside its type."""
    marks = [*info.metadata, *parts(info.annotation)]
    return next((mark for mark in marks if isinstance(mark, kind)), None)


def parts(annotation: Any) -> list[Any]:
    """An annotation and everything it is made of."""
    return [annotation, *(part for inner in get_args(annotation) for part in parts(inner))]


def result_keys(config: BaseModel) -> dict[str, Any]:
    """The keys that decide what a stage makes, as far as they differ from their defaults."""
    keys: dict[str, Any] = {}
    for name, value in config.model_dump(mode="json", exclude_defaults=True).items():
        held = getattr(config, name)
        mark = mark_of(type(config).model_fields[name], NoEffect)
        if isinstance(held, BaseModel):
            value = result_keys(held)
        if mark and not (mark.unless and getattr(config, mark.unless, None)):
            if mark.names is None:
                continue
            value = {key: inner for key, inner in value.items() if key not in mark.names}
            if not value:
                continue
        keys[name] = value
    return keys

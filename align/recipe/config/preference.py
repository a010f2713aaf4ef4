"""Keys of the stages that collect preferences: sample, annotate, pairs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from align.recipe.config.base import (
    AnnotationsRef,
    CompletionsRef,
    Conflict,
    CorpusRef,
    NoEffect,
    OutputKind,
    PolicyRef,
    StageConfig,
)


class SampleConfig(StageConfig):
    """Several completions per prompt from the current policy."""

    produces: ClassVar[OutputKind] = "completions"
    stage: Literal["sample"]
    policy: PolicyRef
    corpus: CorpusRef
    completions_per_prompt: int = Field(4, ge=2)
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    max_new_tokens: int = Field(32, ge=1)
    batch_size: Annotated[int, NoEffect()] = Field(128, ge=1)
    workers: Annotated[int, NoEffect()] = Field(1, ge=1)
    """Processes, each with its own copy of the policy and, where there are any, a GPU of its own."""

    def describe_work(self, clips: Mapping[str, int]) -> str:
        """Completions, and the clips they are about."""
        per_prompt = f"{self.completions_per_prompt} completions per prompt"
        return f"{clips['preference']:,} clips, {per_prompt}" if clips else per_prompt


class AnnotateConfig(StageConfig):
    """Judge pairs of completions for factuality and behaviour, in Argilla."""

    produces: ClassVar[OutputKind] = "annotations"
    renamed: ClassVar[Mapping[str, str]] = {"repeats": "retests"}
    stage: Literal["annotate"]
    completions: CompletionsRef
    corpus: CorpusRef
    by: Literal["simulated", "people"] = "simulated"
    """`simulated`: annotators that know the facts answer over Argilla's API. `people`: in the browser."""
    server: str | None = None
    """Address of an Argilla that others run, its owner's key in ALIGN_ARGILLA_API_KEY; without it, an own
    one is started, with its data in `argilla/` in the run folder."""
    workspace: str = Field("audio", pattern=r"^[a-z0-9][a-z0-9_-]{0,60}$")
    """Annotators see the datasets and clips of their workspaces only."""
    annotators: int = Field(2, ge=1)
    """How many judge what everyone judges; an own server gets that many accounts."""
    overlap: float = Field(0.3, ge=0, le=1)
    """Share of comparisons judged by every annotator; the rest by one."""
    retests: float = Field(0.1, ge=0, le=0.5)
    """Comparisons shown once more with their sides swapped, as a share of all: are they judged the same?"""
    gold: float = Field(0.05, ge=0, le=0.5)
    """Comparisons added whose better side is known, as a share of all: do annotators listen?"""
    enough: Annotated[float, NoEffect()] = Field(1.0, gt=0, le=1)
    """People: go on when this share of the judgements is there. It reopens nothing that is finished."""
    min_heard: float = Field(0.8, ge=0, le=1)
    """Judgements of annotators who had played less of the clip than this do not count: people may answer
    before the last second, but not without listening."""
    error_rate: float = Field(0.05, ge=0, le=1)
    """Simulated: how often an answer to a question is random."""
    comparisons_per_prompt: int = Field(3, ge=1)

    def needs_facts(self) -> tuple[str, str] | None:
        """Simulated annotators judge by the facts."""
        return ("by", "by: people") if self.by == "simulated" else None

    def conflicts(self) -> Iterator[Conflict]:
        """Simulated annotators have accounts on an own server alone."""
        if self.by == "simulated" and self.server:
            message = "simulated annotators work on an own server only: remove it, or say by: people"
            yield Conflict("server", message)


class PairsConfig(StageConfig):
    """Judgements to preference pairs, one per comparison and axis that has a clear preference."""

    produces: ClassVar[OutputKind] = "pairs"
    stage: Literal["pairs"]
    completions: CompletionsRef
    annotations: AnnotationsRef
    min_agreement: float = Field(0.75, gt=0.5, le=1)
    """A comparison yields a pair where at least this share of its annotators prefer the same side."""
    min_alpha: float | None = Field(None, ge=-1, le=1)
    """Refuse judgements whose Krippendorff's alpha is lower on either axis: chance is 0, agreement 1."""

    @model_validator(mode="before")
    @classmethod
    def _min_heard_has_moved(cls, data: Any) -> Any:
        if isinstance(data, dict) and "min_heard" in data:
            raise ValueError("min_heard is a key of the annotate stage now, for its report and these pairs")
        return data

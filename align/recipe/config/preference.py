"""Keys of the stages that collect preferences: sample, annotate, score, pairs, labels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from align.recipe.config.base import (
    AnnotationsRef,
    CompletionsRef,
    Conflict,
    CorpusRef,
    EngineName,
    NoEffect,
    OutputKind,
    OutsideFolder,
    PolicyRef,
    ScoresRef,
    StageConfig,
    servers_of,
)
from align.recipe.config.evaluation import ChatModel
from align.recipe.config.rewards import RewardConfig
from preference_data.preferences.selection import Rule
from preference_data.schema import MOST_COMPARED


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
    engine: EngineName = "transformers"
    """`vllm` draws by other random numbers. It encodes clips itself and reads no kept outputs of a tower."""
    batch_size: Annotated[int, NoEffect()] = Field(128, ge=1)
    workers: Annotated[int, NoEffect()] = Field(1, ge=1)
    """Processes, each with its own copy of the policy and, where there are any, a GPU of its own."""

    def describe_work(self, clips: Mapping[str, int]) -> str:
        """Completions, and the clips they are about."""
        per_prompt = f"{self.completions_per_prompt} completions per prompt"
        per_prompt += servers_of(self.engine, self.workers)
        return f"{clips['preference']:,} clips, {per_prompt}" if clips else per_prompt


class ComparisonJudge(ChatModel):
    """A language model that ranks the completions of a comparison on both axes, in both orders."""

    hears: bool
    """It takes audio (`input_audio` of OpenAI's chat format) and hears the clips. If not, it reads the
    prompt's description and reference in their place, which every prompt must have."""

    def conflicts(self) -> Iterator[Conflict]:
        """A model that is loaded here reads text alone."""
        yield from super().conflicts()
        if self.hears and self.url is None:
            yield Conflict("hears", "a judge without a url reads text alone: give a url, or hears: false")


class AnnotateConfig(StageConfig):
    """Judge completions beside each other for factuality and behaviour, in Argilla."""

    produces: ClassVar[OutputKind] = "annotations"
    renamed: ClassVar[Mapping[str, str]] = {"repeats": "retests"}
    stage: Literal["annotate"]
    completions: CompletionsRef
    corpus: CorpusRef
    by: Literal["simulated", "people", "model"] = "simulated"
    """`simulated`: annotators that know the facts answer over Argilla's API. `people`: in the browser.
    `model`: the `judge` alone."""
    judge: ComparisonJudge | None = None
    """Judges all comparisons. Its judgements are used as far as they agree with people's, see
    `min_model_agreement` of the pairs stage."""
    people_share: float = Field(1.0, gt=0, le=1)
    """Share of the comparisons that people (or simulated annotators) judge beside the judge; which ones is
    decided by lot."""
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
    """Comparisons shown once more in reverse order, as a share of all: are they judged the same?"""
    gold: float = Field(0.05, ge=0, le=0.5)
    """Comparisons added whose right order is known, as a share of all: do annotators listen? It is known by
    the facts of a clip, the choices of a question, or an adjudicator's decision."""
    enough: Annotated[float, NoEffect()] = Field(1.0, gt=0, le=1)
    """People: go on when this share of the judgements is there. It reopens nothing that is finished."""
    min_heard: float = Field(0.8, ge=0, le=1)
    """Judgements of annotators who had played less of the clip than this do not count: people may answer
    before the last second, but not without listening."""
    error_rate: float = Field(0.05, ge=0, le=1)
    """Simulated: how often an answer to a question is random."""
    comparisons_per_prompt: int = Field(3, ge=1)
    max_comparisons: int | None = Field(None, ge=1)
    """How many of all prompts' comparisons are asked about, without retests and gold; by default all."""
    select: Rule = "random"
    """Which ones. `disagreement`: the policy finds likelier what the reward finds much worse; `uncertainty`:
    the reward tells them hardly apart. See `preference_data/preferences/selection.py`."""
    random_share: float = Field(0.2, ge=0, le=1)
    """Of these, drawn by lot from all, also near-ties: only what is measured on them holds for all."""
    near_tie: float = Field(0.0, ge=0)
    """Comparisons whose rewards differ by no more than this are only selected by lot."""
    scores: ScoresRef | None = None
    """The score stage with the rewards that `select` goes by."""
    completions_per_comparison: int = Field(2, ge=2, le=MOST_COMPARED)
    """2: which is better? More: after one listen, all are ranked."""
    snapshot: OutsideFolder | None = None
    """Folder of earlier judgements, e.g. `runs/a/snapshots/0003-5f2c...`: of completions that are here again,
    they count, and nobody is asked again. This run's own people always count."""
    adjudicator: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,99}$")
    """Of people: who decides where annotators disagree, and approves what they typed, in the same browser
    pages; the run waits for it. None: disagreements make no pair."""

    of_rewards: ClassVar[tuple[str, ...]] = ("random_share", "near_tie", "scores")
    """Keys that have no effect on what is selected by lot alone."""

    def describe_work(self, clips: Mapping[str, int]) -> str:
        """Comparisons, and who judges them."""
        per_prompt = f"up to {self.comparisons_per_prompt} comparisons per prompt"
        most = "" if self.max_comparisons is None else f", {self.max_comparisons:,} of all"
        how = "" if self.select == "random" else f" by {self.select}, {self.random_share:.0%} by lot"
        work = f"{per_prompt}{most}{how}"
        if self.judge:
            work += f"; all judged by {self.judge.model} in both orders"
        if self.by == "model":
            return work
        share = "" if self.people_share == 1 else f"{self.people_share:.0%} by people, "
        return f"{work}; {share}{self.overlap:.0%} judged by all {self.annotators}"

    def needs_facts(self) -> tuple[str, str] | None:
        """Simulated annotators judge by the facts."""
        return ("by", "by: people") if self.by == "simulated" else None

    def conflicts(self) -> Iterator[Conflict]:
        """Simulated annotators have accounts on an own server alone; what is named is there."""
        yield from self._conflicts_of_judge()
        if self.by == "simulated" and self.server:
            message = "simulated annotators work on an own server only: remove it, or say by: people"
            yield Conflict("server", message)
        if self.adjudicator and self.by != "people":
            yield Conflict("adjudicator", f"has no effect with by: {self.by}; remove it, or say by: people")
        if self.snapshot and not (Path(self.snapshot).expanduser() / "judgements.jsonl").is_file():
            message = (
                "has no judgements.jsonl: name a folder in RUN/snapshots (align annotate pull makes one)"
            )
            yield Conflict("snapshot", message)
        yield from self._conflicts_of_selection()

    def _conflicts_of_selection(self) -> Iterator[Conflict]:
        if self.select == "random":
            for key in self.model_fields_set.intersection(self.of_rewards):
                yield Conflict(key, "has no effect with select: random; remove it, or say by what to select")
            return
        if self.scores is None:
            yield Conflict("scores", f"required with select: {self.select}: a score stage that comes before")
        if self.max_comparisons is None:
            yield Conflict(
                "max_comparisons", f"required with select: {self.select}: without it all are asked"
            )

    def _conflicts_of_judge(self) -> Iterator[Conflict]:
        if self.by == "model":
            if self.judge is None:
                yield Conflict("judge", "by: model needs judge: {model: ..., url: ..., hears: ...}")
            for key in sorted({"people_share", "server"} & self.model_fields_set):
                yield Conflict(key, "has no effect with by: model; remove it, or say by: people")
        elif self.people_share < 1 and self.judge is None:
            message = (
                f"{self.people_share:g} leaves comparisons that nobody judges: add a judge, or remove it"
            )
            yield Conflict("people_share", message)


class ScoreConfig(StageConfig):
    """What every completion is worth to a reward: rules, known facts, a judge model."""

    produces: ClassVar[OutputKind] = "scores"
    stage: Literal["score"]
    completions: CompletionsRef
    corpus: CorpusRef
    reward: RewardConfig

    @model_validator(mode="before")
    @classmethod
    def _draws_no_completions(cls, data: Any) -> Any:
        if isinstance(data, dict) and "engine" in data:
            raise ValueError(
                "engine has no effect: score draws no completions, the sample stage has drawn them and takes "
                "engine: vllm. A judge behind a server is reward: {judge: {model: ..., url: ...}}"
            )
        return data

    def needs_facts(self) -> tuple[str, str] | None:
        """One of the rewards does."""
        return ("reward", "reward: {judge: ...}") if self.reward.facts else None


class FromJudgementsOrScores(StageConfig):
    """Keys of stages that read what people, or a reward, say about completions."""

    completions: CompletionsRef
    annotations: AnnotationsRef | None = None
    scores: ScoresRef | None = None
    """In place of annotations: rewards of a score stage."""

    exclude: list[str] = []
    """Of judgements: annotators whose judgements do not count, by name."""
    min_gold: float | None = Field(None, gt=0, le=1)
    """Of judgements: leave out an annotator whose accuracy on gold is below it for certain: the upper end of
    its 95 % interval lies below. With little gold nobody is."""
    annotator_weights: Literal["equal", "dawid_skene"] = "equal"
    """Of judgements: what a vote weighs. `dawid_skene`: 0 if its annotator prefers a completion no more often
    where it is better than where it is worse, 1 if they always know; learnt of comparisons that several have
    judged, and of gold (`preference_data/preferences/annotator_weights.py`)."""
    min_model_agreement: float = Field(0.6, ge=0, le=1)
    """Of judgements: a model's of an axis are used where the 95 % interval of its agreement with people, or
    with gold, lies at this or above (`preference_data/preferences/model_agreement.py`). Chance is 0.5 at
    most, for a tie is no agreement; 0 asks for nothing."""

    of_annotations: ClassVar[tuple[str, ...]] = (
        "exclude",
        "min_gold",
        "annotator_weights",
        "min_model_agreement",
    )
    of_scores: ClassVar[tuple[str, ...]] = ()
    """Keys that make sense with one of the two only."""

    def conflicts(self) -> Iterator[Conflict]:
        """A stage reads one of the two; keys of the other have no effect."""
        if (self.annotations is None) == (self.scores is None):
            yield Conflict("scores", "give annotations, or scores: a stage reads one of them")
        given, others = ("scores", self.of_annotations) if self.scores else ("annotations", self.of_scores)
        for key in sorted(self.model_fields_set.intersection(others)):
            yield Conflict(key, f"has no effect with {given}; remove it")


class PairsConfig(FromJudgementsOrScores):
    """Judgements to preference pairs: two completions each, with a clear preference on an axis; or scores."""

    produces: ClassVar[OutputKind] = "pairs"
    of_annotations: ClassVar[tuple[str, ...]] = (
        *FromJudgementsOrScores.of_annotations,
        *("min_agreement", "min_alpha", "correction_weight"),
    )
    of_scores: ClassVar[tuple[str, ...]] = ("opponents", "margin")
    stage: Literal["pairs"]
    min_agreement: float = Field(0.75, gt=0.5, le=1)
    """Two completions are a pair where at least this share of the votes prefer the same one."""
    min_alpha: float | None = Field(None, ge=-1, le=1)
    """Refuse judgements unless the 95 % interval of Krippendorff's alpha lies at this or above on both axes:
    chance is 0, agreement 1; of few comparisons nothing is certain. It is of the judgements that count."""
    correction_weight: float = Field(0.0, ge=0, le=1)
    """Evidence of a completion that an annotator typed and nobody else has judged. Approved by a second
    person it has that of their votes; rejected, or with 0, it makes no pair."""
    opponents: Literal["worst", "random", "all"] = "worst"
    """Of scores: a prompt's best completion is chosen over its worst one, or over one drawn from all that are
    worse; `all`: every completion over every worse one."""
    margin: float = Field(0.0, ge=0)
    """Of scores: the two rewards must differ by more; equal ones never make a pair."""

    @model_validator(mode="before")
    @classmethod
    def _min_heard_has_moved(cls, data: Any) -> Any:
        if isinstance(data, dict) and "min_heard" in data:
            raise ValueError("min_heard is a key of the annotate stage now, for its report and these pairs")
        return data


class LabelsConfig(FromJudgementsOrScores):
    """Judgements, or scores, to labels: completions that are good or bad on their own, for KTO."""

    produces: ClassVar[OutputKind] = "labels"
    of_annotations: ClassVar[tuple[str, ...]] = (
        *FromJudgementsOrScores.of_annotations,
        *("axis", "min_agreement"),
    )
    of_scores: ClassVar[tuple[str, ...]] = ("good_from", "bad_to")
    stage: Literal["labels"]
    axis: Literal["factuality", "behaviour"] = "factuality"
    """Of judgements: the question that decides. The completion in first place is good, the one in last place
    bad, as are all of "all bad"; thumbs outweigh places."""
    min_agreement: float = Field(0.75, gt=0.5, le=1)
    """Of judgements: at least this share of what was said about a completion must agree."""
    good_from: float | None = None
    """Of scores: a reward of this much or more is good."""
    bad_to: float | None = None
    """Of scores: a reward of this much or less is bad; by default, one below `good_from`."""

    def conflicts(self) -> Iterator[Conflict]:
        """Thresholds are there with scores, and in order."""
        yield from super().conflicts()
        if self.scores and self.good_from is None:
            yield Conflict("good_from", "required with scores: the least reward of a good completion")
        if self.bad_to is not None and self.good_from is not None and self.bad_to >= self.good_from:
            yield Conflict("bad_to", f"{self.bad_to:g} must lie below good_from {self.good_from:g}")


class RoundsConfig(StageConfig):
    """On-policy DPO in rounds: sample, score, pairs and dpo again and again, each from the last policy.

    See `align/recipe/rounds.py`, which puts the stages in its place.
    """

    produces: ClassVar[OutputKind] = "policy"
    stage: Literal["rounds"]
    rounds: int = Field(2, ge=1, le=100)
    policy: PolicyRef
    """The first round's."""
    corpus: CorpusRef
    sample: dict[str, Any] = {}
    """Keys of the sample stages; those of the others likewise. The seed rises by 1 from round to round."""
    score: dict[str, Any]
    pairs: dict[str, Any] = {}
    dpo: dict[str, Any]

    def conflicts(self) -> Iterator[Conflict]:
        """Keys that follow from the round."""
        given = ("stage", "seed", "policy", "corpus", "completions", "annotations", "scores")
        for kind in ("sample", "score", "pairs", "dpo"):
            keys = getattr(self, kind)
            for key in keys:
                if key in given or (kind, key) == ("dpo", "pairs"):
                    yield Conflict(kind, f"{key} is set by the round; remove it")

"""Keys of the stages that decide on a policy: evaluate, gate, promote."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from align.recipe.config.base import (
    AnnotationsRef,
    Config,
    Conflict,
    CorpusRef,
    EngineName,
    EvaluationRef,
    NoEffect,
    OutputKind,
    OutsideFolder,
    PolicyRef,
    StageConfig,
    VerdictRef,
    servers_of,
)
from preference_data.prompts.prompts import PromptFormat


class ChatModel(Config):
    """A language model that judges, behind a server or here."""

    model: str = Field(min_length=1)
    """As its server names it; without a url, the folder of a model that transformers loads here."""
    url: str | None = None
    """An OpenAI-compatible API, up to and with /v1; its key is read from ALIGN_JUDGE_API_KEY, or from
    OPENAI_API_KEY for openai.com alone."""
    parameters: dict[str, Any] = {}
    """Changes to `temperature: 0, max_tokens: 1024`, sent with every request: `reasoning_effort: low` adds a
    parameter, `temperature: null` leaves one out. A local judge takes `max_tokens` alone."""
    concurrency: Annotated[int, NoEffect()] = Field(8, ge=1)

    def conflicts(self) -> Iterator[Conflict]:
        """Parameters that are not the recipe's to send, or that a local judge does not take."""
        for name in sorted({"model", "messages", "stream", "n"} & self.parameters.keys()):
            yield Conflict("parameters", f"{name} is set by us and cannot be changed")
        greedy = {"temperature": 0, "max_tokens": self.parameters.get("max_tokens")}
        if self.url is None and {**greedy, **self.parameters} != greedy:
            yield Conflict("parameters", "a judge without a url is greedy and takes max_tokens alone")


class JudgeModel(ChatModel):
    """A language model that rates answers against the reference, 1 to 10, in both orders."""

    protocol: Literal["strict", "official"] = "strict"
    """`official` asks and reads as AIR-Bench's scripts do; `strict` cannot be talked round as easily."""
    canary_items: int = Field(20, ge=0)
    """Questions on which known tricks are tried: can an answer sway the judge?"""


class EvaluateConfig(StageConfig):
    """AIR-Bench chat questions and recognition for several policies, with controls."""

    produces: ClassVar[OutputKind] = "evaluation"
    epoch: ClassVar[int] = 3
    renamed: ClassVar[Mapping[str, str]] = {"dialect": "prompt_format"}
    stage: Literal["evaluate"]
    corpus: CorpusRef
    split: Literal["dev", "test"] = "test"
    air_bench: OutsideFolder | None = None
    """Folder of a downloaded AIR-Bench (it holds Chat/), asked instead of the corpus' own questions; clips
    that cannot be used are counted as missing. Of longer clips the model hears the beginning; they are
    counted too."""
    policies: list[PolicyRef] = Field(min_length=1)
    """Every policy to score."""
    before: PolicyRef
    after: PolicyRef
    judge: Literal["facts"] | JudgeModel = "facts"
    """`facts`: the demo's, which knows what is true of every clip."""
    benchmarks: dict[
        OutsideFolder,
        Literal[
            "asr_en",
            "asr_zh",
            "asr_yue",
            "asr_other",
            "translation",
            "emotion",
            "vocal_sound",
            "scene",
            "aqa",
            "choice",
            "mmau",
            "mmar",
            "mmsu",
            "mmau_pro",
            "voicebench",
            "advbench",
            "big_bench_audio",
            "srwt",
        ],
    ] = {}
    """The reports' other benchmarks: files of rows {audio, prompt, gt, source} as the Qwen2-Audio evaluation
    reads them, audio relative to the file, and how each is scored. Results stand per source beside the
    corpus' own recognition, and the gate's `recognition_margins` and `recognition_gains` may name them.
    `choice`: multiple-choice questions as `align data import` reads (with `--format choice`), each file a
    source; `mmau` (test-mini, v05.15.25), `mmar`, `mmsu` and `mmau_pro` in their publishers' layouts;
    `voicebench` (its openbookqa, mmsu, bbh), `advbench` (VoiceBench's, to be refused) and `big_bench_audio`
    have their questions in the clips. Multiple choice is put to every policy twice more, with silence and
    with another clip: accuracy above silence is what was heard."""
    annotations: AnnotationsRef | None = None
    """Comparisons that annotators made: the judge scores the same answers, and the evaluation reports how
    often it prefers what most of them prefer."""
    annotated_pairs: int = Field(200, ge=1)
    """How many of those comparisons, drawn by chance: a judge model rates two answers for each."""
    prompt_format: PromptFormat = "sentences"
    """Format of the recognition prompts."""
    max_new_tokens: int = Field(32, ge=1)
    engine: EngineName = "transformers"
    """Completions are greedy here: the same from both."""
    batch_size: Annotated[int, NoEffect()] = Field(128, ge=1)
    workers: Annotated[int, NoEffect()] = Field(1, ge=1)
    """Processes, each with its own copy of the policy and, where there are any, a GPU of its own."""

    def needs_facts(self) -> tuple[str, str] | None:
        """The demo's judge decides by the facts."""
        return ("judge", "judge: {model: ...}") if self.judge == "facts" else None

    def describe_work(self, clips: Mapping[str, int]) -> str:
        """Policies, and the clips they are asked about."""
        per_policy = f" x {clips[self.split]:,} clips" if clips else ""
        return f"{len(self.policies)} policies{per_policy}{servers_of(self.engine, self.workers)}"

    def conflicts(self) -> Iterator[Conflict]:
        """What is compared must be scored."""
        for key in ("before", "after"):
            if (name := getattr(self, key)) not in self.policies:
                yield Conflict(key, f"{name!r} is compared but not listed in policies")


Margin = Annotated[float, Field(gt=0)]


class JudgeLimits(Config):
    """What an LLM judge's ratings must show, of either policy, for the difference to be believed."""

    model: str | None = None
    """The only judge whose ratings count, if given."""
    prompt_sha256: str | None = None
    """The only prompt whose ratings count, if given."""
    max_invalid: float = Field(0.01, ge=0, le=1)
    """Share of answers without a usable score in the judge's reply."""
    max_refused: float = Field(0.01, ge=0, le=1)
    max_inconsistent: float = Field(0.1, ge=0, le=1)
    """Share of answers that the two orders score too differently."""
    max_missing: float = Field(0.01, ge=0, le=1)
    """Share of the benchmark's questions without a rating: clips that cannot be read, calls that failed."""
    max_missing_tasks: int = Field(0, ge=0)
    """Tasks of AIR-Bench chat without any question."""
    min_agreement: float | None = Field(None, ge=0, le=1)
    """Share of annotators' clear choices, on either axis, that the judge must prefer too (point estimate).
    AIR-Bench reports above 0.7 for its own."""
    max_canary_uplift: float = 0.3
    """Points that known tricks gain a wrong answer on the mean; more, and the judge can be talked round."""
    max_canary_trick: float = 3.0
    """Points that the most effective trick may gain: one that always works vanishes in the mean of all. A
    judge's own noise is a point or two."""


class Thresholds(Config):
    """What a candidate must show. Differences are candidate minus champion on the same questions.

    None asks for nothing: for what the judge at hand does not measure. What is asked for and was not
    measured fails.
    """

    renamed: ClassVar[Mapping[str, str]] = {
        "max_asked_loss": "max_fact_accuracy_loss",
        "asked": "fact_accuracy",
    }
    min_questions: int = Field(500, ge=1)
    factuality_gain: float | None = 0.0
    """The 95 % interval of the difference must lie above this; below 0 it is a non-inferiority margin."""
    behaviour_gain: float | None = 0.0
    score_gain: float | None = None
    """As above, in points of the judge's scale: the one gain that an LLM judge measures."""
    category_margins: dict[Literal["factuality", "behaviour", "score", "fact_accuracy"], Margin] = {}
    """In no category may the 95 % interval reach down to a loss of this much."""
    kind_margins: dict[Literal["factuality", "behaviour", "score"], Margin] = {}
    """As above, by kind of question: closed, one_word, check, absent or describe, as the judge `facts` tells
    them apart; with another judge by task. What RL gains on some kinds it may lose on others."""
    recognition_margins: dict[str, dict[str, Margin]] = {}
    """Source of recognition rows -> metric (exact, wer ...) -> most that may be lost on it."""
    recognition_gains: dict[str, dict[str, float]] = {}
    """Source -> metric -> what the whole 95 % interval of the improvement must lie above, as in
    {mmau-test-mini: {accuracy: 0.0}}."""
    above_silence: dict[str, float] = {}
    """Source of multiple choice -> what the 95 % interval of its accuracy above that with silence must lie
    above, as in {mmau-test-mini: 0.0}: proof that the clips are heard."""
    max_over_abstention: float | None = Field(0.05, ge=0, le=1)
    """Share of answerable questions answered with "there is no ..."."""
    max_under_abstention_rise: Margin | None = None
    """Of questions about what is not in the clip: most that the share may rise (95 % interval) that is not
    answered with "there is no ..." of it. RL on prompts that all have an answer teaches to invent answers."""
    max_fact_accuracy_loss: float | None = Field(0.03, ge=0)
    """Most that the accuracy of the fact that the question is about may fall, on answerable questions (point
    estimate)."""
    min_audio_effect: float | None = Field(0.05, ge=-1, le=1)
    """Factuality must fall by at least this when clips are shuffled: proof that the audio is heard."""
    min_audio_effect_on_score: float | None = None
    """As above, in points of the judge's scale."""
    max_length_ratio: float = Field(1.5, gt=0)
    """Mean words of the candidate's answers over the champion's."""
    min_length_ratio: float = Field(0.6, ge=0)
    max_kind_length_ratio: float | None = Field(None, gt=0)
    """As `max_length_ratio`, but within each kind of question (see `kind_margins`): a rare kind that becomes
    long hardly moves the mean of all."""
    max_unfinished_rise: float | None = Field(0.1, ge=-1, le=1)
    """Most that the share of answers may rise that do not end as a sentence does: fragments."""
    min_distinct_ratio: float = Field(0.5, ge=0, le=1)
    """Distinct answers of the candidate over the champion's; low means collapse."""
    min_entropy_ratio: float | None = Field(None, ge=0)
    """Entropy of the candidate over the champion's, each on its own greedy answers: -log p per token, the
    min-entropy. Learning lowers it, too; near 0 means collapse."""
    max_foreign_rise: float | None = Field(None, ge=0, le=1)
    """Most that the share of answers may rise that are in the language neither of their question nor of their
    reference. Only the script tells: Chinese instead of English is seen, French is not."""
    max_contaminated: int = Field(0, ge=0)
    """Clips of the benchmark that may be among those trained on, byte by byte or sample by sample."""
    max_alike: int = Field(0, ge=0)
    """Others that may sound the same as one trained on: re-encoded, resampled, shifted or cut copies. Plain
    tones are taken for each other now and then."""
    judge: JudgeLimits | None = JudgeLimits()
    """None is for the judge `facts` alone, which has no prompt and no replies."""
    independent_judge: bool = False
    """Whether the judge may not be one whose marks were the candidate's reward in training, that judged the
    comparisons it learnt from, or (`facts`) that is its simulated annotators. Where it is the same, the
    verdict always says so."""
    rewarded_score_gain: float | None = 0.0
    """Where grpo has trained the candidate and its reward rose, the 95 % interval of the judge's score must
    lie above this: else the reward was hacked (check `proxy gap`). Where metrics.jsonl has not two rewards up
    to the checkpoint, it fails; null accepts any gap."""
    replaces_any_champion: bool = False
    """Whether a registered champion may be replaced although another policy was compared with."""

    def conflicts(self) -> Iterator[Conflict]:
        """Some quality must be asked for."""
        quality = (self.factuality_gain, self.behaviour_gain, self.score_gain)
        if quality == (None, None, None) and not self.recognition_gains:
            message = "is null, and so are behaviour_gain and score_gain: nothing is asked for"
            yield Conflict("factuality_gain", message)


class GateConfig(StageConfig):
    """Decide, from an evaluation, whether the candidate may be promoted. This file is the policy."""

    produces: ClassVar[OutputKind] = "verdict"
    epoch: ClassVar[int] = 2
    stage: Literal["gate"]
    evaluation: EvaluationRef
    model_name: str | None = None
    """The registered model whose champion is to be replaced. Promotion refuses if it is another by then, so
    without a name only a model that has no champion yet can be promoted to."""
    alias: str = "champion"
    thresholds: Thresholds = Thresholds()


class PromoteConfig(StageConfig):
    """Register the candidate in MLflow and move an alias to it."""

    produces: ClassVar[OutputKind] = "alias"
    stage: Literal["promote"]
    policy: PolicyRef
    verdict: VerdictRef
    model_name: str = Field(min_length=1)
    alias: str = "champion"
    """`candidate` only registers; `align promote RUN` moves the champion then."""

"""What every stage can be told, typed and bounded. Imports no torch, so a recipe is checked in a blink.

A stage file names its stage (`stage: dpo`) and earlier stages as inputs (`policy: 2_sft`). Fields that
name an earlier stage are marked with `Needs(kind)`; each stage declares the kind it `produces`.
Values are those of the file: nothing here rewrites them.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from preference_data.languages import TEXT_LANGUAGES
from preference_data.prompts import Dialect
from preference_data.schema import MIN_HEARD

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


class ClipCounts(Config):
    """Clips to make per split. Splits share no clip; dev and test share no voice with any other."""

    train: int = Field(ge=1)
    preference: int = Field(ge=1)
    dev: int = Field(ge=1)
    test: int = Field(ge=1)


class DataSetShare(Config):
    """A prepared data set of a mixture."""

    folder: str = Field(min_length=1)
    """Holds `source.json` and records, as `align data prepare` writes them."""
    share: float | None = Field(None, gt=0, le=1)
    """Of the training draws. Without one, by size among those that have none."""


class CorpusConfig(StageConfig):
    """Prepare a corpus: audio files, records, and an evaluation set in AIR-Bench's layout."""

    produces: ClassVar[OutputKind] = "corpus"
    stage: Literal["corpus"]
    corpus: Literal["made_world", "spoken_digits", "folder", "mixture"]
    """A file of `preference_data/corpora/`. `mixture`: prepared data sets, whose audio stays where it is."""
    dir: OutsideFolder | None = None
    """Where the recordings are, for corpora of recordings."""
    sources: Annotated[list[DataSetShare], Outside()] = []
    """The data sets of a mixture."""
    temperature: float = Field(1.0, ge=1)
    """Of a mixture: data sets without a share are drawn from by size^(1/temperature)."""
    clips: ClipCounts | None = None
    """How many clips to make, for corpora that make or compose them."""
    held_out: dict[Literal["dev", "test"], list[str]] = {}
    """Speakers kept out of training, per split, for corpora of recordings."""
    chats_per_clip: int = Field(2, ge=1)
    turns_per_chat: int = Field(3, ge=1)
    defect_rate: float = Field(0.5, ge=0, le=1)
    """Share of SFT answers that are wrong on purpose (invented, wrong format, about absent things)."""
    max_bad_fraction: float = Field(0.01, ge=0, le=1)
    """Stop when more than this share of the audio files is unusable; else quarantine them."""
    max_duration_s: float = Field(3.0, gt=0)
    """Longer clips are bad audio: the model would silently not hear their end."""

    @model_validator(mode="after")
    def _source_is_given(self) -> CorpusConfig:
        if self.corpus == "mixture":
            return self._mixes_something()
        if self.sources:
            raise ValueError(f"corpus {self.corpus!r} has no sources; they belong to corpus 'mixture'")
        if self.corpus != "made_world" and self.dir is None:
            raise ValueError(f"corpus {self.corpus!r} needs dir: the folder of its recordings")
        if self.corpus != "folder" and self.clips is None:
            raise ValueError(f"corpus {self.corpus!r} needs clips: how many to make per split")
        return self

    def _mixes_something(self) -> CorpusConfig:
        if not self.sources or self.dir or self.clips or self.held_out:
            raise ValueError("corpus 'mixture' needs sources, and has no dir, clips or held_out of its own")
        given = [source.share for source in self.sources if source.share is not None]
        if sum(given) > 1 + 1e-9 or (len(given) < len(self.sources) and sum(given) >= 1):
            raise ValueError(f"the shares sum to {sum(given):g} and must leave some of 1 for the others")
        return self


class ModelShape(Config):
    """A Qwen2-Audio from random weights, small enough for a laptop."""

    d_model: int = Field(128, ge=16)
    heads: int = Field(4, ge=1)
    audio_layers: int = Field(2, ge=1)
    text_layers: int = Field(2, ge=1)
    mel_bins: int = Field(64, ge=16)
    hop_length: int = Field(320, ge=80)
    """Samples between mel frames; 320 = 20 ms, twice Whisper's, which halves the audio tokens."""
    clip_s: int = Field(3, ge=1)
    """Longest clip in whole seconds; shorter ones are padded to it."""
    vocab_size: int = Field(640, ge=300)


class Assemble(Config):
    """A Qwen2-Audio of two models in transformers' format: folders, or ids on the Hub."""

    audio: CheckpointRef
    """A Whisper model; its encoder becomes the audio tower."""
    text: CheckpointRef
    """A Qwen2-family language model; a new projector joins the two."""


def _kind_of_model(value: Any) -> str:
    """Which way of saying what to start from is meant."""
    if isinstance(value, str):
        return "[PolicyRef]"
    keys = value if isinstance(value, dict) else type(value).model_fields
    return "[Assemble]" if {"audio", "text"} & set(keys) else "[ModelShape]"


StartingModel = Annotated[
    Annotated[ModelShape, Tag("[ModelShape]")]
    | Annotated[Assemble, Tag("[Assemble]")]
    | Annotated[PolicyRef, Tag("[PolicyRef]")],
    Discriminator(_kind_of_model),
]


class Augment(Config):
    """Random changes to the mel features of each training example. Zero switches a part off."""

    policy: Literal["librispeech_basic"] | None = None
    """In place of all below, a policy of SpecAugment (arXiv:1904.08779, table 1). Qwen-Audio's is LibriSpeech
    Basic: W 80, F 27, mF 1, T 100, p 1.0, mT 1; time warping (W) is left out, it would move time stamps."""
    gain: float = Field(0.15, ge=0)
    """Half-width of a random offset on the log-mel."""
    time_mask: int = Field(8, ge=0)
    """Widest masked stretch of frames (SpecAugment, arXiv:1904.08779)."""
    frequency_mask: int = Field(6, ge=0)
    """Widest masked band of mel bins."""
    vocal_tract: float = Field(0.0, ge=0, lt=0.5)
    """Half-width of the log warp of the frequency axis (VTLP)."""
    channel: float = Field(0.0, ge=0)
    """Half-width of a smooth random frequency response on the log-mel."""
    floor: float = Field(0.0, ge=0)
    """Largest rise of the noise floor on the log-mel."""

    @model_validator(mode="after")
    def _policy_stands_alone(self) -> Augment:
        if self.policy and (others := sorted(self.model_fields_set - {"policy"})):
            raise ValueError(f"policy {self.policy} replaces {', '.join(others)}: remove them, or policy")
        return self


class Lesson(Config):
    """The first `steps` steps see only clips whose fact `slot` is one of `values`."""

    steps: int = Field(ge=1)
    slot: str
    values: list[str] = Field(min_length=1)


class Hardware(Config):
    """Where a training stage runs. It changes neither what is learned nor whether finished work counts."""

    workers: int = Field(1, ge=1)
    """Processes, one per GPU; Ray Train starts them and replaces those that die."""
    device: Literal["auto", "gpu", "cpu"] = "auto"
    """`auto`: GPUs if the cluster has one per worker."""
    strategy: Literal["ddp", "zero2", "zero3", "fsdp2"] = "ddp"
    """What is spread over the workers: nothing; optimizer and gradients; the weights too. ZeRO is
    DeepSpeed's (arXiv:1910.02054), fsdp2 PyTorch's, on GPUs only."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """What waits in host memory: optimizer states (zero2, zero3), or the weights as well (zero3)."""
    address: str | None = None
    """Of a running Ray cluster: `auto` on one of its machines, or `ray://host:10001`. Without it a
    cluster of this machine alone is started, and ended with the stage."""
    cpus_per_worker: int = Field(1, ge=1)
    """Logical CPUs that Ray sets aside for each worker."""
    max_failures: int = Field(3, ge=0)
    """How often dead or unreachable workers are replaced before the stage fails."""
    timeout_s: int = Field(1800, ge=5)
    """Workers that wait longer than this for one of them count as failed."""

    @model_validator(mode="after")
    def _fits_together(self) -> Hardware:
        if self.offload != "none" and self.strategy not in ("zero2", "zero3"):
            raise ValueError(f"offload: {self.offload} needs strategy: zero2 or zero3, not {self.strategy}")
        if self.offload == "all" and self.strategy != "zero3":
            raise ValueError("offload: all needs strategy: zero3; zero2 keeps the weights on every GPU")
        if self.strategy == "fsdp2" and self.device == "cpu":
            raise ValueError(
                "strategy: fsdp2 needs GPUs: accelerate runs plain DDP on CPUs without saying so. "
                "On CPUs use ddp, zero2 or zero3"
            )
        return self


class LoRA(Config):
    """Train low-rank updates of frozen weights (arXiv:2106.09685)."""

    r: int = Field(16, ge=1)
    """Rank of the updates."""
    alpha: int = Field(32, ge=1)
    """Updates are scaled by alpha / r."""
    dropout: float = Field(0.0, ge=0, lt=1)
    target: str = (
        r"model\.language_model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj"
        r"|model\.multi_modal_projector\.linear"
    )
    """Regular expression over whole names of linear layers: the language model's and the projector.
    A list of short names would also hit the audio tower, which has q_proj, k_proj and v_proj too."""
    bits: Literal[4] | None = None
    """4: QLoRA (arXiv:2305.14314), the frozen weights in 4-bit NF4; needs CUDA and bitsandbytes."""


ModelPart = Literal["audio_tower", "projector", "language_model"]


class TrainingConfig(StageConfig):
    """What the three training stages share."""

    corpus: CorpusRef
    hardware: Hardware | None = None
    """Without it, training runs in this process, on its GPU if it has one."""
    train: list[ModelPart] | None = Field(None, min_length=1)
    """Parts of the model that learn, the rest is frozen; all of them by default. The audio tower's
    sinusoidal positions never learn."""
    learning_rate: float = Field(gt=0)
    batch_size: int = Field(ge=1)
    """Examples (pairs for DPO) per optimizer step, over all devices."""
    save_steps: int = Field(100, ge=1)
    """Optimizer steps between checkpoints; a killed run loses at most this many."""
    packed: bool = True
    """Compute every clip and every shared prompt of a batch once, without padding: the same loss and
    gradients for a fraction of the work (align/kernels/README.md). False: transformers' own way."""
    trl: dict[str, Any] = {}
    """Anything else TRL's config knows; names are checked before anything runs."""


def _refuse_both(train: list[ModelPart] | None, lora: LoRA | None) -> None:
    if train is not None and lora is not None:
        raise ValueError("lora already freezes every part of the model: remove train, or lora")


class PretrainConfig(TrainingConfig):
    """Multi-task pre-training on audio-to-text targets (Qwen2-Audio stage 1)."""

    produces: ClassVar[OutputKind] = "policy"
    stage: Literal["pretrain"]
    model: StartingModel
    """What to start from: a small model from random weights, a Whisper and a Qwen2 put together, or a
    Qwen2-Audio (an earlier stage, a folder, or an id on the Hub such as Qwen/Qwen2-Audio-7B)."""
    dialect: Dialect = "sentences"
    """Prompts in natural language (Qwen2-Audio), or in Qwen-Audio's hierarchical tags as its paper or its
    release spells them."""
    steps: int = Field(ge=1)
    curriculum: list[Lesson] = []
    """Easier clips first; step counts add up from the start."""
    augment: Augment = Augment()
    max_bad_fraction: float = Field(0.01, ge=0, le=1)
    """An example whose clip cannot be read gives way to the next of its source; stop when there are more."""


class Filters(Config):
    """Which chats are left out of SFT, counted by reason in the metrics, listed in `left_out.jsonl`."""

    min_answer_chars: int = Field(0, ge=0)
    """Chats with a shorter answer are left out."""
    max_answer_chars: int | None = Field(None, ge=1)
    """Chats with a longer answer are left out."""
    max_similarity: float | None = Field(None, gt=0, le=1)
    """Of chats about the same clips whose texts are more alike (Jaccard index of 5-character shingles) one
    stays; 1 leaves out exact repetitions, but for case and punctuation, alone."""
    languages: list[str] = []
    """Answers must be written in the script of one of these, given by code: en, zh ..."""
    min_audio_effect: float | None = None
    """Nats per token by which the clips must raise the answers' log-probability over silence, by the policy
    that SFT starts from: other answers could be given without listening. Costs two forward passes a chat."""

    @model_validator(mode="after")
    def _are_known(self) -> Filters:
        if unknown := [code for code in self.languages if code not in TEXT_LANGUAGES]:
            raise ValueError(f"languages: {unknown[0]!r} is not one of {', '.join(TEXT_LANGUAGES)}")
        return self


class SFTConfig(TrainingConfig):
    """Supervised fine-tuning on multi-turn chats; loss on the assistant's tokens only."""

    produces: ClassVar[OutputKind] = "policy"
    stage: Literal["sft"]
    policy: PolicyRef
    lora: LoRA | None = None
    """Train low-rank updates only; `model/` then holds them merged in, `adapter/` alone."""
    steps: int = Field(ge=1)
    filters: Filters = Filters()
    replay: float = Field(0.0, ge=0, lt=1)
    """Share of each batch's examples drawn from the pre-training targets, so that they are not lost."""
    dialect: Dialect = "sentences"
    """Dialect of the replayed pre-training prompts."""
    augment: Augment = Augment()
    max_bad_fraction: float = Field(0.01, ge=0, le=1)
    """An example whose clip cannot be read gives way to the next of its source; stop when there are more."""

    @model_validator(mode="after")
    def _lora_freezes(self) -> SFTConfig:
        _refuse_both(self.train, self.lora)
        return self


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
    batch_size: int = Field(128, ge=1)
    workers: int = Field(1, ge=1)
    """More than one: Ray Data actors, each with its own copy of the policy."""


class AnnotateConfig(StageConfig):
    """Judge pairs of completions for factuality and behaviour, in Argilla."""

    produces: ClassVar[OutputKind] = "annotations"
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
    repeats: float = Field(0.1, ge=0, le=0.5)
    """Comparisons shown once more with their sides swapped, as a share of all: does one judge the same?"""
    gold: float = Field(0.05, ge=0, le=0.5)
    """Comparisons added whose better side is known, as a share of all: does one listen?"""
    enough: float = Field(1.0, gt=0, le=1)
    """People: go on when this share of the judgements is there."""
    error_rate: float = Field(0.05, ge=0, le=1)
    """Simulated: how often an answer to a question is random."""
    comparisons_per_prompt: int = Field(3, ge=1)

    @model_validator(mode="after")
    def _simulated_have_accounts(self) -> AnnotateConfig:
        if self.by == "simulated" and self.server:
            raise ValueError("simulated annotators work on an own server only: remove server, or by: people")
        return self


class PairsConfig(StageConfig):
    """Annotations to preference pairs, one per comparison and axis that has a clear preference."""

    produces: ClassVar[OutputKind] = "pairs"
    stage: Literal["pairs"]
    completions: CompletionsRef
    annotations: AnnotationsRef
    min_agreement: float = Field(0.75, gt=0.5, le=1)
    """A comparison yields a pair where at least this share of its annotators prefer the same side."""
    min_heard: float = Field(MIN_HEARD, ge=0, le=1)
    """Judgements of annotators who had played less of the clip than this are dropped."""
    min_alpha: float | None = Field(None, ge=-1, le=1)
    """Refuse annotations whose Krippendorff's alpha is lower on either axis: chance is 0, agreement 1."""


class Objective(Config):
    """How much each axis counts. A pair's loss is weighted by the axes that prefer its chosen side."""

    factuality: float = Field(1.0, ge=0)
    behaviour: float = Field(0.5, ge=0)

    @model_validator(mode="after")
    def _teaches_something(self) -> Objective:
        if self.factuality == self.behaviour == 0:
            raise ValueError("factuality and behaviour are both 0: nothing would be learned")
        return self


class Choose(Config):
    """Score every checkpoint on the dev split and keep the best; the test split is never seen here."""

    questions: int = Field(200, ge=1)
    max_new_tokens: int = Field(32, ge=1)


class DPOConfig(TrainingConfig):
    """Direct preference optimisation (arXiv:2305.18290) through TRL."""

    produces: ClassVar[OutputKind] = "policy"
    stage: Literal["dpo"]
    policy: PolicyRef
    lora: LoRA | None = None
    """Train low-rank updates only; `model/` then holds them merged in, `adapter/` alone."""
    pairs: PairsRef
    objective: Objective = Objective()
    loss: Literal[
        "sigmoid",
        "ipo",
        "robust",
        "apo_zero",
        "apo_down",
        "sppo_hard",
        "nca_pair",
        "bco_pair",
        "discopop",
        "sigmoid_norm",
        "exo_pair",
        "sft",
    ] = "sigmoid"
    """TRL's losses that weigh each pair alone (its hinge cannot be weighted: the gradient fails).
    `sft` trains on the chosen answers only: the control that DPO must be compared with."""
    beta: float = Field(0.1, gt=0)
    """Strength of the leash to the reference."""
    epochs: float = Field(2, gt=0)
    choose: Choose | None = None
    """How to choose among the checkpoints (one every `save_steps`); without it the last one is kept."""

    @model_validator(mode="after")
    def _lora_freezes(self) -> DPOConfig:
        _refuse_both(self.train, self.lora)
        return self


class JudgeModel(Config):
    """A language model that rates answers against the reference, 1 to 10, in both orders."""

    model: str = Field(min_length=1)
    """As its server names it; without a url, the folder of a model that transformers loads here."""
    url: str | None = None
    """An OpenAI-compatible API, up to and with /v1; its key is read from ALIGN_JUDGE_API_KEY, or from
    OPENAI_API_KEY for openai.com alone."""
    protocol: Literal["strict", "official"] = "strict"
    """`official` asks and reads as AIR-Bench's scripts do; `strict` cannot be talked round as easily."""
    parameters: dict[str, Any] = {"temperature": 0.0, "max_tokens": 1024}
    """Sent with every request as they are."""
    concurrency: int = Field(8, ge=1)
    canary_items: int = Field(20, ge=0)
    """Questions on which known tricks are tried: can an answer sway the judge?"""


class EvaluateConfig(StageConfig):
    """AIR-Bench chat questions and recognition for several policies, with controls."""

    produces: ClassVar[OutputKind] = "evaluation"
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
            "srwt",
        ],
    ] = {}
    """The reports' other benchmarks: files of rows {audio, prompt, gt, source} as the Qwen2-Audio evaluation
    reads them, audio relative to the file, and how each is scored. Results stand per source beside the
    corpus' own recognition, and the gate's `recognition_margins` may name them."""
    annotations: AnnotationsRef | None = None
    """Comparisons that annotators made: the judge scores the same answers, and told is how often it prefers
    what most of them prefer."""
    annotated_pairs: int = Field(200, ge=1)
    """How many of those comparisons, drawn by chance: a judge model rates two answers for each."""
    dialect: Dialect = "sentences"
    """Dialect of the recognition prompts."""
    max_new_tokens: int = Field(32, ge=1)
    batch_size: int = Field(128, ge=1)

    @model_validator(mode="after")
    def _compared_policies_are_scored(self) -> EvaluateConfig:
        for name in (self.before, self.after):
            if name not in self.policies:
                raise ValueError(f"{name!r} is compared but not listed in policies")
        return self


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


class Thresholds(Config):
    """What a candidate must show. Differences are candidate minus champion on the same questions.

    None asks for nothing: for what the judge at hand does not measure. What is asked for and was not
    measured fails.
    """

    min_questions: int = Field(500, ge=1)
    factuality_gain: float | None = 0.0
    """The 95 % interval of the difference must lie above this; below 0 it is a non-inferiority margin."""
    behaviour_gain: float | None = 0.0
    score_gain: float | None = None
    """As above, in points of the judge's scale: the one gain that an LLM judge measures."""
    category_margins: dict[Literal["factuality", "behaviour", "score", "asked"], Margin] = {}
    """In no category may the 95 % interval reach down to a loss of this much."""
    recognition_margins: dict[str, dict[str, Margin]] = {}
    """Source of recognition rows -> metric (exact, wer ...) -> most that may be lost on it."""
    max_over_abstention: float | None = Field(0.05, ge=0, le=1)
    """Share of answerable questions answered with "there is no ..."."""
    max_asked_loss: float | None = Field(0.03, ge=0)
    """Most that asked-fact accuracy on answerable questions may fall (point estimate)."""
    min_audio_effect: float | None = Field(0.05, ge=-1, le=1)
    """Factuality must fall by at least this when clips are shuffled: proof that the audio is heard."""
    min_audio_effect_on_score: float | None = None
    """As above, in points of the judge's scale."""
    max_length_ratio: float = Field(1.5, gt=0)
    """Mean words of the candidate's answers over the champion's."""
    min_length_ratio: float = Field(0.6, ge=0)
    max_unfinished_rise: float | None = Field(0.1, ge=-1, le=1)
    """Most that the share of answers may rise that do not end as a sentence does: fragments."""
    min_distinct_ratio: float = Field(0.5, ge=0, le=1)
    """Distinct answers of the candidate over the champion's; low means collapse."""
    max_contaminated: int = Field(0, ge=0)
    """Clips of the benchmark that may be among those trained on."""
    judge: JudgeLimits | None = JudgeLimits()
    """None is for the judge `facts` alone, which has no prompt and no replies."""
    replaces_any_champion: bool = False
    """Whether a registered champion may be replaced although another policy was compared with."""

    @model_validator(mode="after")
    def _asks_for_quality(self) -> Thresholds:
        if self.factuality_gain is self.behaviour_gain is self.score_gain is None:
            raise ValueError(
                "factuality_gain, behaviour_gain and score_gain are all null: nothing is asked for"
            )
        return self


class GateConfig(StageConfig):
    """Decide, from an evaluation, whether the candidate may be promoted. This file is the policy."""

    produces: ClassVar[OutputKind] = "verdict"
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


CONFIGS: dict[str, type[StageConfig]] = {
    "corpus": CorpusConfig,
    "pretrain": PretrainConfig,
    "sft": SFTConfig,
    "sample": SampleConfig,
    "annotate": AnnotateConfig,
    "pairs": PairsConfig,
    "dpo": DPOConfig,
    "evaluate": EvaluateConfig,
    "gate": GateConfig,
    "promote": PromoteConfig,
}
TRL_CONFIGS = {"pretrain": "SFTConfig", "sft": "SFTConfig", "dpo": "DPOConfig"}
"""The TRL config class whose names a stage's `trl:` mapping may use."""

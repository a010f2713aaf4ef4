"""Keys of the stages that train a model: pretrain, sft, dpo, kto, reward, grpo."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, field_validator

from align.recipe.config.base import (
    CheckpointRef,
    Config,
    Conflict,
    CorpusRef,
    LabelsRef,
    NoEffect,
    OutputKind,
    PairsRef,
    PolicyRef,
    StageConfig,
)
from align.recipe.config.rewards import RewardConfig
from preference_data.prompts.languages import TEXT_LANGUAGES
from preference_data.prompts.prompts import PromptFormat
from preference_data.prompts.tasks import task_named
from preference_data.schema import Axis


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

    def conflicts(self) -> Iterator[Conflict]:
        """Heads share the width evenly; the audio tower halves the frames."""
        if self.d_model % (2 * self.heads):
            yield Conflict("d_model", f"{self.d_model} is not a multiple of 2 x heads ({self.heads})")
        frames = self.clip_s * 16_000 // self.hop_length
        if frames < 4 or frames % 2:
            message = f"{self.hop_length} makes {frames} frames of {self.clip_s} s at 16 kHz: the audio tower"
            yield Conflict("hop_length", f"{message} needs an even number from 4 on")


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
    if isinstance(value, Assemble) or isinstance(value, dict) and {"audio", "text"} & value.keys():
        return "[Assemble]"
    return "[ModelShape]"


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

    def conflicts(self) -> Iterator[Conflict]:
        """A policy stands alone."""
        if self.policy and (others := sorted(self.model_fields_set - {"policy"})):
            yield Conflict("policy", f"{self.policy} replaces {', '.join(others)}: remove them, or policy")


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
    memory_gb: float | None = Field(None, gt=0)
    """What one process may use, in 10^9 bytes; by default all of its GPU's memory. A stage plans its
    micro-batches by it, unless its `trl:` says how (align/training/README.md). On a CPU nothing is planned
    without it."""
    address: str | None = None
    """Address of a running Ray cluster: `auto` on one of its machines, or `ray://host:10001`. Without it a
    cluster of this machine alone is started, and ended with the stage."""
    cpus_per_worker: int = Field(1, ge=1)
    """Logical CPUs, and OpenMP threads, of each worker. With offload the optimizer runs on them: give as many
    as the machine has for each GPU."""
    max_failures: int = Field(3, ge=0)
    """How often dead or unreachable workers are replaced before the stage fails."""
    timeout_s: int = Field(1800, ge=5)
    """Workers that wait longer than this for one of them count as failed."""

    def conflicts(self) -> Iterator[Conflict]:
        """Not every strategy can offload, or runs on CPUs."""
        if self.offload != "none" and self.strategy not in ("zero2", "zero3"):
            yield Conflict("offload", f"{self.offload} needs strategy: zero2 or zero3, not {self.strategy}")
        if self.offload == "all" and self.strategy == "zero2":
            yield Conflict("offload", "all needs strategy: zero3; zero2 keeps the weights on every GPU")
        if self.strategy == "fsdp2" and self.device == "cpu":
            message = "fsdp2 needs GPUs: accelerate runs plain DDP on CPUs without saying so; take ddp, zero2"
            yield Conflict("strategy", f"{message} or zero3")


_LINEAR_LAYERS = (
    *(f"model.language_model.layers.0.self_attn.{part}_proj" for part in "qkvo"),
    *(f"model.language_model.layers.0.mlp.{part}_proj" for part in ("gate", "up", "down")),
    "model.multi_modal_projector.linear",
    *(f"model.audio_tower.layers.0.self_attn.{part}_proj" for part in ("q", "k", "v", "out")),
    *(f"model.audio_tower.layers.0.{part}" for part in ("fc1", "fc2")),
    "lm_head",
)
"""Names of a Qwen2-Audio's linear layers, of the first block of each kind."""


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

    @field_validator("target")
    @classmethod
    def _finds_layers(cls, target: str) -> str:
        try:
            hits = [name for name in _LINEAR_LAYERS if re.fullmatch(target, name)]
        except re.error as error:
            raise ValueError(f"{target!r} is not a regular expression: {error}") from None
        if "lm_head" in hits:
            raise ValueError(f"{target!r} hits lm_head, whose adapter TRL would never train")
        if not hits:
            raise ValueError(f"{target!r} matches no layer as a whole, such as {_LINEAR_LAYERS[0]}")
        return target


ModelPart = Literal["audio_tower", "projector", "language_model", "new_tokens"]


TRL_WITHOUT_EFFECT = frozenset(
    "activation_checkpointing activation_checkpointing_kwargs activation_offloading"
    " dataloader_in_order dataloader_num_workers"
    " dataloader_persistent_workers dataloader_pin_memory dataloader_prefetch_factor dataset_num_proc"
    " ddp_broadcast_buffers ddp_bucket_cap_mb disable_tqdm gradient_accumulation_steps"
    " gradient_checkpointing gradient_checkpointing_kwargs include_num_input_tokens_seen log_level"
    " log_level_replica log_on_each_node logging_first_step logging_nan_inf_filter logging_steps"
    " logging_strategy per_device_eval_batch_size precompute_ref_batch_size precompute_ref_log_probs project"
    " run_name skip_memory_metrics torch_empty_cache_steps".split()
)
"""Names of TRL's that decide how a step is computed, loaded or logged, but nothing beyond rounding about its
result: as little as the number of GPUs does."""


class TrainingConfig(StageConfig):
    """What the training stages share."""

    produces: ClassVar[OutputKind] = "policy"
    corpus: CorpusRef
    hardware: Annotated[Hardware | None, NoEffect()] = None
    """Without it, training runs in this process, on its GPU if it has one."""
    train: list[ModelPart] | None = Field(None, min_length=1)
    """Parts of the model that learn, the rest is frozen; all of them by default. The audio tower's
    sinusoidal positions never learn. `new_tokens`, in pretrain with the language model frozen: of its
    embeddings and head the rows of the prompt format's tags and of the marks around audio."""
    learning_rate: float = Field(gt=0)
    batch_size: int = Field(ge=1)
    """Examples (pairs for DPO) per optimizer step, over all devices."""
    save_steps: Annotated[int, NoEffect(unless="choose")] = Field(100, ge=1)
    """Optimizer steps between checkpoints; a killed run loses at most this many."""
    packed: Literal[True, False, "split", "varlen", "dense"] = True
    """Compute every clip and every shared prompt of a batch once, without padding: the same loss and
    gradients for a fraction of the work (align/kernels/README.md). False: transformers' own way."""
    trl: Annotated[dict[str, Any], NoEffect(names=TRL_WITHOUT_EFFECT)] = {}
    """Anything else TRL's config knows; names are checked before anything runs."""

    def conflicts(self) -> Iterator[Conflict]:
        """Every process gets as many examples in every micro-batch."""
        workers = self.hardware.workers if self.hardware else 1
        accumulated = self.trl.get("gradient_accumulation_steps", 1)
        if type(accumulated) is int and accumulated > 0 and self.batch_size % (workers * accumulated):
            message = f"{self.batch_size} cannot be split evenly over hardware.workers ({workers}) "
            yield Conflict("batch_size", f"{message}times trl.gradient_accumulation_steps ({accumulated})")

    @property
    def starts_from(self) -> ModelShape | Assemble | str:
        """The model that learns: a stage, a folder or Hub id, or what it is made of."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it starts from")

    @property
    def n_examples(self) -> int | None:
        """Examples over the whole stage, where the config alone says how many."""
        return None

    @property
    def has_live_reference(self) -> bool:
        """Whether, without adapters, a frozen copy of the policy stands beside the one that learns."""
        return False

    @property
    def keeps_candidates(self) -> bool:
        """Whether all checkpoints are kept, to choose among them."""
        return False


class StepsConfig(TrainingConfig):
    """A training stage whose length is given in optimizer steps."""

    trl_config: ClassVar[str | None] = "SFTConfig"
    renamed: ClassVar[Mapping[str, str]] = {"dialect": "prompt_format"}

    steps: int = Field(ge=1)
    prompt_format: PromptFormat = "sentences"
    """Pre-training prompts in natural language (Qwen2-Audio), or in Qwen-Audio's hierarchical tags as its
    paper or its release spells them."""
    augment: Augment = Augment()
    max_bad_fraction: Annotated[float, NoEffect()] = Field(0.01, ge=0, le=1)
    """An example whose clip cannot be read gives way to the next of its source; stop when there are more."""

    @property
    def n_examples(self) -> int:
        """Steps by examples a step."""
        return self.steps * self.batch_size

    def describe_work(self, clips: Mapping[str, int]) -> str:
        """Steps, examples, and how often each clip comes up."""
        n = self.n_examples
        epochs = f", {n / clips['train']:.1f} per training clip" if clips else ""
        return f"{self.steps:,} steps x {self.batch_size} = {n:,} examples{epochs}"


class FurtherTrainingConfig(TrainingConfig):
    """A training stage that starts from a policy, and may learn low-rank updates of it alone."""

    policy: PolicyRef
    lora: LoRA | None = None
    """Train low-rank updates only; `model/` then holds them merged in, `adapter/` alone."""

    @property
    def starts_from(self) -> str:
        """The policy."""
        return self.policy

    def conflicts(self) -> Iterator[Conflict]:
        """LoRA freezes the whole model."""
        yield from super().conflicts()
        if "new_tokens" in (self.train or ()):
            yield Conflict(
                "train", "new_tokens are learned in pretrain only: here language_model learns them"
            )
        if self.train is not None and self.lora is not None:
            yield Conflict("lora", "it freezes every part of the model already: remove train, or lora")


class PretrainConfig(StepsConfig):
    """Multi-task pre-training on audio-to-text targets (Qwen2-Audio stage 1)."""

    stage: Literal["pretrain"]
    model: StartingModel
    """What to start from: a small model from random weights, a Whisper and a Qwen2 put together, or a
    Qwen2-Audio (an earlier stage, a folder, or an id on the Hub such as Qwen/Qwen2-Audio-7B)."""
    curriculum: list[Lesson] = []
    """Easier clips first; step counts add up from the start."""

    @property
    def starts_from(self) -> ModelShape | Assemble | str:
        """What `model` says."""
        return self.model

    def conflicts(self) -> Iterator[Conflict]:
        """New tokens learn where the rest of the language model does not."""
        yield from super().conflicts()
        if "new_tokens" in (self.train or ()):
            if "language_model" in (self.train or ()):
                yield Conflict("train", "language_model holds new_tokens already; remove one of the two")
            if self.hardware is not None and self.hardware.strategy == "fsdp2":
                yield Conflict(
                    "train", "new_tokens does not work with strategy: fsdp2; take ddp, zero2 or zero3"
                )


class Filters(Config):
    """Which chats are left out of SFT, counted by reason in the metrics, listed in `left_out.jsonl`."""

    min_answer_chars: int = Field(0, ge=0)
    """Chats with a shorter answer are left out."""
    max_answer_chars: int | None = Field(None, ge=1)
    """Chats with a longer answer are left out."""
    max_similarity: float | None = Field(None, gt=0, le=1)
    """Keep a single chat of those about the same clips whose texts are more alike than this (Jaccard index of
    5-character shingles); 1 leaves out exact repetitions, but for case and punctuation, alone."""
    languages: list[str] = []
    """Answers must be written in the script of one of these, given by code: en, zh ..."""
    min_audio_effect: float | None = None
    """Nats per token by which the clips must raise the answers' log-probability over silence, by the policy
    that SFT starts from: other answers could be given without listening. Costs two forward passes a chat."""

    def conflicts(self) -> Iterator[Conflict]:
        """Languages that can be told by their script; an answer cannot be shorter and longer."""
        for code in self.languages:
            if code not in TEXT_LANGUAGES:
                yield Conflict("languages", f"{code!r} is not one of {', '.join(TEXT_LANGUAGES)}")
        if self.max_answer_chars is not None and self.max_answer_chars < self.min_answer_chars:
            message = f"{self.max_answer_chars} is less than min_answer_chars ({self.min_answer_chars})"
            yield Conflict("max_answer_chars", f"{message}: no chat would be left")


class SFTConfig(StepsConfig, FurtherTrainingConfig):
    """Supervised fine-tuning on multi-turn chats; loss on the assistant's tokens only."""

    stage: Literal["sft"]
    filters: Filters = Filters()
    replay: float = Field(0.0, ge=0, lt=1)
    """Share of each batch's examples drawn from the pre-training targets, so that they are not lost."""


class Objective(Config):
    """How much each axis counts. A pair's loss is weighted by the axes that prefer its chosen side."""

    factuality: float = Field(1.0, ge=0)
    behaviour: float = Field(0.5, ge=0)

    @property
    def weights(self) -> dict[Axis, float]:
        """By axis."""
        return {"factuality": self.factuality, "behaviour": self.behaviour}

    def conflicts(self) -> Iterator[Conflict]:
        """Some axis must count."""
        if self.factuality == self.behaviour == 0:
            yield Conflict("factuality", "is 0, and so is behaviour: nothing would be learned")


class Choose(Config):
    """Publish the best checkpoint instead of the last; the test split is never used here."""

    by: Literal["facts", "held_out_loss", "held_out_accuracy"] = "facts"
    """`facts`: answers to dev questions, judged by the facts of synthetic clips. Else by preference pairs of
    any data that are not trained on (`held_out`): their loss, or how many the policy ranks right."""
    questions: int = Field(200, ge=1)
    """Dev questions, for `facts`."""
    max_new_tokens: int = Field(32, ge=1)
    """Longest answer to them, in tokens."""


class DPOConfig(FurtherTrainingConfig):
    """Direct preference optimisation (arXiv:2305.18290) through TRL."""

    trl_config: ClassVar[str | None] = "DPOConfig"
    stage: Literal["dpo"]
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
    held_out: float = Field(0.0, ge=0, lt=1)
    """Share of the pairs that is not trained on, drawn by clips (pairs about one clip stay together) and the
    seed: their loss, reward accuracy and margin are logged at every checkpoint."""
    choose: Choose | None = None
    """How to choose among the checkpoints (one every `save_steps`); without it the last one is published."""

    def conflicts(self) -> Iterator[Conflict]:
        """What a loss and a choice need."""
        yield from super().conflicts()
        if self.loss == "exo_pair" and not self.trl.get("label_smoothing"):
            yield Conflict("loss", "exo_pair needs trl: {label_smoothing: ...} above 0; its paper takes 1e-3")
        if self.choose is not None and self.choose.by != "facts" and not self.held_out:
            message = f"by {self.choose.by} needs held-out pairs: set held_out, to 0.05 or so"
            yield Conflict("choose", message)

    @property
    def sequences_per_example(self) -> int:
        """Both completions of a pair."""
        return 2

    @property
    def has_live_reference(self) -> bool:
        """Unless its log-probs are computed before."""
        return not self.trl.get("precompute_ref_log_probs", True)

    @property
    def keeps_candidates(self) -> bool:
        """With `choose`."""
        return self.choose is not None

    def needs_facts(self) -> tuple[str, str] | None:
        """Answers to dev questions are judged by the facts."""
        by_facts = self.choose is not None and self.choose.by == "facts"
        return ("choose", "choose: {by: held_out_loss}") if by_facts else None

    def describe_work(self, clips: Mapping[str, int]) -> str:
        """Epochs over the pairs."""
        return f"{self.epochs:g} epochs, {self.batch_size} pairs a step"


class KTOConfig(FurtherTrainingConfig):
    """Kahneman-Tversky optimisation (arXiv:2402.01306) through TRL: each completion is good or bad alone."""

    trl_config: ClassVar[str | None] = "KTOConfig"
    sequences_per_example: ClassVar[int] = 2
    has_reference: ClassVar[bool] = True
    stage: Literal["kto"]
    labels: LabelsRef
    trl: Annotated[dict[str, Any], NoEffect(names=TRL_WITHOUT_EFFECT - {"gradient_accumulation_steps"})] = {}
    """As everywhere, but here micro-batches count: `kto` estimates its KL term in each of them."""
    loss: Literal["kto", "apo_zero_unpaired"] = "kto"
    """`apo_zero_unpaired` (arXiv:2408.06266) has no KL term: good completions become likelier than the
    reference has them, bad ones less likely."""
    beta: float = Field(0.1, gt=0)
    """Strength of the leash to the reference."""
    balance: float = Field(1.0, gt=0)
    """How much all desirable labels together count beside all undesirable ones; the weight of the rarer kind
    follows from it, that of the other is 1. The paper takes 1 to 4/3 (section 4.2, equation 8)."""
    epochs: float = Field(1, gt=0)
    held_out: float = Field(0.0, ge=0, lt=1)
    """Share of the labels that is not trained on, drawn by clips and the seed: at every checkpoint is logged
    how often a desirable one has a larger reward than an undesirable one."""
    choose: Choose | None = None
    """How to choose among the checkpoints (one every `save_steps`); without it the last one is published."""

    def conflicts(self) -> Iterator[Conflict]:
        """What the KL term and a choice need."""
        yield from super().conflicts()
        workers = self.hardware.workers if self.hardware else 1
        accumulated = self.trl.get("gradient_accumulation_steps", 1)
        if self.loss == "kto" and type(accumulated) is int and self.batch_size < 2 * workers * accumulated:
            message = (
                f"{self.batch_size} leaves a micro-batch one example, but the KL term of kto needs two: take "
                f"{2 * workers * accumulated} or more for hardware.workers ({workers}) times "
                f"trl.gradient_accumulation_steps ({accumulated}), or loss: apo_zero_unpaired"
            )
            yield Conflict("batch_size", message)
        for name in ("precompute_ref_log_probs", "precompute_ref_batch_size"):
            if name in self.trl:
                message = (
                    f"{name} cannot be used: kto scores the reference before training, in its own micro-"
                )
                yield Conflict("trl", f"{message}batches, because they decide the KL term")
        if self.choose is not None and self.choose.by == "held_out_loss":
            message = "by held_out_loss: a loss of kto depends on who shares a batch; take held_out_accuracy"
            yield Conflict("choose", message)
        if self.choose is not None and self.choose.by == "held_out_accuracy" and not self.held_out:
            message = "by held_out_accuracy needs held-out labels: set held_out, to 0.05 or so"
            yield Conflict("choose", message)

    @property
    def keeps_candidates(self) -> bool:
        """With `choose`."""
        return self.choose is not None

    def needs_facts(self) -> tuple[str, str] | None:
        """Answers to dev questions are judged by the facts."""
        by_facts = self.choose is not None and self.choose.by == "facts"
        return ("choose", "choose: {by: held_out_accuracy}") if by_facts else None

    def describe_work(self, clips: Mapping[str, int]) -> str:
        """Epochs over the labels."""
        return f"{self.epochs:g} epochs, {self.batch_size} labels a step"


class RewardModelConfig(FurtherTrainingConfig):
    """A reward model of preference pairs (arXiv:2203.02155) through TRL: a policy with a scalar head.

    It is refused, and the stage fails, where held-out pairs show that it does not do what it is for.
    """

    produces: ClassVar[OutputKind] = "reward_model"
    trl_config: ClassVar[str | None] = "RewardConfig"
    sequences_per_example: ClassVar[int] = 2
    stage: Literal["reward"]
    pairs: PairsRef
    objective: Objective = Objective()
    epochs: float = Field(1, gt=0)
    held_out: float = Field(0.1, gt=0, lt=1)
    """Share of the pairs that is not trained on, drawn by clips (pairs about one clip stay together) and the
    seed."""
    min_accuracy: float | None = Field(None, ge=0, lt=1)
    """The share of held-out pairs that are ranked right must be above it for certain (95 %), and so must that
    of the pairs of about equal lengths: 0.5 refuses one that counts characters."""
    min_accuracy_over_shuffled: float | None = Field(0.0, ge=0, lt=1)
    """By how much it must rank better, for certain (95 %), than with clips shuffled between the pairs: 0
    refuses a deaf one. null accepts any, and is needed for pairs without clips."""

    def conflicts(self) -> Iterator[Conflict]:
        """A new head beside 4-bit weights."""
        yield from super().conflicts()
        if self.lora is not None and self.lora.bits is not None:
            yield Conflict("lora", "bits: 4 is not for reward models: remove bits")

    def describe_work(self, clips: Mapping[str, int]) -> str:
        """Epochs over the pairs."""
        return f"{self.epochs:g} epochs, {self.batch_size} pairs a step"


class Questions(Config):
    """Prompts that the phrasebook asks about clips whose facts are known."""

    splits: list[Literal["preference", "train"]] = Field(["preference"], min_length=1)
    per_clip: int = Field(1, ge=1)
    """Different questions about each clip; fewer where less can be asked."""


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


RolloutPrompts = Annotated[
    Annotated[Literal["corpus"], Tag("[corpus]")]
    | Annotated[Questions, Tag("[Questions]")]
    | Annotated[Targets, Tag("[Targets]")],
    Discriminator(_kind_of_prompts),
]


class GRPOConfig(FurtherTrainingConfig):
    """Reinforcement learning from rewards: group relative policy optimisation and its kin, through TRL.

    A batch is `batch_size` prompts with `answers` completions each.
    """

    trl_config: ClassVar[str | None] = "GRPOConfig"
    stage: Literal["grpo"]
    prompts: RolloutPrompts = "corpus"
    """`corpus`: its prompts.jsonl. Else questions about clips, or pre-training targets."""
    reward: RewardConfig
    """What a completion is worth."""
    steps: int = Field(ge=1)
    answers: int = Field(8, ge=2)
    """Completions per prompt: the group that each is compared with."""
    loss: Literal["grpo", "dr_grpo", "dapo", "cispo", "rloo", "best_of"] = "dapo"
    """`rloo` is dr_grpo with unscaled advantages. `best_of` trains on the best completion of each group: the
    control that the others must be compared with."""
    beta: float = Field(0.0, ge=0)
    """Weight of the KL to the policy that training starts from, which 0 leaves out."""
    temperature: float = Field(1.0, gt=0)
    max_new_tokens: int = Field(32, ge=1)
    iterations: int = Field(1, ge=1)
    """Optimizer steps for each batch of completions; only after all of them is there a checkpoint."""
    rollout_batch_size: Annotated[int, NoEffect()] = Field(128, ge=1)
    """Prompts that a process completes at a time."""
    choose: Choose | None = None
    """How to choose among the checkpoints (one every `save_steps`); without it the last one is published."""

    def conflicts(self) -> Iterator[Conflict]:
        """Checkpoints in the middle of a batch, choices that need pairs, weights that are divided."""
        yield from super().conflicts()
        for name in ("steps", "save_steps"):
            if getattr(self, name) % self.iterations:
                message = (
                    f"{getattr(self, name)} is not a multiple of iterations ({self.iterations}): a training "
                    "cannot be resumed in the middle of a batch of completions"
                )
                yield Conflict(name, message)
        if self.choose is not None and self.choose.by != "facts":
            yield Conflict("choose", f"by {self.choose.by} needs preference pairs; grpo can choose by facts")
        strategy = self.hardware.strategy if self.hardware else "ddp"
        if strategy in ("zero3", "fsdp2"):
            message = (
                f"strategy {strategy} divides the weights: each token of each completion would gather all of "
                "them again. Take ddp or zero2; where those do not fit, with lora"
            )
            yield Conflict("hardware", message)

    @property
    def keeps_candidates(self) -> bool:
        """With `choose`."""
        return self.choose is not None

    @property
    def sequences_per_example(self) -> int:
        """The completions of a prompt."""
        return self.answers

    @property
    def has_live_reference(self) -> bool:
        """For the KL."""
        return self.beta > 0

    @property
    def n_examples(self) -> int:
        """Prompts that are completed."""
        return self.steps // self.iterations * self.batch_size

    def needs_facts(self) -> tuple[str, str] | None:
        """Questions, the reward `facts`, and dev questions."""
        if isinstance(self.prompts, Questions):
            return "prompts", "prompts: corpus"
        if self.reward.facts:
            return "reward", "reward: {wer: {}}, {choice: {}} or {judge: {model: ...}}"
        return ("choose", "choose: null") if self.choose is not None else None

    def describe_work(self, clips: Mapping[str, int]) -> str:
        """Steps, prompts and completions."""
        n = self.n_examples
        return f"{self.steps:,} steps, {n:,} prompts x {self.answers} = {n * self.answers:,} completions"

"""Keys that all stages that train a model have, and those of pretrain and sft."""

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
    NoEffect,
    OutputKind,
    PolicyRef,
    StageConfig,
)
from align.recipe.config.prompts import PromptSource, Questions
from preference_data.prompts.languages import TEXT_LANGUAGES
from preference_data.prompts.prompts import PromptFormat


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


class RandomPart(Config):
    """A part of the model with random weights."""

    d_model: int = Field(ge=16)
    heads: int = Field(ge=1)
    layers: int = Field(ge=1)

    def conflicts(self) -> Iterator[Conflict]:
        """Heads share the width evenly."""
        if self.d_model % (2 * self.heads):
            yield Conflict("d_model", f"{self.d_model} is not a multiple of 2 x heads ({self.heads})")


class RandomAudio(RandomPart):
    """A Whisper encoder of random weights: the control for what a released one has learned."""

    mel_bins: int = Field(80, ge=16)


class RandomText(RandomPart):
    """A Qwen2 of random weights; its tokenizer is trained on the corpus' texts."""

    vocab_size: int = Field(640, ge=300)


def _kind_of_part(value: Any) -> str:
    """Whether a checkpoint is named, or a shape given."""
    return "[CheckpointRef]" if isinstance(value, str) else "[shape]"


_Kind = Discriminator(_kind_of_part)


class Assemble(Config):
    """A Qwen2-Audio of two models in transformers' format: folders, ids on the Hub, or random weights."""

    audio: Annotated[
        Annotated[RandomAudio, Tag("[shape]")] | Annotated[CheckpointRef, Tag("[CheckpointRef]")], _Kind
    ]
    """A Whisper model; its encoder becomes the audio tower."""
    text: Annotated[
        Annotated[RandomText, Tag("[shape]")] | Annotated[CheckpointRef, Tag("[CheckpointRef]")], _Kind
    ]
    """A Qwen2-family language model; a new projector joins the two."""
    clip_s: int | None = Field(None, ge=1, le=30)
    """Whole seconds that the model hears, longer than the longest clip: Whisper's positions beyond them are
    cut off. By default all, 30 s, to which transformers pads every clip."""


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
    tower_outputs_gb: float | None = Field(None, ge=0)
    """What an audio tower that does not learn gives for each clip is kept in the run folder and computed once
    for all steps and stages (docs/fast_path.md): how much that may take, in 10^9 bytes. By default a tenth
    of what is free, at most 100; 0 keeps nothing."""
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
    """Parts of the model that learn, the rest is frozen. By default those of the stage that `policy` names,
    or of the one that it goes on from in turn; all of them where none says it. The audio tower's sinusoidal
    positions never learn. `new_tokens`, in pretrain with the language model frozen: of its embeddings and
    head the rows of the prompt format's tags and of the marks around audio."""
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
    def passes(self) -> float:
        """How often each clip is heard where the examples are not counted: a reference hears them once."""
        return 1.0

    @property
    def tower_learns(self) -> bool:
        """Whether anything in the audio tower does."""
        return self.train is None or "audio_tower" in self.train

    @property
    def augments(self) -> bool:
        """Whether a clip's features change from example to example."""
        return False

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

    @property
    def augments(self) -> bool:
        """By any part of `augment`."""
        return any(self.augment.model_dump().values())

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

    @property
    def tower_learns(self) -> bool:
        """With LoRA, whether its target matches a layer there."""
        if self.lora is None:
            return super().tower_learns
        return any(re.fullmatch(self.lora.target, name) for name in _LINEAR_LAYERS if "audio_tower" in name)

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
    prompts: PromptSource | None = None
    """Learn the references of these prompts in place of the corpus' chats: the control that reinforcement
    learning must be compared with where references are there."""
    filters: Filters = Filters()
    replay: float = Field(0.0, ge=0, lt=1)
    """Share of each batch's examples drawn from the pre-training targets, so that they are not lost."""

    def conflicts(self) -> Iterator[Conflict]:
        """Filters are for chats."""
        yield from super().conflicts()
        if self.prompts is not None and "filters" in self.model_fields_set:
            yield Conflict(
                "filters", "they leave out chats, of which none is read with prompts; remove one of the two"
            )

    def needs_facts(self) -> tuple[str, str] | None:
        """Questions about clips."""
        return ("prompts", "prompts: corpus") if isinstance(self.prompts, Questions) else None

"""Keys of the stages that align a policy with preferences or rewards: dpo, kto, reward, grpo."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from align.recipe.config.base import (
    Config,
    Conflict,
    EngineName,
    LabelsRef,
    NoEffect,
    OutputKind,
    PairsRef,
    servers_of,
)
from align.recipe.config.prompts import PromptSource, Questions
from align.recipe.config.rewards import RewardConfig
from align.recipe.config.training import TRL_WITHOUT_EFFECT, FurtherTrainingConfig
from preference_data.prompts.prompts import PromptFormat
from preference_data.schema import Axis


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
    max_over_abstention: float | None = Field(None, ge=0, le=1)
    """For `facts`: of the answerable dev questions, the most that a checkpoint may refuse to answer. Where
    all exceed it, the one that does so least is published, with a warning."""

    def conflicts(self) -> Iterator[Conflict]:
        """Abstentions are counted in answers."""
        if self.max_over_abstention is not None and self.by != "facts":
            yield Conflict("max_over_abstention", f"needs by: facts, not {self.by}")


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

    @property
    def passes(self) -> float:
        """Epochs, and one of the reference."""
        return self.epochs + 1

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

    @property
    def passes(self) -> float:
        """Epochs, and one of the reference."""
        return self.epochs + 1

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

    @property
    def passes(self) -> float:
        """Epochs."""
        return float(self.epochs)

    def describe_work(self, clips: Mapping[str, int]) -> str:
        """Epochs over the pairs."""
        return f"{self.epochs:g} epochs, {self.batch_size} pairs a step"


class Replay(Config):
    """Pre-training targets that are learned beside the reward."""

    weight: float = Field(1.0, gt=0)
    """Of their loss, beside that of the completions."""
    prompt_format: PromptFormat = "sentences"


class GRPOConfig(FurtherTrainingConfig):
    """Reinforcement learning from rewards: group relative policy optimisation and its kin, through TRL.

    A batch is `batch_size` prompts with `answers` completions each.
    """

    trl_config: ClassVar[str | None] = "GRPOConfig"
    stage: Literal["grpo"]
    prompts: PromptSource = "corpus"
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
    replay: Replay | None = None
    """Add the next-token loss of as many pre-training targets of the corpus as there are prompts in a step
    (arXiv:2203.02155, equation 2), or what is not rewarded is forgotten."""
    engine: EngineName = "transformers"
    """`vllm`: a server beside each process, which gets the weights before each batch of completions; it draws
    by other random numbers. On a GPU it takes what `hardware: {memory_gb: ...}` leaves of the memory."""
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
        if self.engine == "vllm" and self.lora is not None and self.lora.bits is not None:
            message = "vllm is sent merged weights, and those of 4 bits cannot be merged exactly: remove bits"
            yield Conflict("engine", f"{message}, or engine")

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
        work = f"{self.steps:,} steps, {n:,} prompts x {self.answers} = {n * self.answers:,} completions"
        return work + servers_of(self.engine, self.hardware.workers if self.hardware else 1)

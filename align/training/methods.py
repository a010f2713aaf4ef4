"""The ways to train, each with all by which it differs from the others; `run.train` does the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from trl import DPOConfig, SFTConfig

from align.models.features import ClipFeatures
from align.training.augmentation import Augmentation, SpecAugment
from align.training.collate import PreferenceCollator, Row, SFTCollator
from align.training.data_loading import Examples, ReplacingCollator, Rows, ShuffledRows
from align.training.lengths import Lengths, Longest
from align.training.reference import ReferenceStore
from align.training.trainers import AudioDPOTrainer, AudioSFTTrainer, AudioTrainer
from align.training.tuning import Tuning


@dataclass(frozen=True)
class Schedule:
    """How long and how fast: `batch_size` examples in each of `steps` optimizer steps over all processes."""

    steps: int
    batch_size: int
    learning_rate: float
    save_steps: int
    seed: int


class Method(Protocol):
    """All by which one way to train differs from another."""

    @property
    def config(self) -> type[Any]:
        """TRL's config class."""
        ...

    @property
    def trl(self) -> Mapping[str, Any]:
        """Arguments of it that the method sets; the recipe's come after them."""
        ...

    def order(self, schedule: Schedule) -> Examples | ShuffledRows:
        """The examples of the whole training in their order."""
        ...

    def longest(self, lengths: Lengths, tuning: Tuning) -> Longest:
        """The example that needs most memory."""
        ...

    def has_reference_model(self, settings: Mapping[str, Any], tuning: Tuning) -> bool:
        """Whether a second, frozen model stands beside the one that learns."""
        ...

    def collator(self, processor: Any, features: ClipFeatures, packed: bool) -> Callable[..., dict[str, Any]]:
        """Rows -> a batch."""
        ...

    def trainer(self, **common: Any) -> AudioTrainer:
        """A trainer with the arguments that all have in common."""
        ...


@dataclass(frozen=True)
class SupervisedFineTuning:
    """Next-token training on examples in their order: pre-training and SFT."""

    examples: Examples
    augmentation: Augmentation | SpecAugment = Augmentation()
    max_bad_fraction: float = 0.01
    config: type[Any] = SFTConfig
    trl: Mapping[str, Any] = field(default_factory=dict)

    def order(self, schedule: Schedule) -> Examples:
        """The examples themselves: their numbers decide what they are."""
        return self.examples

    def longest(self, lengths: Lengths, tuning: Tuning) -> Longest:
        """The longest of many draws."""
        return lengths.longest_example(self.examples)

    def has_reference_model(self, settings: Mapping[str, Any], tuning: Tuning) -> bool:
        """Never."""
        return False

    def collator(self, processor: Any, features: ClipFeatures, packed: bool) -> ReplacingCollator:
        """Collates chats and texts; clips that cannot be read are replaced."""
        return ReplacingCollator(SFTCollator(processor, features, self.augmentation, packed), self.examples)

    def trainer(self, **common: Any) -> AudioSFTTrainer:
        """TRL's SFT."""
        return AudioSFTTrainer(max_bad_fraction=self.max_bad_fraction, **common)


@dataclass(frozen=True)
class DirectPreferenceOptimisation:
    """DPO (arXiv:2305.18290) on weighted pairs, with held-out pairs evaluated at every checkpoint."""

    rows: Sequence[Row]
    loss: str
    beta: float
    reference: ReferenceStore
    held_out: Sequence[Row] = ()
    config: type[Any] = DPOConfig

    @property
    def trl(self) -> dict[str, Any]:
        """Loss, beta, and a reference whose log-probs are computed once."""
        return {"loss_type": [self.loss], "beta": self.beta, "precompute_ref_log_probs": True}

    def order(self, schedule: Schedule) -> ShuffledRows:
        """Shuffled epochs over the pairs."""
        return ShuffledRows(self.rows, schedule.steps * schedule.batch_size, schedule.seed)

    def longest(self, lengths: Lengths, tuning: Tuning) -> Longest:
        """The pair with most tokens."""
        return lengths.longest_pair(self.rows, packed=tuning.packed)

    def has_reference_model(self, settings: Mapping[str, Any], tuning: Tuning) -> bool:
        """Unless its log-probs are computed before, or the policy without its adapters is the reference."""
        return tuning.lora is None and not settings["precompute_ref_log_probs"]

    def collator(self, processor: Any, features: ClipFeatures, packed: bool) -> PreferenceCollator:
        """Collates pairs."""
        return PreferenceCollator(processor, features, packed)

    def trainer(self, **common: Any) -> AudioDPOTrainer:
        """TRL's DPO."""
        held_out = Rows(self.held_out) if self.held_out else None
        return AudioDPOTrainer(eval_dataset=held_out, reference=self.reference, **common)

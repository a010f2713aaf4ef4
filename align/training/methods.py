"""The ways to train, each as the values by which it differs from the others; `run.train` does the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from trl import DPOConfig, SFTConfig

from align.models.features import ClipFeatures
from align.training.augmentation import Augmentation, SpecAugment
from align.training.collate import PreferenceCollator, Row, SFTCollator
from align.training.data_loading import Examples, ReplacingCollator, Rows, ShuffledRows
from align.training.lengths import Lengths, Longest
from align.training.reference import ReferenceStore
from align.training.trainers import AudioDPOTrainer, AudioSFTTrainer, AudioTrainer


@dataclass(frozen=True)
class Schedule:
    """How long and how fast: `batch_size` examples in each of `steps` optimizer steps over all processes."""

    steps: int
    batch_size: int
    learning_rate: float
    save_steps: int
    seed: int


@dataclass(frozen=True)
class Method:
    """A way to train: its examples in order, its trainer, and how rows become batches for it."""

    examples: Examples | ShuffledRows
    rows: Callable[[], Iterable[Row]]
    """Every distinct example."""
    longest: Callable[[Lengths, bool], Longest]
    """The example that needs most memory, packed or not."""
    collator: Callable[[Any, ClipFeatures, bool], Callable[[Sequence[Row]], dict[str, Any]]]
    """Takes a processor, features, and whether batches are packed."""
    trainer: Callable[..., AudioTrainer]
    config: type[Any]
    """TRL's config class."""
    trl: Mapping[str, Any] = field(default_factory=dict)
    """Its arguments that the method sets; the recipe's come after them."""


def supervised_fine_tuning(
    examples: Examples, augmentation: Augmentation | SpecAugment, max_bad_fraction: float
) -> Method:
    """Next-token training on examples in their order: pre-training and SFT.

    More than `max_bad_fraction` unreadable clips stop it; fewer are replaced.
    """
    return Method(
        examples,
        lambda: examples.distinct,
        lambda lengths, packed: lengths.longest_example(examples),
        lambda processor, features, packed: ReplacingCollator(
            SFTCollator(processor, features, augmentation, packed), examples
        ),
        partial(AudioSFTTrainer, max_bad_fraction=max_bad_fraction),
        SFTConfig,
    )


def direct_preference_optimisation(
    rows: Sequence[Row],
    schedule: Schedule,
    *,
    loss: str,
    beta: float,
    reference: ReferenceStore,
    held_out: Sequence[Row] = (),
) -> Method:
    """DPO (arXiv:2305.18290) in shuffled epochs over weighted pairs; `held_out` ones are evaluated."""
    return Method(
        ShuffledRows(rows, schedule.steps * schedule.batch_size, schedule.seed),
        lambda: [*rows, *held_out],
        lambda lengths, packed: lengths.longest_pair(rows, packed=packed),
        PreferenceCollator,
        partial(AudioDPOTrainer, eval_dataset=Rows(held_out) if held_out else None, reference=reference),
        DPOConfig,
        {"loss_type": [loss], "beta": beta, "precompute_ref_log_probs": True},
    )

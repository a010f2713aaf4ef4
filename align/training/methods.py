"""The ways to train, each as the values by which it differs from the others; `run.train` does the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from types import MappingProxyType
from typing import Any

from trl import DPOConfig, GRPOConfig, KTOConfig, RewardConfig, SFTConfig

from align.generation.engine import Engine
from align.models.features import ClipFeatures
from align.models.qwen2_audio import model as qwen2_audio
from align.models.qwen2_audio import reward_model
from align.rewards.reward import Reward
from align.training.augmentation import Augmentation, SpecAugment
from align.training.checkpoints import Load
from align.training.collate import LabelCollator, PreferenceCollator, Row, SFTCollator
from align.training.data_loading import Examples, ReplacingCollator, Rows, ShuffledRows
from align.training.grpo_trainer import AudioGRPOTrainer, BestOfTrainer, Replay
from align.training.lengths import Lengths, Longest
from align.training.reference import ReferenceStore
from align.training.trainers import (
    AudioDPOTrainer,
    AudioKTOTrainer,
    AudioRewardTrainer,
    AudioSFTTrainer,
    AudioTrainer,
)


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
    sequences: int = 1
    """How many TRL counts for an example in its batch sizes."""
    has_live_reference: Callable[[Mapping[str, Any]], bool] = lambda trl: False
    """Whether, with these arguments and no adapters, a frozen model stands beside the one that learns."""
    load: Load = qwen2_audio.load_model
    """What reads what was trained."""
    augmentation: Augmentation | SpecAugment = field(default_factory=Augmentation)
    """Of the clips' features."""
    least_micro_batch: int = 1
    """Fewest examples that the loss is computed of at a time. Above 1 it depends on which examples share a
    micro-batch, so they are not sorted into them by length."""


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
        {"max_length": None},
        augmentation=augmentation,
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
        {"max_length": None, "loss_type": [loss], "beta": beta, "precompute_ref_log_probs": True},
        has_live_reference=lambda trl: not trl["precompute_ref_log_probs"],
    )


def kahneman_tversky_optimisation(
    rows: Sequence[Row],
    schedule: Schedule,
    *,
    loss: str,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
    reference: ReferenceStore,
    held_out: Sequence[Row] = (),
) -> Method:
    """KTO (arXiv:2402.01306) in shuffled epochs over weighted labels; `held_out` ones are evaluated."""
    with_kl = loss == "kto"
    return Method(
        ShuffledRows(rows, schedule.steps * schedule.batch_size, schedule.seed),
        lambda: [*rows, *held_out],
        lambda lengths, packed: lengths.longest_label(rows, packed=packed),
        lambda processor, features, packed: LabelCollator(processor, features, packed, with_kl),
        partial(AudioKTOTrainer, eval_dataset=Rows(held_out) if held_out else None, reference=reference),
        KTOConfig,
        {
            "max_length": None,
            "loss_type": loss,
            "beta": beta,
            "desirable_weight": desirable_weight,
            "undesirable_weight": undesirable_weight,
            "precompute_ref_log_probs": True,
        },
        least_micro_batch=2 if with_kl else 1,
    )


def reward_modelling(rows: Sequence[Row], schedule: Schedule, held_out: Sequence[Row]) -> Method:
    """A reward model (arXiv:2203.02155, eq. 1) in shuffled epochs over weighted pairs.

    `held_out` ones are evaluated at every checkpoint. A new head is drawn from the schedule's seed.
    """
    return Method(
        ShuffledRows(rows, schedule.steps * schedule.batch_size, schedule.seed),
        lambda: [*rows, *held_out],
        lambda lengths, packed: lengths.longest_pair(rows, packed=packed),
        PreferenceCollator,
        partial(AudioRewardTrainer, eval_dataset=Rows(held_out)),
        RewardConfig,
        {"max_length": None},
        load=partial(reward_model.load_model, head_seed=schedule.seed),
    )


GRPO_LOSSES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "grpo": {"loss_type": "grpo", "scale_rewards": "group"},
        "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none"},
        "dapo": {"loss_type": "dapo", "scale_rewards": "group"},
        # TRL's own bound for the ratio is 1.2, but it bounds cispo's from above by epsilon_high itself
        "cispo": {"loss_type": "cispo", "scale_rewards": "group", "epsilon_high": 5.0},
        # The gradient of RLOO times (G - 1) / (G * max_new_tokens), which Adam does not see
        "rloo": {"loss_type": "dr_grpo", "scale_rewards": "none"},
        "best_of": {"loss_type": "dapo", "scale_rewards": "none"},
    }
)
"""Our name -> TRL's arguments. GRPO (arXiv:2402.03300), Dr. GRPO (arXiv:2503.20783), DAPO
(arXiv:2503.14476), CISPO (arXiv:2506.13585), RLOO (arXiv:2402.14740), and best-of-n fine-tuning
(arXiv:2304.06767) as a control."""


def group_relative_policy_optimisation(
    rows: Sequence[Row],
    schedule: Schedule,
    *,
    loss: str,
    beta: float,
    completions: int,
    temperature: float,
    max_new_tokens: int,
    iterations: int,
    reward: Reward,
    rollout_batch_size: int,
    open_engine: Callable[[ClipFeatures], Engine] | None = None,
    replay: Replay | None = None,
) -> Method:
    """GRPO in shuffled epochs over prompts, of each of which `completions` are drawn and rewarded.

    A batch of completions is used for `iterations` optimizer steps. `rollout_batch_size` prompts are
    completed at a time in each process, by the policy itself or by what `open_engine` starts there.
    `replay` is learned beside them.
    """
    targets = [] if replay is None else [replay.examples]
    return Method(
        ShuffledRows(rows, schedule.steps // iterations * schedule.batch_size, schedule.seed),
        lambda: chain(rows, *(examples.distinct for examples in targets)),
        lambda lengths, packed: lengths.together(
            lengths.longest_group(rows, completions, max_new_tokens, packed=packed),
            *map(lengths.longest_example, targets),
        ),
        lambda processor, features, packed: SFTCollator(processor, features, packed=packed),
        partial(
            BestOfTrainer if loss == "best_of" else AudioGRPOTrainer,
            reward=reward,
            rollout_batch_size=rollout_batch_size,
            open_engine=open_engine,
            replay=replay,
        ),
        GRPOConfig,
        {
            **GRPO_LOSSES[loss],
            "beta": beta,
            "num_generations": completions,
            "temperature": temperature,
            "max_completion_length": max_new_tokens,
            "num_iterations": iterations,
            "reward_weights": list(reward.weights.values()),
            "shuffle_dataset": False,
            "dataloader_num_workers": 0,  # it loads prompts; the engine and the loss look up their clips
        },
        sequences=completions,
        has_live_reference=lambda trl: trl["beta"] > 0,
    )

"""From the configs of training stages to the values of `align.training`."""

from __future__ import annotations

import math
from pathlib import Path

from align.models.qwen2_audio import model as qwen2_audio
from align.recipe.config.alignment import Choose, DPOConfig, GRPOConfig, KTOConfig
from align.recipe.config.training import FurtherTrainingConfig, Hardware, TrainingConfig
from align.run_folder.artifacts import StageFolder
from align.training import run as training
from align.training.dev_score import DevScore
from align.training.methods import Method, Schedule
from align.training.run import CheckpointChoice
from align.training.tuning import LoRA, Tuning


def tuning_of(config: TrainingConfig) -> Tuning:
    """The parts that learn, and over which processes, by a stage's config."""
    hardware = config.hardware or Hardware()
    lora = config.lora if isinstance(config, FurtherTrainingConfig) else None
    return Tuning(
        train=None if config.train is None else tuple(config.train),
        lora=None if lora is None else LoRA(**lora.model_dump()),
        strategy=hardware.strategy,
        offload=hardware.offload,
        memory_gb=hardware.memory_gb,
        tower_outputs_gb=hardware.tower_outputs_gb,
        packed=bool(config.packed),
        attention=config.packed if isinstance(config.packed, str) else None,
    )


def schedule_of(config: TrainingConfig, steps: int) -> Schedule:
    """So many steps, at the rate that a stage's config says."""
    return Schedule(steps, config.batch_size, config.learning_rate, config.save_steps, config.seed)


def steps_of(n_examples: int, epochs: float, batch_size: int) -> int:
    """Steps in which every example is seen `epochs` times on average."""
    return math.ceil(n_examples * epochs / batch_size)


def train_policy(
    config: DPOConfig | KTOConfig | GRPOConfig,
    method: Method,
    schedule: Schedule,
    policy: Path | str,
    processor: qwen2_audio.Qwen2AudioProcessor,
    corpus: Path,
    out: StageFolder,
) -> dict[str, float]:
    """Train a policy further, and choose its checkpoint, as a stage's config says; see `training.train`."""
    tuning = tuning_of(config)
    return training.train(
        method,
        tuning.load(policy),
        processor,
        corpus,
        out,
        schedule=schedule,
        tuning=tuning,
        trl=config.trl,
        base=policy,
        choice=choice_of(config.choose, policy, corpus, out.path.parent),
    )


def choice_of(choose: Choose | None, policy: Path | str, corpus: Path, run: Path) -> CheckpointChoice | None:
    """How the published checkpoint is chosen, by what a stage's config says."""
    match choose:
        case None:
            return None
        case Choose(by="held_out_loss"):
            return CheckpointChoice("held_out/loss", is_better_larger=False)
        case Choose(by="held_out_accuracy"):
            return CheckpointChoice("held_out/accuracy")
        case _:
            limit = choose.max_over_abstention
            return CheckpointChoice(
                "dev/score",
                score=DevScore(policy, corpus, choose.questions, choose.max_new_tokens, run),
                limits={} if limit is None else {"dev/over_abstention": limit},
            )

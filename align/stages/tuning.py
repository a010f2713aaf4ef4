"""From the configs of training stages to the values of `align.training`."""

from __future__ import annotations

from pathlib import Path

from align.recipe.config.alignment import Choose
from align.recipe.config.training import FurtherTrainingConfig, Hardware, TrainingConfig
from align.training.dev_score import DevScore
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
        packed=bool(config.packed),
        attention=config.packed if isinstance(config.packed, str) else None,
    )


def choice_of(choose: Choose | None, policy: Path | str, corpus: Path) -> CheckpointChoice | None:
    """How the published checkpoint is chosen, by what a stage's config says."""
    match choose:
        case None:
            return None
        case Choose(by="held_out_loss"):
            return CheckpointChoice("held_out/loss", is_better_larger=False)
        case Choose(by="held_out_accuracy"):
            return CheckpointChoice("held_out/accuracy")
        case _:
            return CheckpointChoice(
                "dev/score", score=DevScore(policy, corpus, choose.questions, choose.max_new_tokens)
            )

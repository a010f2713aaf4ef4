"""From the configs of training stages to the values of `align.training`."""

from __future__ import annotations

from align.recipe.config.training import FurtherTrainingConfig, Hardware, TrainingConfig
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

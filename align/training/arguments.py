"""Trainer arguments that follow from what the training stages were told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from align.training import ranks
from align.training.memory import MicroBatchPlan
from align.training.tuning import Tuning

_HERE = Tuning()


def arguments(
    folder: Path,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    save_steps: int,
    seed: int,
    tuning: Tuning = _HERE,
    plan: MicroBatchPlan | None = None,
    passed_on: dict[str, Any],
) -> dict[str, Any]:
    """Keyword arguments for TRL's config classes; `passed_on` is the recipe's `trl:` mapping.

    It says into how many micro-batches a step is divided, unless there is a `plan`.

    Raises:
        ValueError: the batch cannot be divided evenly over devices and accumulation steps.
    """
    accumulation = int(passed_on.get("gradient_accumulation_steps", 1))
    if plan is not None:
        accumulation = plan.accumulation_steps
    parts = ranks.world_size() * accumulation
    if batch_size % parts:
        raise ValueError(
            f"batch_size {batch_size} cannot be split evenly over {parts} (devices x accumulation steps)"
        )
    on_gpu = torch.cuda.is_available()
    return {
        "output_dir": str(folder / "checkpoints"),
        "max_steps": steps,
        "per_device_train_batch_size": batch_size // parts,
        "gradient_accumulation_steps": accumulation,
        "learning_rate": learning_rate,
        "save_steps": save_steps,
        "seed": seed,
        "bf16": on_gpu,  # on a CPU mixed precision only costs time and accuracy
        "dataloader_pin_memory": on_gpu,
        "activation_checkpointing": False,
        "logging_steps": 10,
        "logging_nan_inf_filter": False,  # it would log a NaN loss as 0
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "report_to": "none",
        "max_length": None,
        **tuning.arguments(),
        **passed_on,
    }

"""A training stage plans its passes by the memory that there is. The arithmetic is `align.memory_plan`'s."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import Qwen2AudioForConditionalGeneration

from align.planning import estimate
from align.planning.estimate import Job, Shape
from align.planning.memory_plan import Plan, by_hand, plan
from align.training import processes
from align.training.recompute import compute_again
from align.training.tuning import Tuning


def plan_passes(
    model: Qwen2AudioForConditionalGeneration,
    tuning: Tuning,
    trl: Mapping[str, Any],
    *,
    name: str,
    batch_size: int,
    job: Job,
    longest: Callable[[Job, Shape], Job],
) -> Plan | None:
    """Choose how a step's examples pass through `model`, say so, and ready it; None where nothing is planned.

    Nothing is where the recipe's `trl` has planned, or the memory is unknown: on a CPU, unless it is told.

    Args:
        model: before PEFT or a trainer wraps it.
        tuning: what learns, where, and in how much memory.
        trl: of the recipe.
        name: of the stage, for what is printed.
        batch_size: examples per step over all processes.
        job: see `job_of`.
        longest: `job` with the lengths of the longest example. Asked by rank 0 alone.
    """
    available = _available(tuning.memory_gb)
    if by_hand(trl) or available is None:
        return None
    shape = estimate.shape_of_config(model.config.to_dict())
    workers, made = processes.world_size(), None
    if processes.is_first():
        examples = max(1, batch_size // workers)
        example = longest(job, shape)
        made = plan(
            shape, example, tuning.strategy, workers, tuning.offload, examples=examples, available=available
        )
        print(f"{name}: {made.why}", flush=True)
    made = processes.broadcast(made)
    if made is not None:
        of_tower, of_language = estimate.recomputed(shape, job._replace(recomputed=made.recomputed))
        compute_again(model.model.audio_tower.layers[:of_tower])
        compute_again(model.model.language_model.layers[:of_language])
    return made


def job_of(tuning: Tuning, *, pairs: bool, with_reference: bool = False) -> Job:
    """A pass of one example, or one pair, of no length yet."""
    size = 2 if torch.cuda.is_available() else 4
    example = Job(
        sequences=1,
        clips=0,
        audio_tokens=0,
        text_tokens=0,
        parts=tuning.train,
        lora_rank=None if tuning.lora is None else tuning.lora.r,
        frozen_bytes=0.6 if tuning.lora is not None and tuning.lora.bits else size,
        element_bytes=size,
        with_reference=with_reference,
        packed=tuning.packed,
    )
    return example.as_pair() if pairs else example


def told(made: Plan | None) -> dict[str, float]:
    """A plan as metrics of its stage."""
    if made is None:
        return {}
    figures = {"passes": made.passes, "recomputed_layers": made.recomputed}
    return {**figures, "planned_gb": made.memory.total / 1e9}


def _available(given_gb: float | None) -> float | None:
    """Bytes that every process may use."""
    if given_gb is not None:
        return given_gb * 1e9
    if not torch.cuda.is_available():
        return None
    return min(
        processes.gather(float(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory))
    )

"""How a step's examples go through the model so that they fit the memory: measured, not estimated.

Before a trainer is built, rank 0 runs its longest example forward and backward and measures what that needs
beside the weights. As many examples at a time as fit are one micro-batch. If not even one example fits, it
goes alone, with the fewest layers checkpointed (see `recompute`) with which it was measured to fit. What
stands in memory all the time (weights, gradients, optimizer) follows from the strategy, see
`align.planning.estimate`. The plan is kept in the stage folder: a resumed run takes the same one.
"""

from __future__ import annotations

import ctypes
import gc
import math
import platform
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import send_to_device
from peft import get_peft_model
from torch import Tensor, nn
from transformers import Qwen2AudioForConditionalGeneration

from align.models.scoring import MODEL_INPUTS
from align.planning import estimate
from align.run_folder.artifacts import read_kept, write_json
from align.training import processes
from align.training.collate import Row
from align.training.lengths import Longest
from align.training.processes import local_device
from align.training.recompute import checkpoint_layers, restore_layers
from align.training.tuning import Tuning

PLAN = "micro_batches.json"
"""In a stage folder: the plan, and for which processes it was made."""
MARGIN = 1.2
"""Activations may take so many times what was measured: fragmentation, batches of another shape."""
BY_HAND = ("gradient_accumulation_steps", "activation_checkpointing", "gradient_checkpointing")
"""Names in a recipe's `trl:` of which any one says that its author has planned."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


class MicroBatchPlan(NamedTuple):
    """What each process does in a step: `accumulation_steps` times `micro_batch` examples."""

    micro_batch: int
    accumulation_steps: int
    audio_layers: int
    """The first layers of the audio tower that are checkpointed."""
    text_layers: int
    """The first layers of the language model that are checkpointed."""
    gb: float
    """Of one process with the longest examples, 10^9 bytes: activations measured, the rest by arithmetic."""
    reason: str

    @property
    def metrics(self) -> dict[str, float]:
        """As metrics of the stage."""
        return {
            "micro_batch": float(self.micro_batch),
            "accumulation_steps": float(self.accumulation_steps),
            "checkpointed_layers": float(self.audio_layers + self.text_layers),
            "planned_gb": self.gb,
        }

    def checkpoint(self, model: Qwen2AudioForConditionalGeneration) -> None:
        """Apply activation checkpointing to `model`, before PEFT or a trainer wraps it."""
        checkpoint_layers(model.model.audio_tower.layers[: self.audio_layers])
        checkpoint_layers(model.model.language_model.layers[: self.text_layers])


def plan_micro_batches(
    model: Qwen2AudioForConditionalGeneration,
    tuning: Tuning,
    trl: Mapping[str, Any],
    *,
    name: str,
    folder: Path,
    batch_size: int,
    longest: Callable[[], Longest],
    collate: Callable[[Sequence[Row]], Mapping[str, Any]],
    least: int = 1,
    with_reference: bool = False,
) -> MicroBatchPlan | None:
    """Choose how a step's examples pass through `model`; None where nothing is planned.

    That is so where the recipe's `trl` has planned, or the memory is unknown: on a CPU, unless the recipe
    says it. The model is left as it was, and no random number is drawn.

    Args:
        model: prepared by `tuning`, before PEFT or a trainer wraps it.
        tuning: what learns, where, and in how much memory.
        trl: of the recipe.
        name: of the stage, for the line that says why.
        folder: of the stage, where the plan is kept.
        batch_size: examples per step over all processes.
        longest: the example that needs most; called by rank 0 alone.
        collate: the trainer's collator.
        least: fewest examples of a micro-batch.
        with_reference: a second, frozen model stands beside the one that learns.
    """
    available = _available(tuning.memory_gb)
    if any(name in trl for name in BY_HAND) or available is None:
        return None
    plan = None
    if processes.is_first():
        circumstances = {
            "workers": processes.world_size(),
            "strategy": tuning.strategy,
            "offload": tuning.offload,
            "memory_gb": tuning.memory_gb,
            "batch_size": batch_size,
            "device": local_device().type,
        }
        plan = _kept_plan(folder / PLAN, circumstances)
        if plan is None:
            examples = max(1, batch_size // processes.world_size())
            plan = _measured_plan(
                model, tuning, longest(), collate, examples, available, least, with_reference
            )
            write_json(folder / PLAN, {"for": circumstances, "plan": plan._asdict()})
        print(f"{name}: {plan.reason}", flush=True)
    return processes.broadcast(plan)


def _kept_plan(path: Path, circumstances: dict[str, Any]) -> MicroBatchPlan | None:
    """The plan of an earlier attempt under the same circumstances."""
    saved = read_kept(path)
    return MicroBatchPlan(**saved["plan"]) if saved and saved["for"] == circumstances else None


def _available(given_gb: float | None) -> float | None:
    """Bytes that every process may use: by default the smallest of what is free on their GPUs."""
    if given_gb is not None:
        return given_gb * 1e9
    if not torch.cuda.is_available():
        return None
    gc.collect()
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(local_device())
    own = torch.cuda.memory_allocated(local_device())
    return float(
        min(processes.gather((free + own) // 10**9 * 10**9))
    )  # whole GB: repeated runs plan the same


# -------------------------------------------------------------------------- the choice


class Choice(NamedTuple):
    """`micro_batch` examples at a time, `checkpointed` layers, and what their activations take."""

    micro_batch: int
    checkpointed: int
    activations: float
    full_activations: float
    """Bytes of one example with nothing checkpointed; infinite if it did not fit."""


def choose(
    measure: Callable[[int], float], *, examples: int, room: float, layers: int, least: int = 1
) -> Choice:
    """The most examples at a time that fit, or else the fewest and the fewest checkpointed layers.

    Args:
        measure: bytes of activations of the longest example with so many layers checkpointed; infinite
            where it ran out of memory.
        examples: of a process and step; micro-batches are of equal size.
        room: bytes that activations may take.
        layers: that can be checkpointed. The last of all never is: it would be computed again at once,
            with its own activations beside its input.
        least: fewest examples at a time.
    """
    measure = cache(measure)
    full = measure(0)
    sizes = [n for n in range(examples, 0, -1) if examples % n == 0 and n >= min(least, examples)]
    for size in sizes:
        if size * full <= room:
            return Choice(size, 0, size * full, full)
    fewest, counts = sizes[-1], range(1, layers)
    at = bisect_left(counts, True, key=lambda n: fewest * measure(n) <= room)
    n = counts[min(at, len(counts) - 1)] if counts else 0
    return Choice(fewest, n, fewest * measure(n), full)


def _measured_plan(
    model: Qwen2AudioForConditionalGeneration,
    tuning: Tuning,
    longest: Longest,
    collate: Callable[[Sequence[Row]], Mapping[str, Any]],
    examples: int,
    available: float,
    least: int,
    with_reference: bool,
) -> MicroBatchPlan:
    batch = {name: value for name, value in collate([longest.row]).items() if name in MODEL_INPUTS}
    audio, text = model.model.audio_tower.layers, model.model.language_model.layers
    noun = "pair" if "chosen" in longest.row else "example"
    with _as_trained(model, tuning):
        standing = _standing(model, tuning, with_reference)
        n_audio = len(audio) if any(p.requires_grad for p in audio.parameters()) else 0
        in_order = [*audio[:n_audio], *text]
        choice = choose(
            lambda n: longest.factor * _activations(model, batch, in_order[:n], _autocasts(tuning)),
            examples=examples,
            room=(available - standing) / MARGIN,
            layers=len(in_order),
            least=least,
        )
    reason = _reason(choice, noun, examples, len(in_order), standing, available)
    of_audio = min(choice.checkpointed, n_audio)
    total = standing + choice.activations
    return MicroBatchPlan(
        choice.micro_batch,
        examples // choice.micro_batch,
        of_audio,
        choice.checkpointed - of_audio,
        total / 1e9 if math.isfinite(total) else available / 1e9,
        reason,
    )


def _reason(choice: Choice, noun: str, examples: int, layers: int, standing: float, available: float) -> str:
    room = (available - standing) / MARGIN
    n, steps = choice.micro_batch, examples // choice.micro_batch
    batches = f"{steps} micro-batch{'es' * (steps > 1)} of {n} {noun}{'s' * (n > 1)}"
    checkpointed = f"{choice.checkpointed} of {layers} layers checkpointed"
    if choice.activations > room:
        return (
            f"does not fit {_size(available)}: weights, gradients, optimizer and overhead take "
            f"{_size(standing)}, activations of {'one' if n == 1 else n} {noun}{'s' * (n > 1)} "
            f"{_size(choice.activations)} with {checkpointed}. "
            "Take strategy: zero3, more workers, offload: optimizer, lora, or leave out the longest examples "
            f"(the corpus' max_duration_s). It is tried all the same, as {batches}"
        )
    may = f"{_size(room)} may be used for them"
    if choice.checkpointed:
        needed = (
            _size(choice.full_activations) if math.isfinite(choice.full_activations) else "more than there is"
        )
        return f"{batches}, {checkpointed}: all activations of one {noun} take {needed}, {may}"
    return f"{batches}: activations of {_size(choice.activations)}, {may}; no layer is checkpointed"


def _size(n: float) -> str:
    return f"{n / 1e9:.1f} GB" if n >= 1e8 else f"{n / 1e6:.2f} MB"


# -------------------------------------------------------------------------- the measurement


@contextmanager
def _as_trained(model: Qwen2AudioForConditionalGeneration, tuning: Tuning) -> Iterator[None]:
    """The model on its device, training, with the adapters it will get; afterwards as it was."""
    learning = [(weight, weight.requires_grad) for weight in model.parameters()]
    before, was_training, device = model.device, model.training, local_device()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        adapted = model if tuning.peft_config is None else get_peft_model(model, tuning.peft_config)
        adapted.train()
        if before != device:
            adapted.to(device)
        try:
            yield
        finally:
            if adapted is not model:
                adapted.unload()
            for weight, flag in learning:
                weight.requires_grad_(flag)
            model.zero_grad(set_to_none=True)
            model.train(was_training)
            if before != device:
                model.to(before)
                torch.cuda.empty_cache()


def _standing(model: nn.Module, tuning: Tuning, with_reference: bool) -> float:
    """Bytes that are there before the first example."""
    weights = list(model.parameters())
    size = 2 if torch.cuda.is_available() else 4
    learned = sum(weight.numel() for weight in weights if weight.requires_grad)
    frozen = sum(weight.nbytes for weight in weights if not weight.requires_grad)
    whole = sum(weight.numel() for weight in weights)
    frozen += size * whole if with_reference else 0
    states = estimate.model_states(
        learned, frozen, whole, tuning.strategy, processes.world_size(), tuning.offload, size
    )
    return sum(states) + estimate.OVERHEAD


def _autocasts(tuning: Tuning) -> bool:
    """Whether the Trainer casts what it computes to bfloat16; DeepSpeed's weights are so themselves."""
    return torch.cuda.is_available() and tuning.strategy in ("ddp", "fsdp2")


def _activations(
    model: Qwen2AudioForConditionalGeneration,
    batch: Mapping[str, Any],
    checkpointed: Sequence[nn.Module],
    autocast: bool,
) -> float:
    """Bytes that a forward and backward pass needs beside weights and gradients; infinite if there are none.

    The backbone alone: the head scores labelled positions in tiles, which `estimate.OVERHEAD` stands for.
    """
    inputs = send_to_device(dict(batch), model.device)

    def forward() -> Tensor:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=autocast):
            hidden: Tensor = model.model(**inputs, use_cache=False).last_hidden_state
        return hidden

    checkpoint_layers(checkpointed)
    try:
        if model.device.type == "cuda":
            return _peak_on_gpu(model, forward, model.device)
        return kept_by_autograd(model, forward, checkpointed)
    except torch.OutOfMemoryError:
        return math.inf
    finally:
        restore_layers(checkpointed)


def _peak_on_gpu(model: nn.Module, forward: Callable[[], Tensor], device: torch.device) -> float:
    """By torch's allocator; gradients, which the strategy's arithmetic counts, are dropped as they come."""

    def drop(weight: Tensor) -> None:
        weight.grad = None

    learned = [weight for weight in model.parameters() if weight.requires_grad]
    hooks = [weight.register_post_accumulate_grad_hook(drop) for weight in learned]
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    try:
        forward().sum().backward()
        return float(torch.cuda.max_memory_allocated(device) - before)
    finally:
        for hook in hooks:
            hook.remove()


def kept_by_autograd(
    model: nn.Module, forward: Callable[[], Tensor], checkpointed: Sequence[nn.Module] = ()
) -> float:
    """Bytes of what autograd keeps of a forward pass, weights aside; each storage counts once.

    With the inputs of checkpointed layers, which torch's checkpointing holds itself.
    """
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def keep_input(_: nn.Module, args: tuple[Any, ...]) -> None:
        keep(args[0])

    hooks = [layer.register_forward_pre_hook(keep_input) for layer in checkpointed]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = forward()  # held, so that no storage is freed and its address used again
    for hook in hooks:
        hook.remove()
    del hidden
    return float(sum(kept.values()))


# -------------------------------------------------------------------------- the allocator of a CPU


def keep_freed_memory() -> None:
    """Tell glibc's malloc to reuse blocks up to 1 GiB instead of unmapping them; elsewhere do nothing.

    It hands large freed blocks back to the kernel at once, so that every training step pays for its page
    faults again. On two cores 60 of the demo's pre-training steps took 31 s with that and 24 s without
    (21 November 2026, torch 2.13, glibc 2.36).
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
    libc.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)

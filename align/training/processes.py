"""The processes (ranks) of a training: barriers and broadcasts, their devices, and ranks without audio.

Control messages go through a gloo group of their own, beside the one that carries gradients: it needs no GPU
and names the ranks that are missing. In a single process each of these functions is free.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import distributed, nn

if TYPE_CHECKING:
    from transformers import Qwen2AudioForConditionalGeneration

T = TypeVar("T")

_timeout_s = 1800.0


class MissingRanks(RuntimeError):
    """Some ranks did not reach the barrier at which the others wait."""


def set_timeout(seconds: float) -> None:
    """Set how long a rank waits for the others; call it once, before anything else here."""
    global _timeout_s
    _timeout_s = seconds


def world_size() -> int:
    """Number of processes that train together."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def is_first() -> bool:
    """Whether this process writes the files that are written once."""
    return rank() == 0


def barrier() -> None:
    """Wait for all ranks."""
    if world_size() > 1:
        distributed.barrier(_control(distributed.group.WORLD))


def broadcast(value: T) -> T:
    """Rank 0's value, on all ranks."""
    if world_size() == 1:
        return value
    values = [value]
    distributed.broadcast_object_list(values, src=0, group=_control(distributed.group.WORLD))
    return values[0]


def gather(value: T) -> list[T]:
    """All ranks' values in the order of ranks, on all ranks."""
    if world_size() == 1:
        return [value]
    values: list[T] = [value] * world_size()
    distributed.all_gather_object(values, value, group=_control(distributed.group.WORLD))
    return values


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank, on all ranks."""
    if world_size() == 1:
        return flag
    flags = torch.tensor(int(flag))
    distributed.all_reduce(flags, distributed.ReduceOp.MAX, group=_control(distributed.group.WORLD))
    return bool(flags)


def monitored_barrier(place: str) -> None:
    """Wait for all ranks; those that do not arrive in time (see `set_timeout`) are named.

    Raises:
        MissingRanks: on rank 0, with their numbers and `place`, the name of the barrier.
    """
    if world_size() == 1:
        return
    try:
        distributed.monitored_barrier(
            _control(distributed.group.WORLD), timedelta(seconds=_timeout_s), wait_all_ranks=True
        )
    except RuntimeError as error:
        if rank() == 0:
            raise MissingRanks(f"{place}: {error}") from error
        raise


@cache
def _control(world: distributed.ProcessGroup) -> distributed.ProcessGroup:
    """A gloo group of all ranks."""
    return distributed.new_group(backend="gloo", timeout=timedelta(seconds=_timeout_s))


# -------------------------------------------------------------------------- devices


def local_device() -> torch.device:
    """This process' GPU, the one of its machine that accelerate will take; else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


@contextmanager
def eval_mode(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Keep a whole model on `device` in eval mode within the block."""
    before, was_training = next(model.parameters()).device, model.training
    model.eval()
    if before != device:
        model.to(device)
    try:
        yield
    finally:
        model.train(was_training)
        if before != device:
            model.to(before)


# -------------------------------------------------------------------------- ranks without audio


class _SilentClip:
    """Two hooks: the backbone's input shows whether there is audio; the language model's gets zeros added."""

    def __init__(self, model: Qwen2AudioForConditionalGeneration) -> None:
        self.backbone = model.model
        self.is_needed = False

    def before_backbone(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.is_needed = kwargs.get("input_features") is None

    def before_language_model(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Runs where clips are encoded: after the embedding, whose weights ZeRO-3 then fetches back last."""
        if not self.is_needed:
            return None
        embeddings = kwargs["inputs_embeds"]
        tower = self.backbone.audio_tower
        frames = 2 * tower.config.max_source_positions  # the second convolution halves them
        silence = torch.zeros(1, tower.config.num_mel_bins, frames, device=embeddings.device)
        vectors = self.backbone.multi_modal_projector(tower(silence).last_hidden_state)
        return args, {**kwargs, "inputs_embeds": embeddings + 0 * vectors.sum().to(embeddings.dtype)}


def encode_silence_without_audio(model: Qwen2AudioForConditionalGeneration) -> None:
    """Make forward passes without `input_features` use the audio tower and the projector all the same.

    Gradients (DDP, ZeRO) and weights (ZeRO-3) are exchanged module by module in the order of use. A rank that
    skips the audio tower because its rows are all text leaves the others waiting for ever or, worse, adds its
    next gradients to those of other weights. One silent clip, times zero, costs one pass through the tower.
    A lone process does the same, or the optimizer would skip a tower without gradients; with zeros its
    momentum carries on as over several ranks.

    Works with any backbone that embeds its tokens, then encodes its clips, then calls its language model
    with `inputs_embeds`, as the stock one does. The packed backbone does it by itself.
    """
    silence = _SilentClip(model)
    model.model.register_forward_pre_hook(silence.before_backbone, with_kwargs=True)
    model.model.language_model.register_forward_pre_hook(silence.before_language_model, with_kwargs=True)

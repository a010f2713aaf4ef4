"""What the processes of a training have to agree on. Alone, each of these is free.

Everything goes through a gloo group of its own, beside the one that carries gradients: it needs no GPU
and can tell who is missing.
"""

from __future__ import annotations

from datetime import timedelta
from functools import cache
from typing import TypeVar

import torch
from torch import distributed

T = TypeVar("T")


_patience_s = 1800.0


class MissingRanks(RuntimeError):
    """Some ranks did not come to where the others wait for them."""


def wait_at_most(seconds: float) -> None:
    """How long a rank waits for the others; to be said once, before anything else here."""
    global _patience_s
    _patience_s = seconds


def world_size() -> int:
    """How many processes train together."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    """This process' number among them, from 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def is_first() -> bool:
    """Whether this process is the one that writes what is written once."""
    return rank() == 0


def barrier() -> None:
    """Wait for all ranks."""
    if world_size() > 1:
        distributed.barrier(_control(distributed.group.WORLD))


def first_says(value: T) -> T:
    """Rank 0's value, on all ranks."""
    if world_size() == 1:
        return value
    told = [value]
    distributed.broadcast_object_list(told, src=0, group=_control(distributed.group.WORLD))
    return told[0]


def gather(value: T) -> list[T]:
    """All ranks' values in their order, on all ranks."""
    if world_size() == 1:
        return [value]
    told: list[T] = [value] * world_size()
    distributed.all_gather_object(told, value, group=_control(distributed.group.WORLD))
    return told


def any_says(flag: bool) -> bool:
    """Whether any rank says yes, on all ranks."""
    if world_size() == 1:
        return flag
    said = torch.tensor(int(flag))
    distributed.all_reduce(said, distributed.ReduceOp.MAX, group=_control(distributed.group.WORLD))
    return bool(said)


def roll_call(place: str) -> None:
    """Wait for all ranks; those that do not come in time (see `wait_at_most`) are named.

    Raises:
        MissingRanks: on rank 0, with their numbers and `place`, where they were waited for.
    """
    if world_size() == 1:
        return
    try:
        distributed.monitored_barrier(
            _control(distributed.group.WORLD), timedelta(seconds=_patience_s), wait_all_ranks=True
        )
    except RuntimeError as error:
        if rank() == 0:
            raise MissingRanks(f"{place}: {error}") from error
        raise


@cache
def _control(world: distributed.ProcessGroup) -> distributed.ProcessGroup:
    """A gloo group of all ranks."""
    return distributed.new_group(backend="gloo", timeout=timedelta(seconds=_patience_s))

"""Which attention back end is the fastest here: measured on the device, once per process."""

from __future__ import annotations

import logging
import time
from functools import lru_cache

import torch

from align.kernels.attention import BACKENDS, Ragged
from align.kernels.prefix_tree import Segment

log = logging.getLogger(__name__)
_PROMPT, _ANSWER, _PAIRS = 800, 128, 8


def choose(device: torch.device, dtype: torch.dtype, heads: int, head_dim: int) -> str:
    """The name of the back end to use.

    On a CPU always `split`: there `varlen` does not exist, and a choice that hangs on timings would make
    a resumed run differ from an unbroken one in its last bits.
    """
    return "split" if device.type != "cuda" else _fastest(device, dtype, heads, head_dim)


@lru_cache
def _fastest(device: torch.device, dtype: torch.dtype, heads: int, head_dim: int) -> str:
    seconds = {"split": measure("split", device, dtype, heads, head_dim)}
    try:
        if agrees("varlen", device, dtype, heads, head_dim):
            seconds["varlen"] = measure("varlen", device, dtype, heads, head_dim)
        else:
            log.warning("torch's varlen_attn gives another result than split on %s: not used", device)
    except (NotImplementedError, RuntimeError, TypeError) as error:  # an older torch or GPU, a data type
        log.warning("torch's varlen_attn does not run on %s in %s: %s", device, dtype, error)
    best = min(seconds, key=lambda name: seconds[name])
    timings = ", ".join(f"{name} {1e3 * took:.2f} ms" for name, took in seconds.items())
    log.info("attention back end %s (%s per layer, forward and backward)", best, timings)
    return best


def measure(name: str, device: torch.device, dtype: torch.dtype, heads: int, head_dim: int) -> float:
    """Seconds of one forward and backward over eight pairs of 30 s clips with 128-token answers."""
    sees, states = _example(device, dtype, heads, head_dim)
    times = []
    for _ in range(5):
        wait_for(device)
        started = time.perf_counter()
        query, key, value = states
        BACKENDS[name](query, key, value, sees, None).sum().backward()
        wait_for(device)
        times.append(time.perf_counter() - started)
    return min(times[2:])


def agrees(name: str, device: torch.device, dtype: torch.dtype, heads: int, head_dim: int) -> bool:
    """Whether a back end gives what `split` gives, but for rounding.

    Where queries are fewer than keys, kernels differ in which of them they align; torch's says nothing.
    """
    sees, states = _example(device, dtype, heads, head_dim)
    query, key, value = (state.detach() for state in states)
    ours, theirs = (BACKENDS[backend](query, key, value, sees, None).float() for backend in (name, "split"))
    return bool((ours - theirs).abs().max() < 0.05 * theirs.abs().max())


def _example(
    device: torch.device, dtype: torch.dtype, heads: int, head_dim: int
) -> tuple[Ragged, list[torch.Tensor]]:
    sees = Ragged.of(_pairs(), causal=True).to(device)
    shape = (1, heads, sees.segments[-1].end, head_dim)
    return sees, [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]


def _pairs() -> tuple[Segment, ...]:
    segments = []
    for pair in range(_PAIRS):
        start = pair * (_PROMPT + 2 * _ANSWER)
        prompt, chosen = start + _PROMPT, start + _PROMPT + _ANSWER
        segments += [
            Segment(start, prompt, ((start, prompt),)),
            Segment(prompt, chosen, ((start, chosen),)),
            Segment(chosen, chosen + _ANSWER, ((start, prompt), (chosen, chosen + _ANSWER))),
        ]
    return tuple(segments)


def wait_for(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)

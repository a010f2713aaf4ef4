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
        seconds["varlen"] = measure("varlen", device, dtype, heads, head_dim)
    except (NotImplementedError, RuntimeError, TypeError) as error:  # an older torch or GPU, a data type
        log.warning("torch's varlen_attn does not run on %s in %s: %s", device, dtype, error)
    best = min(seconds, key=lambda name: seconds[name])
    told = ", ".join(f"{name} {1e3 * took:.2f} ms" for name, took in seconds.items())
    log.info("attention back end %s (%s per layer, forward and backward)", best, told)
    return best


def measure(name: str, device: torch.device, dtype: torch.dtype, heads: int, head_dim: int) -> float:
    """Seconds of one forward and backward over eight pairs of 30 s clips with 128-token answers."""
    sees = Ragged.of(_pairs(), causal=True).to(device)
    length = sees.segments[-1].end
    states = [
        torch.randn(1, heads, length, head_dim, device=device, dtype=dtype, requires_grad=True)
        for _ in range(3)
    ]
    times = []
    for _ in range(5):
        _wait(device)
        started = time.perf_counter()
        query, key, value = states
        BACKENDS[name](query, key, value, sees, None).sum().backward()
        _wait(device)
        times.append(time.perf_counter() - started)
    return min(times[2:])


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


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

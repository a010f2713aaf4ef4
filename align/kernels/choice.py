"""Which attention back end is used: the one call for all segments where it works, tried once per process."""

from __future__ import annotations

import logging
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from align.kernels.attention import BACKENDS, Ragged
from align.kernels.prefix_tree import prefix_tree

log = logging.getLogger(__name__)
_PROMPT, _ANSWER, _PAIRS = 800, 128, 8


@lru_cache
def choose(device: torch.device, dtype: torch.dtype, heads: int, head_dim: int) -> str:
    """`varlen` on a GPU where it gives the result of `split`, else `split`.

    No clock decides: that would make a resumed run differ from an unbroken one in its last bits.
    """
    if device.type != "cuda":
        return "split"
    try:
        if agrees("varlen", device, dtype, heads, head_dim):
            return "varlen"
        log.warning("torch's varlen_attn gives another result than split on %s: not used", device)
    except (NotImplementedError, RuntimeError, TypeError) as error:  # an older torch or GPU, a data type
        log.warning("torch's varlen_attn does not run on %s in %s: %s", device, dtype, error)
    return "split"


def agrees(name: str, device: torch.device, dtype: torch.dtype, heads: int, head_dim: int) -> bool:
    """Whether outputs and gradients of a back end are those of `split`, but for rounding, on pairs of clips.

    Where queries are fewer than keys, kernels differ in which of them they align; torch's says nothing.
    """
    texts = [(pair, answer) for pair in range(_PAIRS) for answer in (_PAIRS, _PAIRS + 1)]
    tree = prefix_tree([np.repeat(text, (_PROMPT, _ANSWER)) for text in texts])
    sees = Ragged.of(tree.segments, causal=True).to(device)
    shape = (1, heads, sees.segments[-1].end, head_dim)
    states = [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]

    def computed(backend: str) -> list[Tensor]:
        output = BACKENDS[backend](*states, sees, None)
        return [output.detach(), *torch.autograd.grad(output.square().sum(), states)]

    together = zip(computed(name), computed("split"), strict=True)
    return all(float((a - b).abs().max()) < 0.05 * float(b.abs().max()) for a, b in together)

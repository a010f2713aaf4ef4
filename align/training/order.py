"""Which example is trained on when: a list of indices, drawn once from a seed.

Training reads the list front to back, so that a resumed run continues exactly where it was, and a
curriculum is nothing but the list's order.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def passes(candidates: Sequence[int], n: int, rng: np.random.Generator) -> list[int]:
    """`n` draws from `candidates`: whole shuffled passes, so that no example falls behind.

    Raises:
        ValueError: there is nothing to draw from.
    """
    if not candidates:
        raise ValueError("no example to draw from: check the corpus and the curriculum's values")
    drawn: list[int] = []
    while len(drawn) < n:
        drawn += rng.permutation(np.asarray(candidates)).tolist()
    return drawn[:n]


def mixed(
    sizes: Sequence[int], shares: Sequence[float], n: int, rng: np.random.Generator
) -> list[tuple[int, int]]:
    """`n` draws of (source, index) with each source's share of the draws fixed in expectation."""
    sources = rng.choice(len(sizes), size=n, p=np.asarray(shares) / sum(shares))
    queues = [
        iter(passes(range(size), int((sources == s).sum()), rng)) if (sources == s).any() else iter(())
        for s, size in enumerate(sizes)
    ]
    return [(int(s), next(queues[s])) for s in sources]

"""Rows of tokens -> one packed row in which every shared prefix stands once.

The hidden state of a token in a causal model depends on the tokens up to it and on nothing else. Two
rows that begin alike therefore have the same states up to where they part, and computing them once is
exact: [prompt chosen], [prompt rejected] is packed as [prompt chosen rejected], where `rejected` sees
the prompt and itself. Integers only; the README beside this file has the arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

Range = tuple[int, int]
"""Places [start, end) of the packed row."""


class Segment(NamedTuple):
    """Packed tokens [start, end), one edge of the tree: each sees all keys before it and itself.

    `keys` are the segments they may see, in order of position: those before it, and itself.
    """

    start: int
    end: int
    keys: tuple[Range, ...]

    @property
    def n_queries(self) -> int:
        """How many tokens the segment has."""
        return self.end - self.start

    @property
    def n_keys(self) -> int:
        """How many tokens its last token sees, itself included."""
        return sum(end - start for start, end in self.keys)


class PrefixTree(NamedTuple):
    """`tokens` and `positions` (L,) of the packed row; `places[i]` says where row i's tokens are in it."""

    tokens: np.ndarray
    positions: np.ndarray
    places: list[np.ndarray]
    segments: tuple[Segment, ...]


def prefix_tree(rows: Sequence[np.ndarray], min_shared: int = 4) -> PrefixTree:
    """Pack rows of int64 tokens. Time is that of sorting them plus O(their tokens).

    Rows part where fewer than `min_shared` further tokens are common: a segment costs a kernel launch
    per layer, which a token or two are not worth. 1 shares all that can be shared.
    """
    order = sorted(range(len(rows)), key=lambda i: rows[i].astype(">i8").tobytes())
    growing = _Growing([rows[i] for i in order], min_shared)
    growing.grow(0, len(rows), 0, ())
    places = [places for _, places in sorted(zip(order, growing.places, strict=True), key=lambda x: x[0])]
    empty = [np.zeros(0, np.int64)]
    return PrefixTree(
        np.concatenate(growing.tokens or empty),
        np.concatenate(growing.positions or empty),
        places,
        tuple(growing.segments),
    )


class _Growing:
    """A tree half grown. Rows are sorted, so those with a common prefix are neighbours."""

    def __init__(self, rows: list[np.ndarray], min_shared: int) -> None:
        self.rows = rows
        self.min_shared = min_shared
        self.shared = [_n_common(a, b) for a, b in zip(rows, rows[1:], strict=False)]
        self.tokens: list[np.ndarray] = []
        self.positions: list[np.ndarray] = []
        self.places = [np.empty(len(row), np.int64) for row in rows]
        self.segments: list[Segment] = []
        self.length = 0

    def grow(self, first: int, last: int, depth: int, ancestors: tuple[Range, ...]) -> None:
        """Add what follows token `depth` of rows [first, last), all of which have `ancestors` before it."""
        for a, b in self._families(first, last, depth):
            alone = b - a == 1
            end = len(self.rows[a]) if alone else min(self.shared[a : b - 1])
            if end == depth:
                continue
            keys = self._add(a, b, depth, end, ancestors)
            if not alone:
                self.grow(a, b, end, keys)

    def _families(self, first: int, last: int, depth: int) -> Iterator[Range]:
        start = first
        for i in range(first, last):
            if i == last - 1 or self.shared[i] < depth + self.min_shared:
                yield start, i + 1
                start = i + 1

    def _add(self, a: int, b: int, depth: int, end: int, ancestors: tuple[Range, ...]) -> tuple[Range, ...]:
        """Append tokens [depth, end) of rows [a, b) as one segment; returns the ranges it sees."""
        start, self.length = self.length, self.length + end - depth
        self.tokens.append(self.rows[a][depth:end])
        self.positions.append(np.arange(depth, end))
        for row in range(a, b):
            self.places[row][depth:end] = np.arange(start, self.length)
        keys = (*ancestors, (start, self.length))
        self.segments.append(Segment(start, self.length, keys))
        return keys


def _n_common(a: np.ndarray, b: np.ndarray) -> int:
    shorter = min(len(a), len(b))
    different = np.flatnonzero(a[:shorter] != b[:shorter])
    return int(different[0]) if different.size else shorter


def clips_apart(lengths: Sequence[int]) -> tuple[Segment, ...]:
    """Segments of rows that lie one after another and share nothing."""
    ends = np.cumsum(lengths).tolist()
    return tuple(
        Segment(end - length, end, ((end - length, end),)) for end, length in zip(ends, lengths, strict=True)
    )

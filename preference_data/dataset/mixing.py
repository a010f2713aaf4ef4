"""Which example is drawn when: a pure function of a seed and the draw's number, with almost no memory.

Nothing here has state. The n-th draw is the same whether or not earlier draws were computed, so a training
run goes on from any step, in any number of processes, by asking for draw n.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_BLOCK = 1 << 16
"""Draws after which every dataset has had exactly its share."""
_ROUNDS = 4
_64_BITS = (1 << 64) - 1


class Permutation(Sequence[int]):
    """A random order of `range(n)` that is computed place by place and never held.

    A Feistel network over the smallest power of two that holds n; a number that falls outside of `range(n)`
    is sent through again (Black and Rogaway 2002, "Ciphers with arbitrary finite domains", section 4).
    The network is a bijection whatever its round function, so the order holds every number once.
    """

    def __init__(self, n: int, *key: object) -> None:
        """An order of `range(n)`; another `key` gives another order."""
        self._n = n
        bits = max(0, n - 1).bit_length()
        self._low_bits = bits // 2
        self._low, self._high = (1 << bits // 2) - 1, (1 << bits - bits // 2) - 1
        digest = hashlib.blake2b("\x1f".join(map(str, key)).encode(), digest_size=16 * _ROUNDS).digest()
        self._keys = list(struct.iter_unpack("<QQ", digest))

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, place: int) -> int:  # type: ignore[override]  # places only, no slices
        if not 0 <= place < self._n:
            raise IndexError(f"place {place} of an order of {self._n}")
        number = self._scramble(place)
        while number >= self._n:
            number = self._scramble(number)
        return number

    def _scramble(self, number: int) -> int:
        low, high = number & self._low, number >> self._low_bits
        for low_key, high_key in self._keys:
            low ^= _hash(high + low_key) & self._low
            high ^= _hash(low + high_key) & self._high
        return high << self._low_bits | low


def _hash(x: int) -> int:
    """The mixing step of splitmix64 (Steele, Lea and Flood 2014)."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _64_BITS
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _64_BITS
    return x ^ x >> 31


class Draw(NamedTuple):
    """A draw: the number of a dataset, and of an example in it."""

    part: int
    example: int


class Mixture:
    """Draws from several datasets, each with its share, each in whole shuffled passes.

    Of every 65,536 draws each dataset gets its share to within one draw, in random order. A dataset's own
    draws go through all of its examples before any comes again, so that no example falls behind.
    """

    def __init__(self, sizes: Sequence[int], shares: Sequence[float], *key: object) -> None:
        """Data sets of `sizes` examples, mixed by `shares`, which need not sum to 1.

        Raises:
            ValueError: there is nothing to draw from.
        """
        for number, (size, share) in enumerate(zip(sizes, shares, strict=True)):
            if share > 0 and size == 0:
                raise ValueError(f"dataset {number} has a share of {share:g} but no example to draw")
        if not any(share > 0 for share in shares):
            raise ValueError("no example to draw from: check the corpus and the curriculum's values")
        self._sizes = tuple(sizes)
        self._key = key
        self._quotas = np.array(_apportioned(shares, _BLOCK))
        self._block = -1
        self._parts = self._nth = np.empty(0, dtype=np.int64)

    def __getitem__(self, n: int) -> Draw:
        block, place = divmod(n, _BLOCK)
        if block != self._block:
            self._lay_out(block)
        part, nth = int(self._parts[place]), int(self._nth[place])
        turn, place = divmod(nth, self._sizes[part])
        return Draw(part, Permutation(self._sizes[part], *self._key, part, turn)[place])

    def _lay_out(self, block: int) -> None:
        """Which dataset each draw of a block is from, and which of its draws it is."""
        seed = int.from_bytes(hashlib.blake2b(repr((self._key, block)).encode(), digest_size=16).digest())
        ordered = np.repeat(np.arange(len(self._quotas)), self._quotas)
        self._parts = np.random.default_rng(seed).permutation(ordered)
        self._nth = np.empty(_BLOCK, dtype=np.int64)
        for part, quota in enumerate(self._quotas):
            self._nth[self._parts == part] = block * quota + np.arange(quota)
        self._block = block


def _apportioned(shares: Sequence[float], total: int) -> list[int]:
    """`total` as whole numbers in proportion to `shares` by largest remainders; a share gets one at least."""
    exact = np.asarray(shares, dtype=np.float64) / sum(shares) * total
    whole = np.maximum(np.floor(exact), exact > 0).astype(int)
    remainders = np.argsort(whole - exact, kind="stable")
    short = total - int(whole.sum())
    if short >= 0:
        whole[remainders[:short]] += 1
    else:  # tiny shares were rounded up; the largest gives way
        whole[int(whole.argmax())] += short
    return [int(n) for n in whole]


def mixing_shares(
    sizes: Sequence[int], given: Sequence[float | None], temperature: float = 1.0
) -> list[float]:
    """Each dataset's share of the draws; they sum to 1.

    Data sets without a given share divide what the given ones leave by p_i ~ n_i^(1/T): T = 1 in proportion
    to their sizes, T -> infinity evenly (Arivazhagan et al. 2019, arXiv:1907.05019, section 3.1). A data
    set of size 0 gets nothing and leaves its share to the others.

    Raises:
        ValueError: the given shares leave nothing for the datasets without one, or all are empty.
    """
    present = [share if size else 0.0 for size, share in zip(sizes, given, strict=True)]
    weights = [
        size ** (1 / temperature) if share is None else 0.0
        for size, share in zip(sizes, present, strict=True)
    ]
    left = 1 - sum(share for share in present if share is not None)
    if any(weights) and left <= 0:
        raise ValueError(f"the given shares sum to {1 - left:g} and leave nothing for datasets without one")
    shares = [
        left * weight / sum(weights) if share is None else share
        for weight, share in zip(weights, present, strict=True)
    ]
    if not sum(shares):
        raise ValueError("no dataset has an example to draw")
    return [share / sum(shares) for share in shares]

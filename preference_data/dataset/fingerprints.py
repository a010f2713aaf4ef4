"""Sets of texts too many to hold: 8 bytes each, and what seems to come twice is looked at again."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable

import numpy as np


def fingerprint(text: str) -> int:
    """64 bits that stand for a text; two of 10^8 texts share theirs with a probability of 0.0003."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


class Fingerprints:
    """Texts in the order they were added, each with a small number (0 to 255)."""

    def __init__(self) -> None:
        self._prints, self._labels = array("Q"), array("B")

    def add(self, text: str, label: int = 0) -> None:
        """Add a text."""
        self._prints.append(fingerprint(text))
        self._labels.append(label)

    def repeated(self, *, with_other_label: bool = False) -> set[int]:
        """Fingerprints that came more than once, or with more than one label."""
        prints, labels = self._columns()
        order = np.lexsort((labels, prints))
        prints, labels = prints[order], labels[order]
        same = prints[1:] == prints[:-1]
        return set(prints[1:][same & (labels[1:] != labels[:-1]) if with_other_label else same].tolist())

    def label_of(self) -> Callable[[str], int | None]:
        """A function that looks up the label of a text; None of a text that was never added."""
        prints, labels = self._columns()
        order = np.argsort(prints, kind="stable")
        prints, labels = prints[order], labels[order]

        def look_up(text: str) -> int | None:
            wanted = fingerprint(text)
            place = int(np.searchsorted(prints, np.uint64(wanted)))
            is_there = place < len(prints) and int(prints[place]) == wanted
            return int(labels[place]) if is_there else None

        return look_up

    def _columns(self) -> tuple[np.ndarray, np.ndarray]:
        return np.array(self._prints, dtype=np.uint64), np.array(self._labels, dtype=np.uint8)

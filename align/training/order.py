"""What is trained on when: example n of a run is a pure function of the seed and n.

So a run continues from the number of its step alone, in the middle of a pass and in another number of
processes, as long as the examples per step are the same; and the rows are read when their turn comes.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset

from align.training.collate import Row
from preference_data.dataset.mixing import Mixture
from preference_data.schema import TaskExample


class Part(NamedTuple):
    """One source of examples: `row` makes of each of its records what collators read. Can be pickled."""

    name: str
    records: Sequence[Any]
    share: float
    row: Callable[[Any], Row]


class Lesson(NamedTuple):
    """The next `draws` examples are drawn from `chosen` alone: per part, the numbers of its records."""

    draws: int
    chosen: Sequence[np.ndarray]


class _Stretch(NamedTuple):
    """A lesson, or all that comes after the last one; `chosen` None stands for all records."""

    mixture: Mixture
    chosen: Sequence[np.ndarray] | None


class Examples(Dataset[Row]):
    """The `n` examples of a training run in their order.

    Rows have what their part's `row` gives, `draw` (their place in the run), `task` and `source`.
    """

    def __init__(self, parts: Sequence[Part], n: int, seed: int, lessons: Sequence[Lesson] = ()) -> None:
        """Examples 0 to `n` - 1; lessons come first.

        Raises:
            ValueError: there is nothing to draw from, in all or in a lesson.
        """
        self.parts = list(parts)
        self._n = n
        self._starts = [0, *accumulate(lesson.draws for lesson in lessons)]
        self._stretches = [
            self._stretch(lesson.chosen, seed, number) for number, lesson in enumerate(lessons)
        ]
        self._stretches.append(self._stretch(None, seed, "all"))

    def _stretch(self, chosen: Sequence[np.ndarray] | None, *key: object) -> _Stretch:
        sizes = [len(part.records) for part in self.parts] if chosen is None else [len(c) for c in chosen]
        shares = [part.share if size else 0.0 for part, size in zip(self.parts, sizes, strict=True)]
        return _Stretch(Mixture(sizes, shares, *key), chosen)

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, n: int) -> Row:
        return self.instead_of(n, 0)

    def instead_of(self, n: int, further: int) -> Row:
        """Example `n`, or, should it be unusable, the one `further` places after it in its source."""
        part, record = self.drawn(n)
        records = self.parts[part].records
        found = records[(record + further) % len(records)]
        task = found.task if isinstance(found, TaskExample) else "chat"
        return {**self.parts[part].row(found), "draw": n, "task": task, "source": self.parts[part].name}

    def drawn(self, n: int) -> tuple[int, int]:
        """Part and record of example `n`."""
        number = bisect.bisect_right(self._starts, n) - 1
        mixture, chosen = self._stretches[number]
        part, record = mixture[n - self._starts[number]]
        return part, record if chosen is None else int(chosen[part][record])

"""Which examples are trained on when, which of them share a micro-batch, and how they are loaded.

Example n of a run is a pure function of the seed and n. So a run continues from the number of its step alone,
in the middle of an epoch and in another number of processes, as long as the examples per step are the same;
and rows are read when their turn comes.
"""

from __future__ import annotations

import bisect
import heapq
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from align.training.collate import Row, SFTCollator
from preference_data.audio.decode import BadAudio
from preference_data.dataset.mixing import Mixture
from preference_data.schema import TaskExample, stable_id

ABOUT = "about"
"""In a batch, not for the model: `tasks` and `sources` per row, and what was wrong with `replaced` clips."""
CACHE_BYTES = 1 << 30
"""Size of the feature cache, over all loader workers of a process."""
_REPLACEMENTS = 100
_WORKERS = 4


# -------------------------------------------------------------------------- order: a mixture of sources


class Part(NamedTuple):
    """One source of examples: `row` turns each of its records into what collators read. Can be pickled."""

    name: str
    records: Sequence[Any]
    share: float
    row: Callable[[Any], Row]


class Lesson(NamedTuple):
    """The next `draws` examples are drawn from `numbers` alone: per part, the numbers of its records."""

    draws: int
    numbers: Sequence[np.ndarray]


class _Stretch(NamedTuple):
    """A lesson, or all that comes after the last one; `numbers` None stands for all records."""

    mixture: Mixture
    numbers: Sequence[np.ndarray] | None


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
            self._stretch(lesson.numbers, seed, number) for number, lesson in enumerate(lessons)
        ]
        self._stretches.append(self._stretch(None, seed, "all"))

    def _stretch(self, numbers: Sequence[np.ndarray] | None, *key: object) -> _Stretch:
        sizes = [len(part.records) for part in self.parts] if numbers is None else [len(n) for n in numbers]
        shares = [part.share if size else 0.0 for part, size in zip(self.parts, sizes, strict=True)]
        return _Stretch(Mixture(sizes, shares, *key), numbers)

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, n: int) -> Row:
        return self.instead_of(n, 0)

    def instead_of(self, n: int, further: int) -> Row:
        """Example `n`, or, should it be unusable, the one `further` places after it in its source."""
        part, record = self.drawn(n)
        records = self.parts[part].records
        example = records[(record + further) % len(records)]
        task = example.task if isinstance(example, TaskExample) else "chat"
        return {**self.parts[part].row(example), "draw": n, "task": task, "source": self.parts[part].name}

    @property
    def distinct(self) -> Iterator[Row]:
        """Every row that may be drawn, once."""
        return (part.row(record) for part in self.parts for record in part.records)

    def drawn(self, n: int) -> tuple[int, int]:
        """Part and record of example `n`."""
        number = bisect.bisect_right(self._starts, n) - 1
        mixture, numbers = self._stretches[number]
        part, record = mixture[n - self._starts[number]]
        return part, record if numbers is None else int(numbers[part][record])


# -------------------------------------------------------------------------- order: preference pairs in epochs


class Rows(Dataset[Row]):
    """Rows in the order given, each with its `number`."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Row:
        return {**self.rows[number], "number": range(len(self.rows))[number]}


class ShuffledRows(Rows):
    """The `n` examples of a training in epochs over `rows`, each shuffled by the seed and its number.

    Rows have `draw` too, their place in the training.

    One epoch follows the other: it need not be a multiple of the batch. The Trainer's own sampler fills up
    each epoch's last batch, or shortens it, depending on how many processes share it.
    """

    def __init__(self, rows: Sequence[Row], n: int, seed: int) -> None:
        super().__init__(rows)
        self._n, self._seed = n, seed

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, n: int) -> Row:
        draw = range(self._n)[n]
        epoch, place = divmod(draw, len(self.rows))
        row = super().__getitem__(_permutation(len(self.rows), self._seed + epoch)[place])
        return {**row, "draw": draw}


@lru_cache(maxsize=2)
def _permutation(n: int, seed: int) -> list[int]:
    numbers: list[int] = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
    return numbers


class WithColumns(Dataset[Row]):
    """Another data set over `Rows` with further columns, given by the numbers of the rows."""

    def __init__(self, dataset: Rows | LengthBalanced, columns: Mapping[str, Sequence[Any]]) -> None:
        self.dataset, self.columns = dataset, columns

    @property
    def rows(self) -> Sequence[Row]:
        """The distinct rows, with the columns."""
        return [
            {**row, **{name: column[number] for name, column in self.columns.items()}}
            for number, row in enumerate(self.dataset.rows)
        ]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, n: int) -> Row:
        row = self.dataset[n]
        return {**row, **{name: column[row["number"]] for name, column in self.columns.items()}}


def hold_out(rows: Sequence[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Rows for training and held-out rows; rows that share a clip, or a prompt without clips, stay together.

    The groups are ranked by a hash of the seed and what they share; about `share` of the rows are taken from
    the front, at least one group.

    Raises:
        ValueError: nothing would be left to train on.
    """
    if not share:
        return list(rows), []
    groups: dict[str, list[int]] = {}
    for number, root in enumerate(
        _connected([row["audios"] or [f"prompt: {row.get('messages') or row['prompt']}"] for row in rows])
    ):
        groups.setdefault(root, []).append(number)
    held: set[int] = set()
    for root in sorted(groups, key=lambda root: stable_id(seed, "held out", root)):
        if held and len(held) + len(groups[root]) > share * len(rows):
            break
        held.update(groups[root])
    if len(held) == len(rows):
        raise ValueError(
            f"held_out: {share} of {len(rows)} examples leaves none to train on: they all share clips or "
            "prompts; set held_out: 0, or bring examples about more clips"
        )
    training = [row for number, row in enumerate(rows) if number not in held]
    return training, [rows[number] for number in sorted(held)]


def _connected(keys: Sequence[Sequence[str]]) -> list[str]:
    """For each list of keys the name of its group: lists that share a key are in one (union-find)."""
    parents: dict[str, str] = {}

    def root(key: str) -> str:
        while parents.setdefault(key, key) != key:
            key = parents[key]
        return key

    for own in keys:
        for key in own[1:]:
            first, other = sorted((root(own[0]), root(key)))
            parents[other] = first
    return [root(own[0]) for own in keys]


# -------------------------------------------------------------------------- length balancing


def balance(costs: Sequence[float], parts: int) -> list[int]:
    """An order of a step's examples in which `parts` equal stretches cost about the same.

    Within an optimizer step it is free which process and which micro-batch gets an example: SFT divides by
    the tokens of the whole step, DPO takes means over equal counts. The step stays the same up to the order
    of its sums. But all processes wait for the slowest: under ZeRO-3 in every micro-batch, else at the end
    of the step.

    The longest goes first, each to the stretch that costs least so far and is not full (Graham 1969, "Bounds
    on multiprocessing timing anomalies"). Stretches are ordered by their cost, so that those of one
    micro-batch, which are neighbours, are most alike; upwards in some steps and downwards in others, so that
    no process has the light end of all steps. A single stretch keeps its order.

    Raises:
        ValueError: the examples cannot be divided evenly.
    """
    size, left = divmod(len(costs), parts)
    if left:
        raise ValueError(f"{len(costs)} examples cannot be divided evenly into {parts} micro-batches")
    members: list[list[int]] = [[] for _ in range(parts)]
    open_ = [(0.0, part) for part in range(parts)]
    closed: list[tuple[float, int]] = []
    longest_first = sorted(range(len(costs)), key=lambda n: -costs[n])
    for example in longest_first:
        cost, part = heapq.heappop(open_)
        members[part].append(example)
        is_full = len(members[part]) == size
        heapq.heappush(closed if is_full else open_, (cost + costs[example], part))
    stretches = sorted(closed, reverse=longest_first[0] % 2 == 1)
    return [example for _, part in stretches for example in sorted(members[part])]


def balanced(
    examples: Examples | ShuffledRows, cost: Callable[[Row], float], batch_size: int, parts: int
) -> Examples | ShuffledRows | LengthBalanced:
    """`examples` with those of each step balanced over `parts` micro-batches; unchanged if it is only one."""
    return examples if parts == 1 else LengthBalanced(examples, cost, batch_size, parts)


class LengthBalanced(Dataset[Row]):
    """Examples of which each step has the same, in an order that balances its micro-batches.

    Place p is a pure function of p, so a run resumes anywhere. A step's rows are read when the first of them
    is needed: those of steps that a resumed run skips never are.
    """

    def __init__(
        self, examples: Examples | ShuffledRows, cost: Callable[[Row], float], batch_size: int, parts: int
    ) -> None:
        """`batch_size` examples to a step, a `parts`-th of them to a micro-batch."""
        self.examples, self.cost = examples, cost
        self.batch_size, self.parts = batch_size, parts
        self._step = -1
        self._rows: list[Row] = []

    @property
    def rows(self) -> Sequence[Row]:
        """The distinct rows, of preference pairs."""
        assert isinstance(self.examples, ShuffledRows)
        return self.examples.rows

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, place: int) -> Row:
        step, at = divmod(range(len(self))[place], self.batch_size)
        if step != self._step:
            drawn = [self.examples[step * self.batch_size + n] for n in range(self.batch_size)]
            self._rows = [drawn[n] for n in balance([self.cost(row) for row in drawn], self.parts)]
            self._step = step
        return self._rows[at]


# -------------------------------------------------------------------------- loading


@dataclass
class ReplacingCollator:
    """Collates examples; one with a clip that cannot be read gives way to the next of its source.

    Which one that is follows from the files alone, so a resumed run replaces it by the same.
    """

    collate: SFTCollator
    examples: Examples

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """The batch of `SFTCollator` with `ABOUT` added.

        Raises:
            BadAudio: none of the next 100 examples of a source can be read either.
        """
        replaced: list[str] = []
        try:
            batch = self.collate(rows)
        except BadAudio:
            rows = [self._usable(row, replaced) for row in rows]
            batch = self.collate(rows)
        about = {
            "tasks": [row["task"] for row in rows],
            "sources": [row["source"] for row in rows],
            "replaced": replaced,
        }
        return {**batch, ABOUT: about}

    def _usable(self, row: Row, replaced: list[str]) -> Row:
        further = 0
        while True:
            try:
                self.collate.features(row["audios"])
                return row
            except BadAudio as error:
                further += 1
                if further > _REPLACEMENTS:
                    raise
                replaced.append(str(error))
                row = self.examples.instead_of(row["draw"], further)


def loader_arguments(trl: Mapping[str, Any]) -> dict[str, Any]:
    """Trainer arguments for the loader's workers, from the recipe's `trl:`; by default 4 beside a GPU.

    Decoding and mel features take 10 to 50 ms of a core per clip and run beside the training.

    They start from a clean process, not as copies of this one: a copy of a process with threads (progress
    display, MLflow, OpenMP) can hang on a lock that no thread of it will ever release.
    """
    cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    default = min(_WORKERS, max(1, cores - 1)) if torch.cuda.is_available() else 0
    workers = int(trl.get("dataloader_num_workers", default))
    if not workers:
        return {"dataloader_num_workers": 0}
    multiprocessing.set_forkserver_preload([__name__])
    return {"dataloader_num_workers": workers, "dataloader_multiprocessing_context": "forkserver"}

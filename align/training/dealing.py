"""Which of a step's examples go through the model together: equal counts, about equal work.

Within an optimizer step it is free which process and which pass gets an example: SFT divides by the
tokens of the whole step, DPO takes means over equal counts. The step stays the same up to the order of its
sums. But all processes wait for the slowest: under ZeRO-3 in every pass, else at the end of the step.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence

from torch.utils.data import Dataset

from align.training.collate import Row
from align.training.order import Examples


def deal(costs: Sequence[float], parts: int) -> list[int]:
    """An order of a step's examples of which `parts` equal stretches cost about the same.

    The longest goes first, each to the stretch that costs least so far and is not full (Graham 1969, "Bounds
    on multiprocessing timing anomalies"). Stretches stand by their cost, so that those of one pass, which
    are neighbours, are most alike; in some steps up and in others down, so that no process has the light
    end of all steps. A single one keeps its order.

    Raises:
        ValueError: the examples cannot be divided evenly.
    """
    size, left = divmod(len(costs), parts)
    if left:
        raise ValueError(f"{len(costs)} examples cannot be dealt evenly into {parts} parts")
    hands: list[list[int]] = [[] for _ in range(parts)]
    open_ = [(0.0, part) for part in range(parts)]
    closed: list[tuple[float, int]] = []
    longest_first = sorted(range(len(costs)), key=lambda n: -costs[n])
    for example in longest_first:
        cost, part = heapq.heappop(open_)
        hands[part].append(example)
        full = len(hands[part]) == size
        heapq.heappush(closed if full else open_, (cost + costs[example], part))
    stretches = sorted(closed, reverse=longest_first[0] % 2 == 1)
    return [example for _, part in stretches for example in sorted(hands[part])]


def dealt_steps(order: Sequence[int], costs: Sequence[float], batch_size: int, parts: int) -> list[int]:
    """Numbers of rows in the order of training, those of each step dealt by the `costs` of all rows."""
    steps = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return [step[n] for step in steps for n in deal([costs[row] for row in step], parts)]


def dealt(examples: Examples, cost: Callable[[Row], float], batch_size: int, parts: int) -> Dataset[Row]:
    """`examples` with those of each step dealt into `parts` micro-batches; as they are if it is one."""
    return examples if parts == 1 else Dealt(examples, cost, batch_size, parts)


class Dealt(Dataset[Row]):
    """Examples in an order of which each step's are the same, dealt into its micro-batches.

    Place p is a pure function of p, so a run resumes anywhere. A step's rows are read when one of them is
    first asked for: those of steps that a resumed run skips never are.
    """

    def __init__(self, examples: Examples, cost: Callable[[Row], float], batch_size: int, parts: int) -> None:
        """`batch_size` examples to a step, a `parts`-th of them to a micro-batch."""
        self.examples, self.cost = examples, cost
        self.batch_size, self.parts = batch_size, parts
        self._step = -1
        self._rows: list[Row] = []

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, place: int) -> Row:
        step, at = divmod(range(len(self))[place], self.batch_size)
        if step != self._step:
            drawn = [self.examples[step * self.batch_size + n] for n in range(self.batch_size)]
            self._rows = [drawn[n] for n in deal([self.cost(row) for row in drawn], self.parts)]
            self._step = step
        return self._rows[at]

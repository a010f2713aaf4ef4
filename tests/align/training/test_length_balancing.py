"""Examples of a step balanced over micro-batches: the same step, about equal work in each."""

from collections import Counter

import numpy as np
import pytest
from accelerate import skip_first_batches
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, SequentialSampler

from align.training.data_loading import Examples, LengthBalanced, Part, ShuffledRows, balance, balanced
from preference_data import store
from preference_data.dataset.manifest import open_manifest
from preference_data.schema import TaskExample

STEP, STEPS = 12, 10


def test_balanced_by_hand():
    """9 | 7 | 6, then 5 to the 6 (11), 4 to the 7 (11), 1 to the 9 (10): stretches of 10, 11, 11.

    They stand upwards where the longest has an even place, else downwards.
    """
    assert balance([4, 9, 1, 6, 7, 5], 3) == [3, 5, 0, 4, 1, 2]
    assert balance([9, 4, 1, 6, 7, 5], 3) == [0, 2, 1, 4, 3, 5]
    assert balance([4, 9, 1, 6], 1) == [0, 1, 2, 3]
    assert balance([3, 3, 3, 3], 2) == [0, 2, 1, 3]
    with pytest.raises(ValueError, match="7 examples cannot be divided evenly into 2 micro-batches"):
        balance([1] * 7, 2)


def test_every_example_is_there_once_in_equal_counts_and_the_same_way_each_time():
    draw = np.random.default_rng(0)
    for parts in (1, 2, 4, 8, 16):
        costs = draw.lognormal(3, 1, 16).tolist()
        order = balance(costs, parts)
        assert sorted(order) == list(range(16))
        assert order == balance(costs, parts)


def test_no_micro_batch_waits_for_the_long_clips():
    """64 clips of 0.5 to 30 s over 8 processes and 2 passes: the longest micro-batch against the mean."""
    draw = np.random.default_rng(0)
    before, after = [], []
    for _ in range(100):
        costs = 25 * draw.uniform(0.5, 30, 64) + draw.integers(20, 120, 64)
        for order, found in ((np.arange(64), before), (balance(costs.tolist(), 16), after)):
            loads = costs[order].reshape(2, 8, 4).sum(-1)
            found.append(loads.max(axis=1).sum() / loads.mean(axis=1).sum())  # a pass takes as long as that
    print(f"slowest / mean of a pass: {np.mean(before):.3f} unbalanced, {np.mean(after):.3f} balanced")
    assert np.mean(before) > 1.3
    assert np.mean(after) < 1.02
    assert max(after) < 1.05


# -------------------------------------------------------------------------- in a run


def row(example):
    return {"prompt": "", "completion": example.text, "messages": None, "audios": []}


def cost(found):
    return len(found["completion"])


@pytest.fixture
def examples(tmp_path):
    draw = np.random.default_rng(0)
    rows = (
        TaskExample(id=f"{i}", audios=(), task="caption", text=f"{i} " + "a" * int(draw.integers(1, 400)))
        for i in range(90)
    )
    store.write(tmp_path / "rows.jsonl", rows)
    part = Part("", open_manifest(tmp_path / "rows.jsonl", TaskExample), 1.0, row)
    return Examples([part], STEP * STEPS, seed=0)


def micro_batches(dataset, world, passes, workers=0, skipped=0):
    """Per step and micro-batch in the order of passes and ranks: the draws, by the classes of the Trainer."""
    per_rank = []
    for rank in range(world):
        loader = DataLoader(
            dataset,
            batch_size=STEP // (world * passes),
            sampler=SequentialSampler(dataset),
            collate_fn=list,
            num_workers=workers,
        )
        loader = prepare_data_loader(loader, num_processes=world, process_index=rank, put_on_device=False)
        loader = skip_first_batches(loader, skipped * passes) if skipped else loader
        per_rank.append([[found["draw"] for found in batch] for batch in loader])
    in_turn = [batch for together in zip(*per_rank, strict=True) for batch in together]
    return [in_turn[n : n + world * passes] for n in range(0, len(in_turn), world * passes)]


@pytest.mark.parametrize(("world", "passes", "workers"), [(1, 2, 0), (2, 1, 0), (2, 3, 0), (3, 2, 2)])
def test_each_step_has_its_examples_in_equal_and_balanced_micro_batches(examples, world, passes, workers):
    parts = world * passes
    steps = micro_batches(balanced(examples, cost, STEP, parts), world, passes, workers)
    unbalanced = micro_batches(examples, world, passes)
    assert len(steps) == STEPS
    for n, step in enumerate(steps):
        assert sorted(draw for batch in step for draw in batch) == list(range(n * STEP, (n + 1) * STEP))
        assert {len(batch) for batch in step} == {STEP // parts}

    def slowest(step):
        return max(sum(cost(examples[draw]) for draw in batch) for batch in step)

    mean = sum(cost(examples[draw]) for draw in range(STEP * STEPS)) / parts
    assert sum(map(slowest, steps)) < 1.15 * mean
    assert sum(map(slowest, steps)) < sum(map(slowest, unbalanced))


def test_one_micro_batch_is_left_as_it_is(examples):
    assert balanced(examples, cost, STEP, 1) is examples


@pytest.mark.parametrize(("before", "then"), [((2, 1), (2, 1)), ((2, 2), (1, 2)), ((1, 4), (3, 1))])
def test_a_resumed_run_has_the_steps_of_the_undisturbed_one(examples, before, then):
    whole = micro_batches(LengthBalanced(examples, cost, STEP, np.prod(before)), *before)
    again = micro_batches(LengthBalanced(examples, cost, STEP, np.prod(then)), *then, skipped=4)
    flat = [Counter(draw for batch in step for draw in batch) for step in whole[4:]]
    assert flat == [Counter(draw for batch in step for draw in batch) for step in again]
    if before == then:
        assert again == whole[4:]


def test_nothing_is_read_before_its_turn(examples):
    read = []

    class Watched(Examples):
        def instead_of(self, n, further):
            read.append(n)
            return super().instead_of(n, further)

    watched = Watched(examples.parts, len(examples), seed=0)
    loader = DataLoader(LengthBalanced(watched, cost, STEP, 2), batch_size=6, collate_fn=list)
    next(iter(skip_first_batches(prepare_data_loader(loader, put_on_device=False), 2 * 8)))
    assert min(read) == 8 * STEP
    assert len(read) == STEP  # a step's rows are read once


def test_steps_of_rows_in_any_order_keep_their_rows():
    costs = [1.0, 9.0, 2.0, 8.0, 3.0, 7.0]

    # 8 | 8, 7 to the first (full), 1 to the second: 9 and 15; 9 | 7, 3 to the 7 (full), 2 to the 9: 10, 11
    class Ordered(ShuffledRows):
        def __getitem__(self, n):
            return self.rows[[5, 3, 3, 0, 1, 2, 4, 5][n]]

    ordered = Ordered([{"number": n} for n in range(6)], 8, seed=0)
    steps = LengthBalanced(ordered, lambda row: costs[row["number"]], 4, 2)
    assert [row["number"] for row in steps] == [5, 3, 3, 0, 4, 5, 1, 2]

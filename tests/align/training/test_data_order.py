"""What is trained on when: the same examples whatever gets killed, in any number of processes."""

import itertools
from collections import Counter
from functools import partial

import numpy as np
import pytest
from accelerate import skip_first_batches
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, SequentialSampler

from align.training.data_loading import Examples, Lesson, Part
from preference_data import store
from preference_data.dataset.manifest import open_manifest
from preference_data.schema import TaskExample

BATCH = 12
STEPS = 25


def row(example, prefix=""):
    return {"prompt": prefix, "completion": example.text, "audios": list(example.audios)}


@pytest.fixture
def parts(tmp_path):
    """Two manifests of 100 and 7 rows, three to one."""
    found = []
    for name, n, share in (("large", 100, 0.75), ("small", 7, 0.25)):
        path = tmp_path / f"{name}.jsonl"
        rows = (TaskExample(id=f"{name}{i}", audios=(), task="caption", text=f"{name} {i}") for i in range(n))
        store.write(path, rows)
        found.append(Part(name, open_manifest(path, TaskExample), share, partial(row, prefix="Caption:")))
    return found


def texts(examples):
    return [examples[n]["completion"] for n in range(len(examples))]


def test_example_n_is_the_same_however_one_gets_there(parts):
    in_order = texts(Examples(parts, 300, seed=1))
    again = Examples(parts, 300, seed=1)
    assert [again[n]["completion"] for n in reversed(range(300))] == in_order[::-1]
    assert texts(Examples(parts, 300, seed=2)) != in_order
    assert texts(Examples(parts, 500, seed=1))[:300] == in_order  # more steps change nothing before them


def test_a_row_tells_its_place_task_and_source(parts):
    examples = Examples(parts, 300, seed=1)
    found = examples[17]
    assert (found["draw"], found["task"], found["prompt"]) == (17, "caption", "Caption:")
    assert found["completion"].split()[0] == found["source"]
    assert {examples[n]["source"] for n in range(300)} == {"large", "small"}


def test_every_example_is_seen_before_any_is_seen_twice(parts):
    drawn = Examples(parts, 600, seed=0)
    small = [text for text in texts(drawn) if text.startswith("small")]
    counts = Counter(small)
    assert max(counts.values()) - min(counts.values()) <= 1
    large = [text for text in texts(drawn) if text.startswith("large")]
    assert len(set(large[:100])) == 100


def test_lessons_come_first_and_draw_from_their_own(parts):
    lessons = [
        Lesson(24, [np.array([3, 4, 5], dtype=np.uint32), np.array([], dtype=np.uint32)]),
        Lesson(12, [np.array([9], dtype=np.uint32), np.array([0, 1], dtype=np.uint32)]),
    ]
    drawn = texts(Examples(parts, 60, seed=0, lessons=lessons))
    assert Counter(drawn[:24]) == {"large 3": 8, "large 4": 8, "large 5": 8}
    assert set(drawn[24:36]) <= {"large 9", "small 0", "small 1"}
    assert len(set(drawn[36:])) > 12
    with pytest.raises(ValueError, match="no example"):
        Examples(parts, 60, seed=0, lessons=[Lesson(24, [np.array([], dtype=np.uint32)] * 2)])


def test_the_one_instead_is_of_the_same_source(parts):
    examples = Examples(parts, 300, seed=1)
    for n in range(20):
        first, second = examples[n], examples.instead_of(n, 1)
        assert second["source"] == first["source"]
        assert second["draw"] == n
        size = 100 if first["source"] == "large" else 7
        at, then = (int(found["completion"].split()[1]) for found in (first, second))
        assert then == (at + 1) % size


# -------------------------------------------------------------------------- kill and resume


def steps_of(examples, world, workers=0, skipped=0):
    """Per optimizer step, what all processes together train on, by the classes that the Trainer uses."""
    loaders = []
    for rank in range(world):
        loader = DataLoader(
            examples,
            batch_size=BATCH // world,
            sampler=SequentialSampler(examples),
            collate_fn=list,
            num_workers=workers,
        )
        prepared = prepare_data_loader(loader, num_processes=world, process_index=rank, put_on_device=False)
        loaders.append(skip_first_batches(prepared, skipped) if skipped else prepared)
    for together in zip(*loaders, strict=True):
        yield [found["completion"] for batch in together for found in batch]


@pytest.mark.parametrize(("world", "world_then"), [(1, 1), (2, 2), (2, 1), (1, 2), (3, 2), (4, 3)])
@pytest.mark.parametrize("killed_at", [1, 13, STEPS - 1])
def test_killed_and_resumed_the_order_is_that_of_the_undisturbed_run(parts, world, world_then, killed_at):
    undisturbed = list(steps_of(Examples(parts, STEPS * BATCH, seed=5), 1))
    before = list(itertools.islice(steps_of(Examples(parts, STEPS * BATCH, seed=5), world), killed_at))
    after = list(steps_of(Examples(parts, STEPS * BATCH, seed=5), world_then, skipped=killed_at))
    distance = sum(a != b for a, b in zip(sum(undisturbed, []), sum(before + after, []), strict=True))
    assert distance == 0


def test_another_seed_would_be_noticed(parts):
    one = sum(steps_of(Examples(parts, STEPS * BATCH, seed=5), 1), [])
    other = sum(steps_of(Examples(parts, STEPS * BATCH, seed=6), 1), [])
    assert sum(a != b for a, b in zip(one, other, strict=True)) > 200


def test_nothing_is_read_before_its_turn(parts, monkeypatch):
    """A resumed run must not read the rows that it skips."""
    read = []
    whole = type(parts[0].records)._read
    monkeypatch.setattr(
        type(parts[0].records), "_read", lambda self, number: read.append(number) or whole(self, number)
    )
    next(iter(steps_of(Examples(parts, STEPS * BATCH, seed=5), 1, skipped=20)))
    assert len(read) <= 2 * BATCH  # accelerate looks one batch ahead

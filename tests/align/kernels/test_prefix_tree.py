"""Packing rows into a prefix tree, against a hand-drawn tree and a brute-force twin."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.kernels.attention import Ragged
from align.kernels.prefix_tree import Segment, prefix_tree


def slow_prefix_tree(rows):
    """The twin: a token's place is that of its whole prefix, looked up in a dict; quadratic.

    Returns the places of each row's tokens and who sees whom (L, L): exactly the tokens of the prefix.
    """
    known = {}
    places = [
        [known.setdefault(tuple(row[: end + 1].tolist()), len(known)) for end in range(len(row))]
        for row in rows
    ]
    sees = np.zeros((len(known), len(known)), bool)
    for prefix, place in known.items():
        sees[place, [known[prefix[: end + 1]] for end in range(len(prefix))]] = True
    return places, sees


def rows_of(*rows):
    return [np.array(row, dtype=np.int64) for row in rows]


def test_a_pair_is_prompt_chosen_rejected():
    tree = prefix_tree(rows_of([7, 8, 9, 1, 2], [7, 8, 9, 3]), min_shared=1)
    assert tree.tokens.tolist() == [7, 8, 9, 1, 2, 3]
    assert tree.positions.tolist() == [0, 1, 2, 3, 4, 3]
    assert [places.tolist() for places in tree.places] == [[0, 1, 2, 3, 4], [0, 1, 2, 5]]
    # The chosen answer follows its prompt, so both are one range of keys; the rejected one sees two.
    assert tree.segments == (
        Segment(0, 3, ((0, 3),)),
        Segment(3, 5, ((0, 3), (3, 5))),
        Segment(5, 6, ((0, 3), (5, 6))),
    )


def test_short_common_stretches_stay_apart():
    rows = rows_of([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 7], [1, 2, 9, 9, 9, 9])
    shared_all = prefix_tree(rows, min_shared=1)
    assert len(shared_all.tokens) == 11  # 1 2 | 3 4 5 | 6 | 7 | 9 9 9 9
    apart = prefix_tree(rows, min_shared=4)
    assert len(apart.tokens) == 13  # 1 2 3 4 5 | 6 | 7 shared by the first two; the third alone


def test_equal_rows_and_empty_input():
    tree = prefix_tree(rows_of([1, 2, 3, 4, 5], [1, 2, 3, 4, 5]))
    assert tree.tokens.tolist() == [1, 2, 3, 4, 5]
    assert tree.places[0].tolist() == tree.places[1].tolist() == [0, 1, 2, 3, 4]
    assert prefix_tree([]).segments == ()


def visible(segments, n):
    return Ragged.of(segments, causal=True).mask(n).numpy()


row = st.lists(st.integers(-2, 2), max_size=12)
some_rows = st.lists(row, min_size=1, max_size=8).filter(any)


@given(some_rows, st.integers(1, 5))
def test_every_token_sees_exactly_its_own_prefix(rows, min_shared):
    rows = rows_of(*rows)
    tree = prefix_tree(rows, min_shared)
    sees = visible(tree.segments, len(tree.tokens))
    for row, places in zip(rows, tree.places, strict=True):
        np.testing.assert_array_equal(tree.tokens[places], row)
        np.testing.assert_array_equal(tree.positions[places], np.arange(len(row)))
        for end, place in enumerate(places):
            assert np.flatnonzero(sees[place]).tolist() == sorted(places[: end + 1])
    assert sorted({p for places in tree.places for p in places.tolist()}) == list(range(len(tree.tokens)))
    assert [s.start for s in tree.segments[1:]] == [s.end for s in tree.segments[:-1]]


@given(some_rows)
def test_sharing_everything_equals_the_brute_force_trie(rows):
    rows = rows_of(*rows)
    tree = prefix_tree(rows, min_shared=1)
    slow, slow_sees = slow_prefix_tree(rows)
    assert len(tree.tokens) == len(slow_sees)
    to_slow = np.zeros(len(tree.tokens), dtype=int)
    for places, twin in zip(tree.places, slow, strict=True):
        to_slow[places] = twin
    assert sorted(to_slow) == list(range(len(slow_sees)))
    np.testing.assert_array_equal(
        visible(tree.segments, len(tree.tokens)), slow_sees[np.ix_(to_slow, to_slow)]
    )


@pytest.mark.parametrize("n_rows", [2, 16])
def test_packing_takes_milliseconds(n_rows):
    import time

    draw = np.random.default_rng(0)
    prompt = draw.integers(0, 5000, 800)
    rows = [np.concatenate([prompt, draw.integers(0, 5000, 128)]) for _ in range(n_rows)]
    started = time.process_time()
    tree = prefix_tree(rows)
    assert time.process_time() - started < 0.02 * n_rows
    assert len(tree.tokens) == pytest.approx(800 + 128 * n_rows, abs=5 * n_rows)

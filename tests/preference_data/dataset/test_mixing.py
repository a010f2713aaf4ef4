"""Which example is drawn when."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preference_data.dataset.mixing import Mixture, Permutation, mixing_shares


@given(st.integers(1, 3000), st.integers(0, 1 << 64))
@settings(max_examples=60, deadline=None)
def test_an_order_holds_every_number_once(n, key):
    assert sorted(Permutation(n, key)) == list(range(n))


@given(st.integers(1, 1 << 60), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_places_of_huge_orders_stay_inside_and_differ(n, key):
    order = Permutation(n, key)
    places = {0, n - 1, n // 2, n // 3}
    assert len({order[place] for place in places}) == len(places)
    assert all(0 <= order[place] < n for place in places)
    with pytest.raises(IndexError):
        order[n]


def test_every_number_is_as_often_at_every_place():
    n, keys = 20, 4000
    counts = np.zeros((n, n))
    for key in range(keys):
        counts[np.arange(n), list(Permutation(n, "a", key))] += 1
    chi_squared = float(((counts - keys / n) ** 2 / (keys / n)).sum())
    assert abs(chi_squared - (n - 1) ** 2) < 5 * np.sqrt(2 * (n - 1) ** 2)  # mean and spread of its law


def test_an_order_is_the_same_on_every_machine():
    assert list(Permutation(10, 7, "x")) == [2, 8, 7, 4, 3, 0, 5, 9, 6, 1]


def test_shares_hold_and_each_source_goes_through_whole_passes():
    mixture = Mixture([1000, 10], [0.75, 0.25], 3)
    draws = [mixture[n] for n in range(40_000)]
    small = [draw.example for draw in draws if draw.part == 1]
    assert len(small) / len(draws) == pytest.approx(0.25, abs=0.01)
    for start in range(0, len(small) - 10, 10):
        assert sorted(small[start : start + 10]) == list(range(10))
    large = [draw.example for draw in draws if draw.part == 0]
    assert sorted(large[:1000]) == sorted(large[1000:2000]) == list(range(1000))
    assert large[:1000] != large[1000:2000]


def test_whole_passes_go_on_over_the_edge_of_a_block():
    mixture = Mixture([7, 5], [0.5, 0.5], "edge")
    first = (1 << 16) - 40
    before = sum(mixture[n].part == 1 for n in range(first))
    after = [draw.example for n in range(first, first + 80) if (draw := mixture[n]).part == 1]
    skipped = -before % 5
    assert sorted(after[skipped : skipped + 5]) == list(range(5))
    assert sorted(after[skipped + 5 : skipped + 10]) == list(range(5))


def test_draws_do_not_depend_on_what_was_drawn_before():
    mixture = Mixture([50, 9, 1], [1, 2, 3], 0)
    in_order = [mixture[n] for n in range(300)]
    assert [Mixture([50, 9, 1], [1, 2, 3], 0)[n] for n in reversed(range(300))] == in_order[::-1]
    assert [Mixture([50, 9, 1], [1, 2, 3], 1)[n] for n in range(300)] != in_order


def test_a_tiny_share_is_not_lost_and_a_share_of_nothing_draws_nothing():
    mixture = Mixture([10, 3, 4], [1.0, 1e-9, 0.0], 0)
    drawn = Counter(mixture[n].part for n in range(1 << 16))
    assert drawn == {0: (1 << 16) - 1, 1: 1}


def test_nothing_to_draw_from_is_an_error():
    with pytest.raises(ValueError, match="no example"):
        Mixture([5], [0.0], 0)
    with pytest.raises(ValueError, match="dataset 1 has a share of 0.5 but no example"):
        Mixture([5, 0], [0.5, 0.5], 0)


def test_temperature_by_hand():
    assert mixing_shares([900, 100], [None, None], 1.0) == pytest.approx([0.9, 0.1])
    assert mixing_shares([900, 100], [None, None], 2.0) == pytest.approx([0.75, 0.25])  # 30 : 10
    assert mixing_shares([900, 100], [None, None], 1e9) == pytest.approx([0.5, 0.5])


def test_given_shares_come_first_and_empty_sources_leave_theirs():
    assert mixing_shares([900, 100, 7], [None, None, 0.2], 2.0) == pytest.approx([0.6, 0.2, 0.2])
    assert mixing_shares([0, 100, 100], [0.8, 0.1, 0.1]) == pytest.approx([0.0, 0.5, 0.5])
    with pytest.raises(ValueError, match="leave nothing"):
        mixing_shares([10, 10, 10], [0.5, 0.5, None])
    with pytest.raises(ValueError, match="no dataset"):
        mixing_shares([0, 0], [None, 0.5])


def test_a_hundred_million_rows_cost_no_memory_to_shuffle():
    order = Permutation(100_000_000, 1)
    assert len(set(islice(order, 5000))) == 5000
    assert order.__sizeof__() < 1000

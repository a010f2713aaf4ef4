"""What is trained on when."""

from collections import Counter

import numpy as np
import pytest

from align.training.order import mixed, passes


def rng():
    return np.random.default_rng(0)


def test_every_example_is_seen_before_any_is_seen_twice():
    drawn = passes([3, 5, 7, 9], 10, rng())
    assert len(drawn) == 10
    assert sorted(drawn[:4]) == sorted(drawn[4:8]) == [3, 5, 7, 9]


def test_nothing_to_draw_from_is_an_error():
    with pytest.raises(ValueError, match="no example"):
        passes([], 3, rng())


def test_shares_hold_and_each_source_is_passed_evenly():
    drawn = mixed([100, 10], [0.75, 0.25], 2000, rng())
    share = Counter(source for source, _ in drawn)[1] / 2000
    assert share == pytest.approx(0.25, abs=0.03)
    seen = Counter(index for source, index in drawn if source == 1)
    assert max(seen.values()) - min(seen.values()) <= 1


def test_a_share_of_nothing_draws_nothing():
    assert {source for source, _ in mixed([5, 5], [1.0, 0.0], 50, rng())} == {0}

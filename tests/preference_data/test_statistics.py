import warnings

import numpy as np
import pytest

from preference_data.statistics import Interval, paired_bootstrap


def test_means_and_delta_by_hand():
    # 10 questions, 4 right before, 7 right after: 0.4, 0.7, delta 0.3.
    before = [1, 1, 1, 1, 0, 0, 0, 0, 0, 0]
    after = [1, 1, 1, 0, 1, 1, 1, 1, 0, 0]
    interval = paired_bootstrap(before, after)
    assert interval[:3] == pytest.approx((0.4, 0.7, 0.3))
    assert interval.n == 10
    assert interval.ci_low < interval.delta < interval.ci_high


def test_interval_is_the_normal_one_for_many_questions():
    # 1000 questions: 300 gained, 100 lost, 600 unchanged. Mean 0.2, variance 0.4 - 0.04 = 0.36,
    # standard error 0.6 / sqrt(1000) = 0.01897, so 0.2 -+ 1.96 * 0.01897 = 0.1628 .. 0.2372.
    before = np.r_[np.zeros(300), np.ones(100), np.zeros(600)]
    after = np.r_[np.ones(300), np.zeros(100), np.zeros(600)]
    interval = paired_bootstrap(before, after)
    assert interval.ci_low == pytest.approx(0.1628, abs=0.003)
    assert interval.ci_high == pytest.approx(0.2372, abs=0.003)


def test_difficulty_shared_by_both_conditions_cancels():
    # Scores vary from 0 to 100, but each question gains exactly 1.
    before = np.arange(101.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert paired_bootstrap(before, before + 1) == Interval(50.0, 51.0, 1.0, 1.0, 1.0, 101)


@pytest.mark.parametrize("scores", [[1.0], [0.0, 0.0, 0.0]])
def test_equal_conditions_give_a_zero_width_interval_without_warnings(scores):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        interval = paired_bootstrap(scores, scores)
    assert (interval.delta, interval.ci_low, interval.ci_high) == (0.0, 0.0, 0.0)


def test_swapping_the_conditions_mirrors_the_interval():
    rng = np.random.default_rng(1)
    a, b = rng.random(200), rng.random(200) + 0.1
    forth, back = paired_bootstrap(a, b), paired_bootstrap(b, a)
    assert back.delta == pytest.approx(-forth.delta)
    assert back.ci_low == pytest.approx(-forth.ci_high, abs=0.005)


def test_the_seed_fixes_the_interval():
    rng = np.random.default_rng(2)
    a, b = rng.random(50), rng.random(50)
    assert paired_bootstrap(a, b, seed=3) == paired_bootstrap(a, b, seed=3)
    assert paired_bootstrap(a, b, seed=3) != paired_bootstrap(a, b, seed=4)


@pytest.mark.parametrize(
    ("before", "after", "named"),
    [([1.0], [1.0, 2.0], r"\(1,\) and \(2,\)"), ([], [], r"\(0,\)"), ([0.0, 1.0], [0.0, np.nan], "pair 1")],
)
def test_bad_scores_are_named(before, after, named):
    with pytest.raises(ValueError, match=named):
        paired_bootstrap(before, after)

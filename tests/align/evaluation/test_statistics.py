import warnings

import numpy as np
import pytest

from align.evaluation.statistics import (
    Interval,
    bradley_terry,
    length_controlled,
    macro_bootstrap,
    paired_bootstrap,
    wilson,
)


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


TASKS = ("t0", "t1", "t2", "t3", "t4", "t5", "t6", "t7")
CELL_OF = dict(zip(TASKS, ("a", "a", "b", "b", "c", "c", "d", "e"), strict=True))
MEANS = {
    **{cell: {cell: 1.0} for cell in "abcde"},
    "overall": {"a": 0.25, "b": 0.25, "c": 0.25, "d": 0.125, "e": 0.125},
}


def benchmark(clips_per_task, questions_per_clip):
    """Labels of a made benchmark: strata, cells and clusters of each question."""
    strata = [task for task in TASKS for _ in range(clips_per_task * questions_per_clip)]
    clusters = [str(i // questions_per_clip) for i in range(len(strata))]
    return {"cells": [CELL_OF[task] for task in strata], "strata": strata, "clusters": clusters}


def test_macro_means_by_hand():
    # Cell a holds 1, 2, 3 -> 2 after 0; cell b 8 after 4: overall (2 + 8) / 2 = 5 after (0 + 4) / 2 = 2.
    found = macro_bootstrap(
        [0, 0, 0, 4],
        [1, 2, 3, 8],
        cells=["a", "a", "a", "b"],
        strata=["s", "s", "t", "u"],
        clusters=["1", "2", "3", "4"],
        means={"a": {"a": 1.0}, "all": {"a": 0.5, "b": 0.5}},
    )
    assert found["a"][:3] == (0, 2, 2)
    assert found["all"][:3] == (2, 5, 3)
    assert (found["a"].n, found["all"].n) == (3, 4)
    # Only s varies. It draws 1 of its 2 clusters, twice its weight: (2 * 1 + 3) / 3 or (2 * 2 + 3) / 3.
    assert found["a"].ci_low == pytest.approx(5 / 3)
    assert found["a"].ci_high == pytest.approx(7 / 3)


def test_one_stratum_without_clusters_agrees_with_the_plain_bootstrap():
    rng = np.random.default_rng(5)
    before, after = rng.random(400), rng.random(400) + 0.1
    labels = {"cells": ["c"] * 400, "strata": ["s"] * 400, "clusters": [str(i) for i in range(400)]}
    ours = macro_bootstrap(before, after, **labels, means={"m": {"c": 1.0}})["m"]
    plain = paired_bootstrap(before, after)
    assert ours[:3] == pytest.approx(plain[:3])
    assert (ours.ci_low, ours.ci_high) == pytest.approx((plain.ci_low, plain.ci_high), abs=0.004)


def test_questions_about_one_clip_do_not_count_as_independent():
    # Ten questions per clip that all move together tell as much as one.
    rng = np.random.default_rng(6)
    gain = np.repeat(rng.normal(0, 1, 100), 10)
    labels = {"cells": ["c"] * 1000, "strata": ["s"] * 1000}
    clips = [str(i // 10) for i in range(1000)]
    widths = [
        one.ci_high - one.ci_low
        for clusters in (clips, [str(i) for i in range(1000)])
        for one in [
            macro_bootstrap(np.zeros(1000), gain, **labels, clusters=clusters, means={"m": {"c": 1.0}})["m"]
        ]
    ]
    assert widths[0] / widths[1] == pytest.approx(np.sqrt(10), rel=0.1)


@pytest.mark.parametrize(("clips_per_task", "questions_per_clip"), [(12, 2), (25, 1)])
def test_intervals_cover_the_true_difference(clips_per_task, questions_per_clip):
    """400 simulated benchmarks with a true gain of 0.3: 95 % of the intervals hold it, 93 to 97 % here."""
    labels = benchmark(clips_per_task, questions_per_clip)
    n, simulations = len(labels["strata"]), 400
    hits = dict.fromkeys(("overall", "a", "d"), 0)
    claims = 0
    for seed in range(simulations):
        rng = np.random.default_rng(10_000 + seed)  # not the generator of the bootstrap
        before = rng.integers(1, 11, n).astype(float)  # how hard questions are cancels
        noise = np.repeat(rng.normal(0, 1, 8 * clips_per_task), questions_per_clip) + rng.normal(0, 1.5, n)
        found = macro_bootstrap(before, before + 0.3 + noise, **labels, means=MEANS, resamples=800, seed=seed)
        for name in hits:
            hits[name] += found[name].ci_low <= 0.3 <= found[name].ci_high
        null = found["overall"]  # the same benchmark without the gain: an A/A comparison
        claims += null.ci_low - 0.3 > 0
    assert {name: 0.93 <= count / simulations <= 0.97 for name, count in hits.items()} == dict.fromkeys(
        hits, True
    )
    assert claims / simulations < 0.04  # 2.5 % by construction


def test_a_condition_against_itself_is_not_inferior_and_wins_nothing():
    labels = benchmark(5, 2)
    scores = np.random.default_rng(8).integers(1, 11, len(labels["strata"]))
    for found in macro_bootstrap(scores, scores, **labels, means=MEANS).values():
        assert (found.delta, found.ci_low, found.ci_high, found.p) == (0, 0, 0, 1)


def test_a_single_clip_proves_nothing():
    found = macro_bootstrap(
        [1, 1], [9, 9], cells=["c"] * 2, strata=["s"] * 2, clusters=["x"] * 2, means={"m": {"c": 1.0}}
    )["m"]
    assert (found.delta, found.p) == (8, 1)


def test_the_p_value_is_that_of_the_normal_test():
    # 400 differences of mean 0.1 and deviation 1: z = 2, two-sided p = 0.0455.
    values = np.random.default_rng(9).normal(size=400)
    values = 0.1 + (values - values.mean()) / values.std()
    labels = {"cells": ["c"] * 400, "strata": ["s"] * 400, "clusters": [str(i) for i in range(400)]}
    found = macro_bootstrap(np.zeros(400), values, **labels, means={"m": {"c": 1.0}}, resamples=20_000)["m"]
    assert found.p == pytest.approx(0.0455, abs=0.006)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"cells": ["a", "b"]}, r"stratum 's' lies in cells \['a', 'b'\]"),
        ({"means": {"m": {"z": 1.0}}}, r"mean 'm' weighs \['z'\], there is \['a'\]"),
    ],
)
def test_labels_that_do_not_nest_are_named(changes, named):
    given = {"cells": ["a", "a"], "strata": ["s", "s"], "clusters": ["1", "2"], "means": {"m": {"a": 1.0}}}
    with pytest.raises(ValueError, match=named):
        macro_bootstrap([1, 2], [1, 2], **given | changes)


def test_wilsons_interval_by_hand():
    # 8 of 10 (Agresti and Coull's example form): centre (0.8 + 0.19207) / 1.38415 = 0.71674, half 0.22659.
    assert wilson(8, 10) == pytest.approx((0.8, 0.4902, 0.9433, 10), abs=1e-4)
    assert wilson(0, 5).ci_low == 0
    assert wilson(0, 0) == (None, None, None, 0)


def test_length_controlled_win_rate_by_hand():
    # Wins 80 % where longer and 50 % where shorter, always by as much, so that tanh is +-tanh(1):
    # quality = (logit 0.8 + logit 0.5) / 2 = ln(4) / 2, and sigmoid of that is 2 / 3.
    wins = [1] * 8000 + [0] * 2000 + [1] * 5000 + [0] * 5000
    extra = [30.0] * 10_000 + [-30.0] * 10_000
    found = length_controlled(wins, extra, [str(i) for i in range(20_000)])
    assert found.share == pytest.approx(2 / 3, abs=1e-4)
    # Delta method, binomial variances of the two logits: sqrt(1 / 1600 + 1 / 2500) / 2 logits.
    half = 1.96 * np.sqrt(1 / 1600 + 1 / 2500) / 2
    assert found.ci_high - found.ci_low == pytest.approx(2 * half * (2 / 3) * (1 / 3), rel=0.01)


def test_length_controlled_win_rate_of_equals_is_one_half():
    clusters = [str(i) for i in range(50)]
    extra = np.random.default_rng(3).normal(size=50)
    assert length_controlled([0.5] * 50, extra, clusters)[:3] == (0.5, 0.5, 0.5)
    # Wins and losses that only length explains, and equal lengths.
    assert length_controlled([1, 0] * 25, [5, -5] * 25, clusters).share == pytest.approx(0.5)
    assert length_controlled([1, 0] * 25, [0] * 50, clusters).share == pytest.approx(0.5)


def test_a_clean_sweep_has_a_finite_interval():
    # 20 wins and the added tie: odds 20.5 to 0.5.
    found = length_controlled([1] * 20, [0] * 20, [str(i) for i in range(20)])
    assert found.share == pytest.approx(20.5 / 21, abs=1e-5)
    assert 0.5 < found.ci_low < 0.95 < found.ci_high < 1


def test_bradley_terry_by_hand():
    # Two players: the difference is the log odds. Three in a cycle: all equal.
    assert bradley_terry([[0, 30], [10, 0]], prior=0) == pytest.approx([np.log(3) / 2, -np.log(3) / 2])
    assert bradley_terry([[0, 5, 0], [0, 0, 5], [5, 0, 0]]) == pytest.approx([0, 0, 0], abs=1e-6)
    assert np.isfinite(bradley_terry([[0, 9, 9], [0, 0, 9], [0, 0, 0]])).all()


def test_bradley_terry_finds_the_strengths_that_made_the_games():
    strengths = np.array([0.8, 0.1, -0.2, -0.7])
    odds = 1 / (1 + np.exp(strengths[None, :] - strengths[:, None]))
    games = np.stack([10_000 * odds, 500 * odds])  # a batch, as the bootstrap has it
    assert bradley_terry(games, prior=0) == pytest.approx(np.stack([strengths, strengths]), abs=1e-6)

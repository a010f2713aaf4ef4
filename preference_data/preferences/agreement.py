"""How far judgements can be trusted: agreement between annotators, on retests, with gold and with chance.

Pure measures with 95 % intervals; `quality` puts them together and says in words what stands out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

from preference_data.preferences import votes
from preference_data.schema import Axis, Judgement, Ranking

_RESAMPLES = 2000
_Z = 1.959963984540054
"""The normal quantile of 95 % intervals."""
_AT_A_TIME = 4_000_000
"""Numbers that the bootstrap holds at once."""
SECONDS_EDGES = (2, 4, 8, 16, 32, 64, 128, 256)
"""Where the bins of the times per record meet: each twice as long as the one before, the last open."""


@dataclass(frozen=True)
class Share:
    """`hits` of `n`, with the Wilson interval of the share."""

    hits: int
    n: int
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Alpha:
    """Krippendorff's alpha, nominal: 1 full agreement, 0 chance, below 0 systematic disagreement.

    All three numbers are None where alpha is undefined: nothing was judged twice (`comparisons` is 0), or
    every answer is the same, so that agreement by chance is full already.
    """

    value: float | None
    low: float | None
    high: float | None
    comparisons: int
    """How many were judged by two annotators or more: only these tell about agreement."""


@dataclass(frozen=True)
class Consistency:
    """How often an annotator judges the same two completions the same way again, in another order."""

    share: Share
    """Of pairs of completions. The pairs of a ranking depend on each other: the interval is that of
    `retests` answers."""
    retests: int
    alpha: float | None
    """The same against chance: 0 for answers that have nothing to do with each other."""


@dataclass(frozen=True)
class FirstPlace:
    """How often what was shown first wins, among judgements with one winner. Orders are drawn by lot."""

    share: Share
    expected: float
    """By lot: 1 / K of K completions, on average."""
    p: float
    """Exact, two-sided: how often lots alone would lead at least this far from what is expected."""


@dataclass(frozen=True)
class Rise:
    """Alpha over the comparisons that an annotator and at least two others judged: with and without them."""

    all: float
    without: float
    comparisons: int
    p: float
    """One-sided, by the bootstrap's standard error: how often it would rise this much by chance."""


@dataclass(frozen=True)
class Seconds:
    """Time per record: median, 10 % and 90 % quantiles, and records per bin of `SECONDS_EDGES`."""

    n: int
    median: float
    p10: float
    p90: float
    histogram: tuple[int, ...]


def wilson(share: npt.ArrayLike, n: npt.ArrayLike) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Lower and upper ends of the 95 % interval of shares of `n`, which need not be whole."""
    value, n = np.asarray(share, np.float64), np.asarray(n, np.float64)
    middle = value + _Z**2 / (2 * n)
    reach = _Z * np.sqrt(value * (1 - value) / n + _Z**2 / (4 * n**2))
    low, high = ((middle + sign * reach) / (1 + _Z**2 / n) for sign in (-1, 1))
    return np.clip(low, 0, 1), np.clip(high, 0, 1)


def share(hits: int, n: int, *, independent: int | None = None) -> Share | None:
    """A share with its Wilson interval; None of nothing.

    Args:
        hits: how many of them.
        n: how many.
        independent: how many tell something of their own, where the `n` depend on each other; None: all.
    """
    if not n:
        return None
    low, high = wilson(hits / n, n if independent is None else independent)
    return Share(hits, n, hits / n, float(low), float(high))


def alpha(table: votes.VoteTable, *, seed: int = 0) -> Alpha:
    """Krippendorff's alpha between annotators, with its interval.

    A unit is a pair of completions within a comparison, a value what `votes.vote` says of it. The interval
    is a percentile bootstrap over whole comparisons, for the pairs of a ranking, and the answers to a pair,
    depend on each other. Where all agree on everything it would have no width, however few they are: its
    lower end is then that of the share of comparisons agreed on (Wilson), against the same chance.

    Args:
        table: of judgements that count, see `votes.counted`, on an axis.
        seed: equal seeds give equal intervals.
    """
    counts = _counts(table)
    counts = counts[counts[:, 0].sum(axis=-1) > 1]
    matching, totals = _of_comparisons(counts)
    value = float(_alpha(matching.sum(axis=0), totals.sum(axis=0)))
    if np.isnan(value):
        return Alpha(None, None, None, len(counts))
    low, high = np.nanpercentile(_resampled(matching[:, None], totals[:, None], seed)[:, 0], [2.5, 97.5])
    if value == 1 and (agreed := share(len(counts), len(counts))):
        answers = totals.sum(axis=0)
        low = _alpha(np.array(agreed.low * answers.sum()), answers)
    return Alpha(value, float(low), float(high), len(counts))


def rise_without(table: votes.VoteTable, annotator: str, *, seed: int = 0) -> Rise | None:
    """Whether the others agree more among themselves than with this annotator.

    Both alphas are of the same comparisons. None where fewer than two others judged any, or where alpha
    is undefined.
    """
    if annotator not in table.annotators:
        return None
    others = table.annotator != table.annotators.index(annotator)
    of_all, of_others = _counts(table), _counts(table, others)
    n_all, n_others = of_all[:, 0].sum(axis=-1), of_others[:, 0].sum(axis=-1)
    both = np.stack([of_all, of_others], axis=1)[(n_others > 1) & (n_all > n_others)]
    matching, totals = _of_comparisons(both)
    values = _alpha(matching.sum(axis=0), totals.sum(axis=0))
    if np.isnan(values).any():
        return None
    resampled = _resampled(matching, totals, seed)
    error = float(np.nanstd(resampled[:, 1] - resampled[:, 0]))
    rise = float(values[1] - values[0])
    p = float(stats.norm.sf(rise / error)) if error else float(rise <= 0)
    return Rise(float(values[0]), float(values[1]), len(both), p)


def self_consistency(judgements: Iterable[Judgement], axis: Axis) -> Consistency | None:
    """How often annotators gave the same judgement to a retest as to the comparison it repeats.

    Completions are brought into the same order first. None without a retest that was judged both times by
    the same annotator, with usable audio.
    """
    usable = [item for item in judgements if not item.audio_unusable]
    first = {(item.comparison, item.annotator): item for item in usable if item.purpose == "comparison"}
    twice: list[tuple[int, int]] = []
    retests = 0
    for retest in usable:
        before = first.get((votes.subject(retest), retest.annotator))
        once, again = before and before.ranking(axis), retest.ranking(axis)
        if retest.purpose != "retest" or not (before and once and again):
            continue
        retests += 1
        places = votes.places_in(retest, before.texts)
        twice += [
            (votes.vote(once, i, j), votes.vote(again, places[i], places[j]))
            for i, j in votes.PLACE_PAIRS
            if j < len(places)
        ]
    same = share(sum(earlier == later for earlier, later in twice), len(twice), independent=retests)
    if same is None:
        return None
    counts = np.array([[pair.count(value) for value in votes.VALUES] for pair in twice], float)
    value = float(_alpha(*(part.sum(axis=0) for part in _coincidences(counts))))
    return Consistency(same, retests, None if np.isnan(value) else value)


def is_right(ranking: Ranking, expected: Ranking) -> bool:
    """Whether a ranking says what is known: every completion that is better is ranked better.

    A tie of a better with a worse one is wrong, as is "all bad" where something is good. Of completions that
    are known to be equal any order is right.
    """
    if ranking.all_bad or expected.all_bad:
        return ranking.all_bad and expected.all_bad
    places = range(len(expected.ranks))
    return all(ranking.prefers(i, j) for i in places for j in places if expected.prefers(i, j))


def gold_accuracy(judgements: Iterable[Judgement]) -> Share | None:
    """How often the question about factuality was answered as it is known to be right; None without gold."""
    right = [
        is_right(item.factuality, item.expected)
        for item in judgements
        if item.expected is not None and item.factuality is not None and not item.audio_unusable
    ]
    return share(sum(right), len(right))


def first_place(judgements: Iterable[Judgement], axis: Axis) -> FirstPlace | None:
    """How often the completion that was shown first wins; None without a judgement that has one winner.

    Only comparisons count: an honest annotator who prefers A prefers B in the retest.
    """
    sizes: Counter[int] = Counter()
    hits = 0
    for item in judgements:
        ranking = item.ranking(axis)
        if item.purpose != "comparison" or item.audio_unusable or ranking is None or ranking.all_bad:
            continue
        if len(ranking.ranks) > 1 and ranking.ranks.count(1) == 1:
            sizes[len(ranking.ranks)] += 1
            hits += ranking.ranks[0] == 1
    n = sizes.total()
    of_first = share(hits, n)
    if of_first is None:
        return None
    chances = np.ones(1)
    for size, times in sorted(sizes.items()):
        chances = np.convolve(chances, stats.binom.pmf(np.arange(times + 1), times, 1 / size))
    p = chances[chances <= chances[hits] * (1 + 1e-7)].sum()  # as scipy's exact binomial test
    expected = sum(times / size for size, times in sizes.items()) / n
    return FirstPlace(of_first, expected, min(float(p), 1.0))


def seconds(judgements: Iterable[Judgement]) -> Seconds | None:
    """Time per record over all answers whose time is known; None if there is none."""
    known = [item.seconds for item in judgements if item.seconds is not None]
    if not known:
        return None
    low, middle, high = np.percentile(known, [10, 50, 90])
    bins = np.bincount(np.searchsorted(SECONDS_EDGES, known, side="right"), minlength=len(SECONDS_EDGES) + 1)
    return Seconds(len(known), float(middle), float(low), float(high), tuple(bins.tolist()))


# ---------------------------------------------------------------- alpha by coincidence counts


def _counts(table: votes.VoteTable, kept: npt.NDArray[np.bool_] | None = None) -> npt.NDArray[np.float64]:
    """How often each value was given to each pair, shape (comparisons, pairs of places, values)."""
    comparisons, pairs, values = len(table.subjects), len(votes.PLACE_PAIRS), len(votes.VALUES)
    places = (table.comparison * pairs + table.pair) * values + table.value
    flat = np.bincount(places if kept is None else places[kept], minlength=comparisons * pairs * values)
    return flat.reshape(comparisons, pairs, values).astype(np.float64)


def _of_comparisons(
    counts: npt.NDArray[np.float64],
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """What each comparison adds to alpha over all of its pairs; counts of shape (..., pairs, values)."""
    matching, totals = _coincidences(counts)
    return matching.sum(axis=-1), totals.sum(axis=-2)


def _coincidences(
    counts: npt.NDArray[np.float64],
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Terms that each unit adds to agreement and to the values' totals; none if judged once only.

    Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011), section C: a unit judged by m
    annotators has m (m - 1) ordered pairs of answers, each weighing 1 / (m - 1).

    Args:
        counts: shape (..., values).

    Returns:
        Matching pairs of answers, shape (...), and answers per value, shape (..., values).
    """
    judged = counts.sum(axis=-1, keepdims=True)
    pairable = np.where(judged > 1, counts, 0.0)
    matching = (pairable * (pairable - 1)).sum(axis=-1) / np.maximum(judged[..., 0] - 1, 1)
    return matching, pairable


def _alpha(matching: npt.NDArray[np.float64], totals: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """(observed - expected) / (1 - expected) agreement; NaN where undefined. Shapes (...), (..., values)."""
    n = totals.sum(axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        expected = (totals * (totals - 1)).sum(axis=-1) / (n * (n - 1))
        return np.where(expected < 1, (matching / n - expected) / (1 - expected), np.nan)


def _resampled(
    matching: npt.NDArray[np.float64], totals: npt.NDArray[np.float64], seed: int
) -> npt.NDArray[np.float64]:
    """Alpha of bootstrap samples of comparisons, shape (resamples, sets).

    Comparisons that add the same are interchangeable, and there are few kinds of them: drawing how often
    each kind occurs is the same as drawing comparisons, at a cost that does not grow with their number.

    Args:
        matching: of several sets of answers to the same comparisons, shape (comparisons, sets).
        totals: likewise, shape (comparisons, sets, values).
        seed: of the draw.
    """
    n, sets = matching.shape
    added = np.concatenate([totals, matching[..., None]], axis=-1).reshape(n, -1)
    kinds, times = np.unique(added, axis=0, return_counts=True)
    rng = np.random.default_rng(seed)
    at_a_time = max(1, _AT_A_TIME // len(kinds))
    sums = np.concatenate(
        [
            rng.multinomial(n, times / n, size=min(at_a_time, _RESAMPLES - done)).astype(np.float64) @ kinds
            for done in range(0, _RESAMPLES, at_a_time)
        ]
    ).reshape(_RESAMPLES, sets, -1)
    return _alpha(sums[..., -1], sums[..., :-1])

"""How far judgements can be trusted: agreement between annotators, on retests, with gold and with chance.

Pure measures with 95 % intervals; `quality` puts them together and says in words what stands out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

from preference_data.schema import Axis, Choice, Judgement

_CODES: dict[Choice, int] = {"a": 0, "b": 1, "tie": 2, "both_bad": 3}
_SWAPPED: dict[Choice, Choice] = {"a": "b", "b": "a", "tie": "tie", "both_bad": "both_bad"}
_RESAMPLES = 2000
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
    """How often an annotator judges the same two answers the same way again, their sides swapped."""

    share: Share
    alpha: float | None
    """The same against chance: 0 for answers that have nothing to do with each other."""


@dataclass(frozen=True)
class Lean:
    """How often side A wins among clear preferences. Sides are drawn by lot, so one half is expected."""

    share: Share
    p: float
    """Exact binomial, two-sided: how often lots alone would lead at least this far from one half."""


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


def is_heard(judgement: Judgement, min_heard: float) -> bool:
    """Whether its annotator had played at least that share of the clip. Unknown is not heard."""
    return (judgement.heard or 0.0) >= min_heard


def is_vote(judgement: Judgement, min_heard: float) -> bool:
    """Whether a judgement counts as a preference: of a comparison, heard, with usable audio."""
    heard = is_heard(judgement, min_heard)
    return judgement.purpose == "comparison" and not judgement.audio_unusable and heard


def share(hits: int, n: int) -> Share | None:
    """A share with its Wilson interval; None of nothing."""
    if not n:
        return None
    interval = stats.binomtest(hits, n).proportion_ci(confidence_level=0.95, method="wilson")
    return Share(hits, n, hits / n, float(interval.low), float(interval.high))


def alpha(judgements: Iterable[Judgement], axis: Axis, *, seed: int = 0) -> Alpha:
    """Krippendorff's alpha between annotators over comparisons, with its interval.

    Retests and gold are left out: they are there to measure annotators, and would weigh twice.
    The interval is a percentile bootstrap over whole comparisons, for answers to one comparison depend on
    each other. Where all agree on everything it would have no width, however few they are: its lower end is
    then that of the share of comparisons agreed on (Wilson), against the same chance.

    Args:
        judgements: answers that count, see `is_vote`.
        axis: the question.
        seed: equal seeds give equal intervals.
    """
    votes = [item for item in judgements if item.purpose == "comparison"]
    counts = _counts(votes, axis, _units(votes))
    counts = counts[counts.sum(axis=1) > 1]
    value = float(_alpha(*(part.sum(axis=0) for part in _coincidences(counts))))
    if np.isnan(value):
        return Alpha(None, None, None, len(counts))
    low, high = np.nanpercentile(_resampled(counts[:, None], seed)[:, 0], [2.5, 97.5])
    if value == 1 and (agreed := share(len(counts), len(counts))):
        answers = counts.sum(axis=0)
        low = _alpha(np.array(agreed.low * answers.sum()), answers)
    return Alpha(value, float(low), float(high), len(counts))


def rise_without(votes: Sequence[Judgement], axis: Axis, annotator: str, *, seed: int = 0) -> Rise | None:
    """Whether the others agree more among themselves than with this annotator.

    Both alphas are of the same comparisons. None where fewer than two others judged any, or where alpha
    is undefined.
    """
    votes = [item for item in votes if item.purpose == "comparison"]
    units = _units(votes)
    of_all = _counts(votes, axis, units)
    of_others = _counts([item for item in votes if item.annotator != annotator], axis, units)
    both = np.stack([of_all, of_others], axis=1)
    both = both[(of_others.sum(axis=1) > 1) & (of_all.sum(axis=1) > of_others.sum(axis=1))]
    values = _alpha(*(part.sum(axis=0) for part in _coincidences(both)))
    if np.isnan(values).any():
        return None
    resampled = _resampled(both, seed)
    error = float(np.nanstd(resampled[:, 1] - resampled[:, 0]))
    rise = float(values[1] - values[0])
    p = float(stats.norm.sf(rise / error)) if error else float(rise <= 0)
    return Rise(float(values[0]), float(values[1]), len(both), p)


def self_consistency(judgements: Iterable[Judgement], axis: Axis) -> Consistency | None:
    """How often annotators gave the same judgement to a retest as to the comparison it repeats.

    Sides are swapped back first. None without a retest that was judged both times by the same annotator,
    with usable audio.
    """
    usable = [item for item in judgements if not item.audio_unusable]
    first = {(item.comparison, item.annotator): item for item in usable if item.purpose != "retest"}
    choices_twice: list[tuple[Choice, Choice]] = []
    for retest in usable:
        before = first.get((retest.retest_of or "", retest.annotator))
        if retest.purpose != "retest" or before is None:
            continue
        swapped = before.completion_a == retest.completion_b
        choice: Choice = getattr(retest, axis)
        choices_twice.append((getattr(before, axis), _SWAPPED[choice] if swapped else choice))
    same = share(sum(first == second for first, second in choices_twice), len(choices_twice))
    if same is None:
        return None
    counts = np.array([[choices.count(choice) for choice in _CODES] for choices in choices_twice], float)
    value = float(_alpha(*(part.sum(axis=0) for part in _coincidences(counts))))
    return Consistency(same, None if np.isnan(value) else value)


def gold_accuracy(judgements: Iterable[Judgement]) -> Share | None:
    """How often the question about factuality was answered as it is known to be right; None without gold."""
    gold = [item for item in judgements if item.expected is not None and not item.audio_unusable]
    return share(sum(item.factuality == item.expected for item in gold), len(gold))


def side_a(judgements: Iterable[Judgement], axis: Axis) -> Lean | None:
    """How often side A wins among clear preferences; None without any.

    Only comparisons count: an honest annotator who prefers A prefers B in the retest.
    """
    clear = [
        getattr(item, axis)
        for item in judgements
        if item.purpose == "comparison" and not item.audio_unusable and getattr(item, axis) in ("a", "b")
    ]
    of_a = share(clear.count("a"), len(clear))
    return Lean(of_a, float(stats.binomtest(of_a.hits, of_a.n).pvalue)) if of_a else None


def seconds(judgements: Iterable[Judgement]) -> Seconds | None:
    """Time per record over all answers whose time is known; None if there is none."""
    known = [item.seconds for item in judgements if item.seconds is not None]
    if not known:
        return None
    low, middle, high = np.percentile(known, [10, 50, 90])
    bins = np.bincount(np.searchsorted(SECONDS_EDGES, known, side="right"), minlength=len(SECONDS_EDGES) + 1)
    return Seconds(len(known), float(middle), float(low), float(high), tuple(bins.tolist()))


# ---------------------------------------------------------------- alpha by coincidence counts


def _units(votes: Sequence[Judgement]) -> dict[str, int]:
    """A number for each comparison."""
    return {unit: i for i, unit in enumerate(dict.fromkeys(vote.comparison for vote in votes))}


def _counts(votes: Sequence[Judgement], axis: Axis, units: dict[str, int]) -> npt.NDArray[np.float64]:
    """How often each choice was given to each comparison, shape (comparisons, choices)."""
    places = [units[item.comparison] * len(_CODES) + _CODES[getattr(item, axis)] for item in votes]
    flat = np.bincount(np.array(places, dtype=np.intp), minlength=len(units) * len(_CODES))
    return flat.reshape(len(units), len(_CODES)).astype(np.float64)


def _coincidences(
    counts: npt.NDArray[np.float64],
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Terms that each comparison adds to agreement and to the choices' totals; none if judged once only.

    Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011), section C: a comparison judged by m
    annotators has m (m - 1) ordered pairs of answers, each weighing 1 / (m - 1).

    Args:
        counts: shape (..., choices).

    Returns:
        Matching pairs, shape (...), and answers per choice, shape (..., choices).
    """
    judged = counts.sum(axis=-1, keepdims=True)
    pairable = np.where(judged > 1, counts, 0.0)
    matching = (pairable * (pairable - 1)).sum(axis=-1) / np.maximum(judged[..., 0] - 1, 1)
    return matching, pairable


def _alpha(matching: npt.NDArray[np.float64], totals: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """(observed - expected) / (1 - expected) agreement; NaN where undefined. Shapes (...), (..., choices)."""
    n = totals.sum(axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        expected = (totals * (totals - 1)).sum(axis=-1) / (n * (n - 1))
        return np.where(expected < 1, (matching / n - expected) / (1 - expected), np.nan)


def _resampled(counts: npt.NDArray[np.float64], seed: int) -> npt.NDArray[np.float64]:
    """Alpha of bootstrap samples of comparisons, shape (resamples, sets).

    Comparisons with the same counts are interchangeable, and few counts are possible: drawing how often
    each of them occurs is the same as drawing comparisons, at a cost that does not grow with their number.

    Args:
        counts: several sets of answers to the same comparisons, shape (comparisons, sets, choices).
        seed: of the draw.
    """
    n, sets, choices = counts.shape
    kinds, times = np.unique(counts.reshape(n, -1), axis=0, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(n, times / n, size=_RESAMPLES).astype(np.float64)
    matching, chosen = _coincidences(kinds.reshape(-1, sets, choices))
    return _alpha(drawn @ matching, np.tensordot(drawn, chosen, axes=1))

"""Differences of two conditions scored on the same questions, with 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import optimize, special, stats

from preference_data.preferences import agreement

_BATCH_ELEMENTS = 4_000_000
"""Resampled values held at once; bounds memory (32 MB) whatever the number of questions."""

_Z = float(stats.norm.ppf(0.975))
_RIDGE = 1e-6


class Interval(NamedTuple):
    """Means of two conditions over the same `n` questions, and the 95 % interval of after minus before.

    Units are those of the scores.
    """

    before: float
    after: float
    delta: float
    ci_low: float
    ci_high: float
    n: int


def paired_bootstrap(
    before: npt.ArrayLike, after: npt.ArrayLike, *, resamples: int = 4000, seed: int = 0
) -> Interval:
    """Percentile bootstrap (95 %) of the mean paired difference.

    Whole questions are resampled, so a question's difficulty for both conditions cancels. Where every
    difference is the same there is nothing to resample and the interval has zero width.

    Args:
        before: scores of one condition, shape (n,).
        after: scores of the other on the same questions in the same order, shape (n,).
        resamples: bootstrap samples drawn.
        seed: equal seeds give equal intervals.

    Raises:
        ValueError: the shapes differ or are not (n,) with n >= 1, or a score is not finite.
    """
    first, second = _checked_pair(before, after)
    differences = second - first
    delta = float(differences.mean())
    low, high = delta, delta
    if np.ptp(differences) > 0:
        result = stats.bootstrap(
            (differences,),
            np.mean,
            n_resamples=resamples,
            batch=max(1, _BATCH_ELEMENTS // differences.size),
            vectorized=True,
            confidence_level=0.95,
            method="percentile",
            rng=np.random.default_rng(seed),
        )
        low, high = float(result.confidence_interval.low), float(result.confidence_interval.high)
    return Interval(float(first.mean()), float(second.mean()), delta, low, high, differences.size)


class Difference(NamedTuple):
    """A paired difference of weighted means: `delta` with its 95 % interval and two-sided p-value.

    `n` counts the questions behind it. Units are those of the scores.
    """

    before: float
    after: float
    delta: float
    ci_low: float
    ci_high: float
    p: float
    n: int


def macro_bootstrap(
    before: npt.ArrayLike,
    after: npt.ArrayLike,
    *,
    cells: Sequence[str],
    strata: Sequence[str],
    clusters: Sequence[str],
    means: Mapping[str, Mapping[str, float]],
    resamples: int = 4000,
    seed: int = 0,
) -> dict[str, Difference]:
    """Percentile bootstrap (95 %) of weighted means of paired differences, stratified and clustered.

    Within a cell the mean is over its questions (micro); `means` then weighs the cells (macro). Each
    resample draws whole clusters within each stratum. Of m clusters it draws m - 1 and weighs them by
    m / (m - 1), which makes the bootstrap's variance unbiased where strata are small (Rao and Wu, 1988),
    and the percentiles are those of Student's t for the clusters there are. A stratum of one cluster says
    nothing of its own variance and adds none.

    Args:
        before: scores of one condition, shape (n,).
        after: scores of the other on the same questions in the same order, shape (n,).
        cells: the mean each question enters, length n, e.g. a category.
        strata: groups held fixed, length n, e.g. a task; each lies within one cell.
        clusters: units drawn as a whole, length n, e.g. a clip; a clip in two strata counts as two.
        means: name -> weight of each cell; weights of a mean sum to 1.
        resamples: bootstrap samples drawn.
        seed: equal seeds give equal intervals.

    Returns:
        A difference for each of `means`.

    Raises:
        ValueError: shapes differ, a score is not finite, a stratum lies in two cells, or a mean asks for
            a cell that is not there.
    """
    first, second = _checked_pair(before, after)
    names = list(dict.fromkeys(cells))
    if wrong := [name for name, weights in means.items() if not set(weights) <= set(names)]:
        raise ValueError(f"mean {wrong[0]!r} weighs {sorted(means[wrong[0]])}, there is {sorted(names)}")
    cell_of_row = np.array([names.index(cell) for cell in cells])
    totals, counts = np.zeros((2, resamples, len(names)))
    freedom = np.zeros(len(names))
    rng = np.random.default_rng(seed)
    for stratum in dict.fromkeys(strata):
        rows = np.flatnonzero(np.asarray(strata) == stratum)
        cell = set(cell_of_row[rows])
        if len(cell) > 1:
            raise ValueError(f"stratum {stratum!r} lies in cells {sorted(names[index] for index in cell)}")
        column = cell.pop()
        sums = _cluster_sums((second - first)[rows], [clusters[row] for row in rows.tolist()])
        drawn = _drawn_sums(sums, resamples, rng)
        totals[:, column] += drawn[0]
        counts[:, column] += drawn[1]
        freedom[column] += sums.shape[1] - 1
    draws = totals / counts
    weights = {name: np.array([means[name].get(cell, 0.0) for cell in names]) for name in means}
    cell_means = [
        np.array([side[cell_of_row == cell].mean() for cell in range(len(names))]) for side in (first, second)
    ]
    return {
        name: _difference(
            float(weight @ cell_means[0]),
            float(weight @ cell_means[1]),
            draws @ weight,
            int(freedom[weight != 0].sum()),
            int((weight[cell_of_row] != 0).sum()),
        )
        for name, weight in weights.items()
    }


def _checked_pair(before: npt.ArrayLike, after: npt.ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    first, second = (np.asarray(values, dtype=np.float64) for values in (before, after))
    if first.shape != second.shape or first.ndim != 1 or not first.size:
        raise ValueError(
            f"scores need two equal shapes (n,) with n >= 1, got {first.shape} and {second.shape}"
        )
    bad = np.flatnonzero(~np.isfinite(second - first))
    if bad.size:
        raise ValueError(f"pair {bad[0]}: scores must be finite, got {first[bad[0]]} and {second[bad[0]]}")
    return first, second


def _cluster_sums(values: np.ndarray, clusters: Sequence[str]) -> np.ndarray:
    """Per cluster the sum and the number of its values, shape (2, clusters)."""
    of_row = np.unique(np.asarray(clusters), return_inverse=True)[1]
    return np.array([np.bincount(of_row, weights=values), np.bincount(of_row)])


def _drawn_sums(sums: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Sums and numbers over drawn clusters, shape (2, resamples)."""
    clusters = sums.shape[1]
    drawn = max(1, clusters - 1)
    totals = np.empty((2, resamples))
    step = max(1, _BATCH_ELEMENTS // drawn)
    for start in range(0, resamples, step):
        rows = rng.integers(0, clusters, size=(min(step, resamples - start), drawn))
        for side in (0, 1):
            totals[side, start : start + step] = sums[side][rows].sum(axis=1)
    return totals * (clusters / drawn)


def _difference(before: float, after: float, draws: np.ndarray, freedom: int, n: int) -> Difference:
    delta = after - before
    if np.ptp(draws) < 1e-12:  # nothing varies: rounding must not look like evidence, nor a single clip
        is_evidence = freedom > 0 and abs(delta) >= 1e-12
        return Difference(before, after, delta, delta, delta, 0.0 if is_evidence else 1.0, n)
    tail = stats.norm.cdf(stats.t.ppf(0.025, freedom))
    low, high = np.quantile(draws, [tail, 1 - tail])
    beyond = min((draws <= 0).sum(), (draws >= 0).sum())
    p = min(1.0, 2 * (beyond + 1) / (draws.size + 1))
    return Difference(before, after, delta, float(low), float(high), float(p), n)


class Share(NamedTuple):
    """A share (0..1) of `n` with its 95 % interval; None where n is 0."""

    share: float | None
    ci_low: float | None
    ci_high: float | None
    n: int


def wilson(successes: int, n: int) -> Share:
    """A share of `n` independent trials with Wilson's score interval (95 %)."""
    if not n:
        return Share(None, None, None, 0)
    low, high = agreement.wilson(successes / n, n)
    return Share(successes / n, float(low), float(high), n)


def length_controlled(wins: npt.ArrayLike, extra_length: npt.ArrayLike, clusters: Sequence[str]) -> Share:
    """The win rate had both answers been equally long (AlpacaEval-LC, arXiv:2404.04475).

    Fits logit P(win) = quality + bias * tanh(extra length / its standard deviation) and returns
    sigmoid(quality). This is the paper's model without the term for how hard a question is: that one is
    fitted over many models, and here two are compared. One tied question of equal lengths is added, so that
    a clean sweep stays finite. The interval is the sandwich estimate's, clustered.

    Args:
        wins: 1 won, 0.5 tied, 0 lost, shape (n,).
        extra_length: how much longer the answer that won or lost was, in any unit, shape (n,).
        clusters: groups that are not independent, length n, e.g. a clip.
    """
    won, extra = _checked_pair(wins, extra_length)
    spread = float(extra.std()) or 1.0
    y = np.append(won, 0.5)
    x = np.column_stack([np.ones_like(y), np.append(np.tanh(extra / spread), 0.0)])
    of_row = np.unique(np.asarray(clusters), return_inverse=True)[1]
    of_row = np.append(of_row, of_row.max() + 1)
    theta = _fit_logistic(x, y)
    p = special.expit(x @ theta)
    scores = np.array([np.bincount(of_row, weights=(y - p) * column) for column in x.T])
    bread = np.linalg.inv((x.T * (p * (1 - p))) @ x + _RIDGE * np.eye(2))
    half = _Z * math.sqrt((bread @ scores @ scores.T @ bread)[0, 0])
    low, middle, high = (float(special.expit(theta[0] + side)) for side in (-half, 0.0, half))
    return Share(middle, low, high, won.size)


def _fit_logistic(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Maximum likelihood; a trace of ridge keeps perfect separation finite."""

    def loss(theta: np.ndarray) -> tuple[float, np.ndarray]:
        z = x @ theta
        value = np.logaddexp(0, z).sum() - y @ z + _RIDGE / 2 * theta @ theta
        return float(value), x.T @ (special.expit(z) - y) + _RIDGE * theta

    fit: np.ndarray = optimize.minimize(loss, np.zeros(x.shape[1]), jac=True, options={"gtol": 1e-8}).x
    return fit


def bradley_terry(wins: npt.ArrayLike, *, prior: float = 0.5) -> np.ndarray:
    """Strengths, of mean 0, such that P(i beats j) = sigmoid(strength i - strength j).

    Args:
        wins: how often each beat each other, ties as half, shape (..., K, K).
        prior: wins added to both sides of every pair, so that a player without wins stays finite.

    Returns:
        Strengths in logits, shape (..., K).
    """
    table = np.asarray(wins, dtype=np.float64)
    players = table.shape[-1]
    table = np.where(np.eye(players, dtype=bool), 0.0, table + prior)
    games, won = table + np.swapaxes(table, -1, -2), table.sum(axis=-1)
    strength = np.ones(table.shape[:-1])
    for _ in range(1000):  # Zermelo's iteration; each step raises the likelihood
        pairs = strength[..., :, None] + strength[..., None, :]
        updated = won / (games / pairs).sum(axis=-1)
        updated /= np.exp(np.log(updated).mean(axis=-1, keepdims=True))
        done = bool(np.abs(np.log(updated / strength)).max() < 1e-10)
        strength = updated
        if done:
            break
    return np.log(strength)

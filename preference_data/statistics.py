"""Is a difference real? Two conditions scored on the same questions, with a 95 % interval.

Used wherever two policies are set side by side: the evaluation, its gate, and the compare page.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import stats

_BATCH_ELEMENTS = 4_000_000
"""Resampled values held at once; bounds memory (32 MB) whatever the number of questions."""


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

    Whole questions are resampled, so what makes a question hard for both conditions cancels. Where every
    difference is the same there is nothing to resample and the interval has zero width.

    Args:
        before: scores of one condition, shape (n,).
        after: scores of the other on the same questions in the same order, shape (n,).
        resamples: bootstrap samples drawn.
        seed: equal seeds give equal intervals.

    Raises:
        ValueError: the shapes differ or are not (n,) with n >= 1, or a score is not finite.
    """
    first, second = (np.asarray(values, dtype=np.float64) for values in (before, after))
    if first.shape != second.shape or first.ndim != 1 or not first.size:
        raise ValueError(
            f"paired scores need two equal shapes (n,) with n >= 1, got {first.shape} and {second.shape}"
        )
    differences = second - first
    if not np.isfinite(differences).all():
        where = int(np.flatnonzero(~np.isfinite(differences))[0])
        raise ValueError(f"pair {where}: scores must be finite, got {first[where]} and {second[where]}")
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

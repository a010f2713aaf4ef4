"""From judgements to the numbers people decide on: means, paired differences, controls."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from align.evaluation.benchmarks.air_bench import Item
from align.evaluation.judges.facts import Judgement
from align.evaluation.statistics import Interval, paired_bootstrap
from preference_data.schema import Axis

MARKS: dict[Axis, str] = {"factuality": "factual", "behaviour": "behaves"}
"""Reported name -> field of a judgement."""


def summary(judgements: Sequence[Judgement], responses: Sequence[str]) -> dict[str, float]:
    """Means over questions; `asked` and `over_abstention` over the answerable ones only."""
    answerable = [one for one in judgements if one.answerable]
    return {
        **{name: _mean([getattr(one, field) for one in judgements]) for name, field in MARKS.items()},
        "score": _mean([one.score for one in judgements]),
        "asked": _mean([one.asked for one in answerable]),
        "over_abstention": _mean([one.abstains for one in answerable]),
        "words": _mean([len(text.split()) for text in responses]),
        "distinct": len(set(responses)),
        "n": len(judgements),
        "n_answerable": len(answerable),
    }


def by_category(
    items: Sequence[Item], judgements: Sequence[Judgement], responses: Sequence[str]
) -> dict[str, dict[str, float]]:
    """`summary` for each AIR-Bench category present."""
    return {
        category: summary([judgements[i] for i in rows], [responses[i] for i in rows])
        for category, rows in _rows_by_category(items).items()
    }


def compare(before: Sequence[Judgement], after: Sequence[Judgement], seed: int = 0) -> dict[str, Interval]:
    """Paired differences of the marks on the same questions; `asked` on the answerable ones."""
    found: dict[str, Interval] = {
        name: paired_bootstrap(_column(before, field), _column(after, field), seed=seed)
        for name, field in MARKS.items()
    }
    rows = [i for i, one in enumerate(before) if one.answerable]
    if rows:
        found["asked"] = paired_bootstrap(
            _column(before, "asked")[rows], _column(after, "asked")[rows], seed=seed
        )
    return found


def compare_by_category(
    items: Sequence[Item], before: Sequence[Judgement], after: Sequence[Judgement], seed: int = 0
) -> dict[str, dict[str, Interval]]:
    """`compare` within each category."""
    return {
        category: compare([before[i] for i in rows], [after[i] for i in rows], seed)
        for category, rows in _rows_by_category(items).items()
    }


def _rows_by_category(items: Sequence[Item]) -> dict[str, list[int]]:
    rows: dict[str, list[int]] = {}
    for i, item in enumerate(items):
        rows.setdefault(item.category, []).append(i)
    return rows


def _column(judgements: Sequence[Judgement], field: str) -> np.ndarray:
    return np.array([float(getattr(one, field)) for one in judgements])


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else 0.0

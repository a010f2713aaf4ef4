"""How far annotators agree: Krippendorff's alpha, and each annotator's lean to side A."""

from __future__ import annotations

from collections.abc import Sequence

import krippendorff
import numpy as np

from preference_data.schema import Annotation, Axis

_CODES = {"a": 0.0, "b": 1.0, "tie": 2.0, "both_bad": 3.0}


def alpha(annotations: Sequence[Annotation], axis: Axis) -> float | None:
    """Krippendorff's alpha (nominal) over comparisons with several annotators; 1 agree, 0 chance.

    None where it is undefined: no comparison was judged twice, or every answer is the same.
    """
    raters = sorted({one.annotator for one in annotations})
    units = sorted({(one.prompt_id, one.completion_a, one.completion_b) for one in annotations})
    table = np.full((len(raters), len(units)), np.nan)
    unit_of, rater_of = {u: i for i, u in enumerate(units)}, {r: i for i, r in enumerate(raters)}
    for one in annotations:
        unit = unit_of[one.prompt_id, one.completion_a, one.completion_b]
        table[rater_of[one.annotator], unit] = _CODES[getattr(one, axis)]
    paired = table[:, (~np.isnan(table)).sum(axis=0) > 1]
    if paired.size == 0 or len(np.unique(paired[~np.isnan(paired)])) < 2:
        return None
    return float(krippendorff.alpha(reliability_data=paired, level_of_measurement="nominal"))


def share_of_a(annotations: Sequence[Annotation], axis: Axis) -> dict[str, float]:
    """Per annotator, how often side A wins among clear preferences; 0.5 is unbiased."""
    shares: dict[str, float] = {}
    for rater in sorted({one.annotator for one in annotations}):
        clear = [
            getattr(one, axis)
            for one in annotations
            if one.annotator == rater and getattr(one, axis) in ("a", "b")
        ]
        if clear:
            shares[rater] = clear.count("a") / len(clear)
    return shares

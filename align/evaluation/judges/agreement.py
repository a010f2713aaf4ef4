"""Does the judge agree with people? Its scores of two answers against annotators' choices between them.

AIR-Bench validates its judge the same way: scores are turned into preferences, and the share of people's
decisive choices that they match is reported (above 70 % there).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from align.evaluation.benchmarks.air_bench import item_of
from align.evaluation.judged_answers import Judge, preference_points
from align.evaluation.statistics import Share, wilson
from align.run_folder.artifacts import plain_values
from preference_data.schema import Axis, Comparison, Judgement, Prompt


class Margin(NamedTuple):
    """Pairs whose scores differ by `low` to `high` points: how often people prefer the higher one."""

    low: float
    high: float
    agreement: Share


class JudgeAgreement(NamedTuple):
    """Over pairs on which most annotators clearly preferred one answer and the judge scored both."""

    agreement: Share
    """Share where the judge scores that answer higher; a tie of the judge's is not agreement."""
    judge_ties: int
    undecided: int
    """Pairs without a majority for one answer: ties, both bad, or annotators who disagree."""
    unscored: int
    """Decided pairs of which the judge has not scored both answers."""
    calibration: tuple[Margin, ...]
    """Pairs that the judge does not tie, in up to three parts from small to large difference: for a judge
    whose scores show how sure it is, the agreement rises."""


def measure(
    judge: Judge,
    comparisons: Sequence[Comparison],
    judgements: Iterable[Judgement],
    prompts: Mapping[str, Prompt],
    label: str,
) -> dict[str, dict[str, Any]]:
    """Have a judge score the answers that annotators compared; axis -> `JudgeAgreement` as plain values.

    Args:
        judge: scores every answer once, however often annotators compared it.
        comparisons: the comparisons to judge.
        judgements: annotators' judgements on these; those on other comparisons are left out.
        prompts: the questions behind `comparisons`, by id.
        label: names the work in progress reports.
    """
    answers = sorted({(pair.prompt_id, text) for pair in comparisons for text in (pair.text_a, pair.text_b)})
    items = [item_of(prompts[prompt], number) for number, (prompt, _) in enumerate(answers)]
    points = preference_points(judge.judge(items, [text for _, text in answers], label))
    ids = {comparison.id for comparison in comparisons}
    relevant = [judgement for judgement in judgements if judgement.comparison in ids]
    by_axis: dict[str, dict[str, Any]] = {}
    for axis, values in points.items():
        scores = {key: value for key, value in zip(answers, values, strict=True) if value is not None}
        by_axis[axis] = plain_values(judge_agreement(relevant, scores_of(comparisons, scores), axis))
    return by_axis


def judge_agreement(
    judgements: Iterable[Judgement], scores: Mapping[str, float], axis: Axis
) -> JudgeAgreement:
    """Compare a judge with the majority of annotators, pair by pair.

    Args:
        judgements: judgements; retests, gold and those of unusable audio are left out.
        scores: the judge's score by completion id; see `scores_of`.
        axis: the question put to the annotators.
    """
    majorities = [_majority(pair, votes) for pair, votes in _votes(judgements, axis).items()]
    decided = [best for best in majorities if best is not None]
    margins = [
        scores[better] - scores[worse] for better, worse in decided if better in scores and worse in scores
    ]
    return JudgeAgreement(
        wilson(sum(margin > 0 for margin in margins), len(margins)),
        margins.count(0),
        len(majorities) - len(decided),
        len(decided) - len(margins),
        _calibration([margin for margin in margins if margin]),
    )


def scores_of(comparisons: Iterable[Comparison], rated: Mapping[tuple[str, str], float]) -> dict[str, float]:
    """Scores by completion id, from scores by (prompt id, answer): equal answers have equal scores."""
    answers = (
        (completion, (pair.prompt_id, text))
        for pair in comparisons
        for completion, text in ((pair.completion_a, pair.text_a), (pair.completion_b, pair.text_b))
    )
    return {completion: rated[answer] for completion, answer in answers if answer in rated}


def _calibration(margins: Sequence[float]) -> tuple[Margin, ...]:
    sizes = np.abs(margins)
    if not sizes.size:
        return ()
    part = np.searchsorted(np.unique(np.quantile(sizes, [1 / 3, 2 / 3])), sizes)
    agrees = np.asarray(margins) > 0
    return tuple(
        Margin(
            float(sizes[part == third].min()),
            float(sizes[part == third].max()),
            wilson(int(agrees[part == third].sum()), int((part == third).sum())),
        )
        for third in np.unique(part)
    )


def _votes(judgements: Iterable[Judgement], axis: Axis) -> dict[frozenset[str], list[str | None]]:
    """Per pair of answers, whichever side they stood on, what each annotator preferred; None: neither."""
    votes: dict[frozenset[str], list[str | None]] = {}
    for row in judgements:
        if row.purpose != "comparison" or row.audio_unusable or row.completion_a == row.completion_b:
            continue
        preferred = {"a": row.completion_a, "b": row.completion_b}.get(getattr(row, axis))
        votes.setdefault(frozenset({row.completion_a, row.completion_b}), []).append(preferred)
    return votes


def _majority(pair: frozenset[str], votes: Sequence[str | None]) -> tuple[str, str] | None:
    """(better, worse) where more than half of the annotators chose the same answer, else None."""
    for better in sorted(pair):
        if 2 * votes.count(better) > len(votes):
            return better, next(iter(pair - {better}))
    return None

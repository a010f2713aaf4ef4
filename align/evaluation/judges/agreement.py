"""Does the judge agree with people? Its scores of two answers against annotators' choices between them.

AIR-Bench validates its judge the same way: scores are turned into preferences, and the share of people's
decisive choices that they match is reported (above 70 % there).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from align.evaluation.benchmarks.air_bench import item_of
from align.evaluation.judged_answers import Judge, preference_points
from align.evaluation.statistics import Share, wilson
from align.run_folder.artifacts import plain_values
from preference_data.schema import Axis, Comparison, Judgement, Prompt

Answer = tuple[str, str]
"""Id of a prompt, and what a completion says: equal completions have equal scores."""


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
    answers = sorted({(item.prompt_id, text) for item in comparisons for text in item.texts})
    items = [item_of(prompts[prompt], number) for number, (prompt, _) in enumerate(answers)]
    points = preference_points(judge.judge(items, [text for _, text in answers], label))
    ids = {comparison.id for comparison in comparisons}
    relevant = [judgement for judgement in judgements if judgement.comparison in ids]
    by_axis: dict[str, dict[str, Any]] = {}
    for axis, values in points.items():
        scores = {key: value for key, value in zip(answers, values, strict=True) if value is not None}
        by_axis[axis] = plain_values(judge_agreement(relevant, scores, axis))
    return by_axis


def judge_agreement(
    judgements: Iterable[Judgement], scores: Mapping[Answer, float], axis: Axis
) -> JudgeAgreement:
    """Compare a judge with the majority of annotators, pair by pair of completions.

    Args:
        judgements: judgements; retests, gold, models' and those of unusable audio are left out.
        scores: the judge's score of every completion.
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


def _votes(judgements: Iterable[Judgement], axis: Axis) -> dict[frozenset[Answer], list[Answer | None]]:
    """Per pair of completions, in whatever order, what each annotator preferred; None: neither."""
    votes: dict[frozenset[Answer], list[Answer | None]] = defaultdict(list)
    for row in judgements:
        ranking = row.ranking(axis)
        if row.purpose != "comparison" or row.audio_unusable or row.annotator_kind == "model" or not ranking:
            continue
        answers = [(row.prompt_id, text) for text in row.texts]
        for i, j in combinations(range(len(answers)), 2):
            preferred = i if ranking.prefers(i, j) else j if ranking.prefers(j, i) else None
            if answers[i] != answers[j]:
                votes[frozenset({answers[i], answers[j]})].append(
                    None if preferred is None else answers[preferred]
                )
    return votes


def _majority(pair: frozenset[Answer], votes: Sequence[Answer | None]) -> tuple[Answer, Answer] | None:
    """(better, worse) where more than half of the annotators preferred the same answer, else None."""
    for better in sorted(pair):
        if 2 * votes.count(better) > len(votes):
            return better, next(iter(pair - {better}))
    return None

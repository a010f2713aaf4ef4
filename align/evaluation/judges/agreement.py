"""Does the judge agree with people? Its scores of two answers against annotators' choices between them.

AIR-Bench validates its judge the same way: scores are turned into preferences, and the share of people's
decisive choices that they match is told (above 70 % there).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from align.evaluation.benchmarks.air_bench import Item
from align.evaluation.statistics import Share, wilson
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
    """Pairs that the judge does not tie, in up to three parts from small to large difference: of a judge
    that knows how sure it is, the agreement rises."""


Points = Callable[[Sequence[Item], Sequence[str]], Mapping[Axis, Sequence[float | None]]]
"""Questions and answers -> by axis, a judge's score of each answer; None where it gave none."""


def measure(
    points: Points,
    comparisons: Sequence[Comparison],
    judgements: Iterable[Judgement],
    prompts: Mapping[str, Prompt],
) -> dict[str, dict[str, Any]]:
    """Have a judge score the answers that annotators compared; axis -> `JudgeAgreement` as plain values.

    Args:
        points: the judge. Every answer is scored once, however often it was shown.
        comparisons: the comparisons to judge.
        judgements: what annotators made of these and of others, which are left out.
        prompts: the questions behind `comparisons`, by id.
    """
    answers = sorted({(one.prompt_id, text) for one in comparisons for text in (one.text_a, one.text_b)})
    items = [_as_item(prompts[prompt], number) for number, (prompt, _) in enumerate(answers)]
    scored = points(items, [text for _, text in answers])
    ids = {one.id for one in comparisons}
    judged = [one for one in judgements if one.comparison in ids]
    found: dict[str, dict[str, Any]] = {}
    for axis, values in scored.items():
        rated = {key: value for key, value in zip(answers, values, strict=True) if value is not None}
        found[axis] = _plain(judge_agreement(judged, scores_of(comparisons, rated), axis))
    return found


def judge_agreement(
    judgements: Iterable[Judgement], scores: Mapping[str, float], axis: Axis, *, tie_margin: float = 0.0
) -> JudgeAgreement:
    """Compare a judge with the majority of annotators, pair by pair.

    Args:
        judgements: judgements; retests, gold and those of unusable audio are left out.
        scores: the judge's score by completion id, of what it scored; see `scores_of`.
        axis: the question put to the annotators.
        tie_margin: points up to which two scores tie.
    """
    majorities = [_majority(pair, votes) for pair, votes in _votes(judgements, axis).items()]
    decided = [best for best in majorities if best is not None]
    margins = [
        scores[better] - scores[worse] for better, worse in decided if better in scores and worse in scores
    ]
    return JudgeAgreement(
        wilson(sum(margin > tie_margin for margin in margins), len(margins)),
        sum(abs(margin) <= tie_margin for margin in margins),
        len(majorities) - len(decided),
        len(decided) - len(margins),
        _calibration([margin for margin in margins if abs(margin) > tie_margin]),
    )


def scores_of(comparisons: Iterable[Comparison], rated: Mapping[tuple[str, str], float]) -> dict[str, float]:
    """Scores by completion id, from scores by (prompt id, answer): equal answers have equal scores."""
    answers = (
        (completion, (one.prompt_id, text))
        for one in comparisons
        for completion, text in ((one.completion_a, one.text_a), (one.completion_b, one.text_b))
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
            float(sizes[part == one].min()),
            float(sizes[part == one].max()),
            wilson(int(agrees[part == one].sum()), int((part == one).sum())),
        )
        for one in np.unique(part)
    )


def _as_item(prompt: Prompt, number: int) -> Item:
    """A prompt as a benchmark's question; several answers to it are several items."""
    name = PurePosixPath(prompt.audios[0]).name if prompt.audios else ""
    return Item(
        f"{prompt.id}-{number}",
        name,
        prompt.question,
        prompt.answer_gt,
        prompt.meta_info,
        prompt.task_name,
        "",
    )


def _plain(one: JudgeAgreement) -> dict[str, Any]:
    return {
        **one._asdict(),
        "agreement": one.agreement._asdict(),
        "calibration": [
            {**part._asdict(), "agreement": part.agreement._asdict()} for part in one.calibration
        ],
    }


def _votes(judgements: Iterable[Judgement], axis: Axis) -> dict[frozenset[str], list[str | None]]:
    """Per pair of answers, whichever side they stood on, what each annotator preferred; None: neither."""
    votes: dict[frozenset[str], list[str | None]] = {}
    for one in judgements:
        if one.purpose != "comparison" or one.audio_unusable or one.completion_a == one.completion_b:
            continue
        preferred = {"a": one.completion_a, "b": one.completion_b}.get(getattr(one, axis))
        votes.setdefault(frozenset({one.completion_a, one.completion_b}), []).append(preferred)
    return votes


def _majority(pair: frozenset[str], votes: Sequence[str | None]) -> tuple[str, str] | None:
    """(better, worse) where more than half of the annotators chose the same answer, else None."""
    for better in sorted(pair):
        if 2 * votes.count(better) > len(votes):
            return better, next(iter(pair - {better}))
    return None

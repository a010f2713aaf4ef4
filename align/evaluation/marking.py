"""From answers to what an evaluation reports: by the facts, or by a judge model's ratings.

Both ways give the same shape, so that stages, gate and pages need not know which it was. What only one of
them measures (factuality; both orders' replies) is simply there or not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from align.evaluation import aggregation, comparison, scores
from align.evaluation.benchmarks.air_bench import Item
from align.evaluation.judges import canary
from align.evaluation.judges.facts import FactJudge, Judgement
from align.evaluation.judges.llm_judge import LLMJudge
from align.evaluation.judges.ratings import Rating
from align.evaluation.statistics import Interval
from preference_data.schema import AXES, Axis

Found = Mapping[str, float]
"""An `Interval` as plain values: before, after, delta, ci_low, ci_high, n."""


@dataclass(frozen=True)
class Marked:
    """One policy's answers, judged."""

    responses: Sequence[str]
    judged: Sequence[Any]
    """Judgements or ratings, in the order of the questions."""
    overall: dict[str, Any]
    categories: dict[str, dict[str, Any]]
    rows: list[dict[str, Any]]
    """Per question, what the judge said."""
    ratings: dict[str, Any] | None = None
    """`aggregation.as_scores`, where a model rated."""


class Marking(Protocol):
    """A way to judge answers and to compare two policies' on the same questions."""

    is_free: bool
    """Whether judging costs nothing, so that controls may be judged for every policy."""

    def mark(self, items: Sequence[Item], responses: Sequence[str], label: str) -> Marked:
        """Judge one policy's answers."""
        ...

    def compare(
        self, items: Sequence[Item], before: Marked, after: Marked, seed: int
    ) -> tuple[dict[str, Found], dict[str, dict[str, Found]]]:
        """Paired differences: by metric over all questions, and by category and metric."""
        ...

    def points(
        self, items: Sequence[Item], responses: Sequence[str], label: str
    ) -> dict[Axis, list[float | None]]:
        """By axis, what tells which of two answers is better; None where an answer was not scored."""
        ...

    def about(self, items: Sequence[Item]) -> dict[str, Any]:
        """What a reader must know of the judge."""
        ...


class ByFacts:
    """Marks by the demo's judge, which knows what is true of every clip."""

    is_free = True

    def __init__(self, judge: FactJudge) -> None:
        self.judge = judge

    def mark(self, items: Sequence[Item], responses: Sequence[str], label: str) -> Marked:
        """Judge one policy's answers."""
        judged = self.judge.judge(items, responses)
        table = aggregation.as_scores(items, _ratings(items, judged))
        return Marked(
            responses,
            judged,
            {**scores.summary(judged, responses), "score": table["overall"]},
            {
                category: {**means, "score": table["categories"][category]}
                for category, means in scores.by_category(items, judged, responses).items()
            },
            [one._asdict() for one in judged],
        )

    def compare(
        self, items: Sequence[Item], before: Marked, after: Marked, seed: int
    ) -> tuple[dict[str, Found], dict[str, dict[str, Found]]]:
        """Marks: paired bootstrap over questions. The score: averaged as a model's is."""
        first: Sequence[Judgement] = before.judged
        second: Sequence[Judgement] = after.judged
        overall: dict[str, Found] = {
            name: one._asdict() for name, one in scores.compare(first, second, seed).items()
        }
        by_category: dict[str, dict[str, Found]] = {
            category: {name: one._asdict() for name, one in found.items()}
            for category, found in scores.compare_by_category(items, first, second, seed).items()
        }
        score = _score_differences(items, _ratings(items, first), _ratings(items, second), seed)
        overall["score"] = score["overall"]
        for category, found in by_category.items():
            found["score"] = score[category]
        return overall, by_category

    def points(
        self, items: Sequence[Item], responses: Sequence[str], label: str
    ) -> dict[Axis, list[float | None]]:
        """1 for an answer that has the axis' mark, 0 for one that has not."""
        judged = self.judge.judge(items, responses)
        return {axis: [float(getattr(one, field)) for one in judged] for axis, field in scores.MARKS.items()}

    def about(self, items: Sequence[Item]) -> dict[str, Any]:
        """Its name, and that it shares the annotators' ground truth."""
        return {"name": self.judge.name, "shares_ground_truth": self.judge.shares_ground_truth}


class ByRatings:
    """Marks by a judge model: one score per answer, 1 to 10, from both orders.

    Args:
        judge: rates answers against the reference.
        benchmark: every question there is, so that what was not asked is counted as missing.
        canary_items: how many questions the tricks of `canary` are tried on; 0 tries none, and a gate that
            asks for the uplift will refuse.
    """

    is_free = False

    def __init__(self, judge: LLMJudge, benchmark: Sequence[Item], canary_items: int) -> None:
        self.judge = judge
        self.benchmark = benchmark
        self.canary_items = canary_items

    def mark(self, items: Sequence[Item], responses: Sequence[str], label: str) -> Marked:
        """Rate one policy's answers."""
        ratings = self.judge.rate(items, responses, label)
        table = aggregation.as_scores(self.benchmark, ratings)
        return Marked(
            responses,
            ratings,
            {"score": table["overall"], **_shape_of(responses, ratings)},
            {
                category: {"score": score, **_shape_of(*_of_category(items, responses, ratings, category))}
                for category, score in table["categories"].items()
                if score is not None
            },
            [_row(rating) for rating in ratings],
            table,
        )

    def compare(
        self, items: Sequence[Item], before: Marked, after: Marked, seed: int
    ) -> tuple[dict[str, Found], dict[str, dict[str, Found]]]:
        """Stratified by task, clustered by clip, over questions scored for both."""
        found = _score_differences(items, before.judged, after.judged, seed)
        overall = found.pop("overall", None)
        return {"score": overall} if overall else {}, {name: {"score": one} for name, one in found.items()}

    def points(
        self, items: Sequence[Item], responses: Sequence[str], label: str
    ) -> dict[Axis, list[float | None]]:
        """The score, for both axes: it weighs all of an answer's virtues."""
        found = [rating.score for rating in self.judge.rate(items, responses, label)]
        return {axis: found for axis in AXES}

    def about(self, items: Sequence[Item]) -> dict[str, Any]:
        """Its name, model, protocol and prompt, and how far known tricks sway it."""
        tried = canary.measure(self.judge, items[: self.canary_items]) if self.canary_items else None
        worst = tried.worst if tried else None
        return {
            "name": self.judge.name,
            "shares_ground_truth": False,
            "model": self.judge.model.name,
            "protocol": self.judge.protocol.name,
            "prompt_sha256": self.judge.prompt_sha256,
            "tie_margin": comparison.TIE_MARGIN,
            "canary_uplift": tried.uplift if tried else None,
            "canary_worst": {"trick": worst.name, "points": worst.points} if worst else None,
        }


def _ratings(items: Sequence[Item], judged: Sequence[Judgement]) -> list[Rating]:
    return [
        Rating(item.uniq_id, "scored", one.score, None, ()) for item, one in zip(items, judged, strict=True)
    ]


def _score_differences(
    items: Sequence[Item], before: Sequence[Rating], after: Sequence[Rating], seed: int
) -> dict[str, Found]:
    """By category and "overall", averaged as AIR-Bench does; empty where nothing was scored for both."""
    complete = comparison.pair(items, before, after)
    if not complete.items:
        return {}
    return {
        name: {field: getattr(one, field) for field in Interval._fields}
        for name, one in comparison.differences(complete, seed=seed).items()
    }


def _shape_of(responses: Sequence[str], ratings: Sequence[Rating]) -> dict[str, float]:
    return {
        "words": float(np.mean([len(text.split()) for text in responses])) if responses else 0.0,
        "distinct": len(set(responses)),
        "n": len(ratings),
    }


def _of_category(
    items: Sequence[Item], responses: Sequence[str], ratings: Sequence[Rating], category: str
) -> tuple[list[str], list[Rating]]:
    rows = [i for i, item in enumerate(items) if item.category == category]
    return [responses[i] for i in rows], [ratings[i] for i in rows]


def _row(rating: Rating) -> dict[str, Any]:
    return {
        "score": rating.score,
        "state": rating.state,
        "reference_score": rating.reference,
        "replies": [reply._asdict() for reply in rating.replies],
    }

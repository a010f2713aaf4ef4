"""The numbers of a comparison: policies' marks on the same questions, paired by question.

Scores are compared by `align.evaluation.comparison`, as in an evaluate stage; here policies may come from
different runs, and what they were marked with comes from the rows that their evaluations kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from align.evaluation import comparison
from align.evaluation.aggregation import COLUMNS, SCALE_MINIMUM, cell, weights
from align.evaluation.comparison import League, OrderConsistency, Paired, WinRate
from align.evaluation.judges.ratings import Rating
from align.evaluation.statistics import Difference, Interval, Share, paired_bootstrap
from align.release.evaluations import Item

ALL = "overall"
MARKS = ("factuality", "behaviour", "asked")
"""Yes-or-no marks that policies are compared on. `asked` counts answerable questions only."""


def pair(before: Sequence[Item], after: Sequence[Item]) -> Paired:
    """Complete cases of two policies' answers to the same questions in the same order."""
    kept = [(a, b) for a, b in zip(before, after, strict=True) if a.score is not None and b.score is not None]
    first, second = [a for a, _ in kept], [b for _, b in kept]
    return Paired(tuple(first), _scores(first), _scores(second), len(before) - len(kept))


def score_differences(paired: Paired) -> dict[str, Difference]:
    """Score after minus before, overall and per category; empty where nothing was scored for both."""
    found = comparison.differences(paired) if paired.items else {}
    return {name: found[name] for name in (ALL, *ordered(found)) if name in found}


def worst_case(before: Sequence[Item], after: Sequence[Item]) -> dict[str, Difference]:
    """Of all questions; what was not scored counts as the scale's minimum, for either policy."""
    return score_differences(
        Paired(tuple(before), _scores(before, SCALE_MINIMUM), _scores(after, SCALE_MINIMUM), 0)
    )


def win_rates(paired: Paired, tie_margin: float) -> dict[str, WinRate]:
    """Wins, ties and losses over all questions and over those of each category."""
    found = comparison.win_rates(paired, tie_margin=tie_margin) if paired.items else {}
    return {name: found[name] for name in (ALL, *ordered(found)) if name in found}


def length_controlled_win_rate(
    paired: Paired, before: Sequence[Item], after: Sequence[Item], tie_margin: float
) -> Share:
    """The win rate had both policies answered at equal length, in characters."""
    if not paired.items:
        return Share(None, None, None, 0)
    texts = [{item.uniq_id: item.response for item in items} for items in (before, after)]
    return comparison.length_controlled_win_rate(paired, *texts, tie_margin=tie_margin)


def order_effect(items: Sequence[Item]) -> OrderConsistency | None:
    """How much a policy's scores depend on which answer stood first; None without replies in both orders."""
    found = comparison.order_consistency(items)
    return found if found.same_preference.n else None


def league(policies: Mapping[str, Sequence[Item]], tie_margin: float) -> list[League]:
    """Policies from strongest to weakest; none where no question was scored for all of them."""
    if not any(all(item.score is not None for item in row) for row in zip(*policies.values(), strict=True)):
        return []
    ratings = {
        name: [
            Rating(str(item.uniq_id), "scored" if item.score is not None else "invalid", item.score, None, ())
            for item in items
        ]
        for name, items in policies.items()
    }
    asked = [item.model_copy(update={"uniq_id": str(item.uniq_id)}) for item in next(iter(policies.values()))]
    return comparison.league(asked, ratings, tie_margin=tie_margin)


def levels(items: Sequence[Item]) -> dict[str, float]:
    """One policy's numbers by metric: the score over what was scored, the rest over all its answers."""
    scored = [item for item in items if item.score is not None]
    answerable = [float(item.abstains) for item in items if item.answerable and item.abstains is not None]
    values = {
        **{name: [float(one) for item in items if (one := mark(item, name)) is not None] for name in MARKS},
        "over_abstention": answerable,
        "words": [float(len(item.response.split())) for item in items],
    }
    found = {name: float(np.mean(numbers)) for name, numbers in values.items() if numbers}
    if scored:
        of_cell: dict[str, list[float]] = {}
        for item in scored:
            of_cell.setdefault(cell(item.task_name), []).append(item.score or 0.0)
        share = weights(item.task_name for item in scored)[ALL]
        found["score"] = float(sum(share[name] * np.mean(scores) for name, scores in of_cell.items()))
    return {**found, "distinct": len({item.response for item in items}), "n": len(items)}


def ordered(categories: Iterable[str]) -> list[str]:
    """Categories in the order of the published tables, others behind them as they came; not `ALL`."""
    names = [name for name in dict.fromkeys(categories) if name != ALL]
    return sorted(names, key=lambda name: COLUMNS.index(name) if name in COLUMNS else len(COLUMNS))


def mark_differences(before: Sequence[Item], after: Sequence[Item]) -> dict[str, dict[str, Interval]]:
    """Paired differences of the yes-or-no marks: overall, then by category; empty where a judge gives none.

    A mark that no question can show (`asked` where nothing is answerable) is left out.
    """
    rows: dict[str, list[int]] = {ALL: list(range(len(before)))}
    for index, item in enumerate(before):
        rows.setdefault(item.category, []).append(index)
    found = {}
    for name in (ALL, *ordered(rows)):
        pairs = [(before[index], after[index]) for index in rows[name]]
        marked = {mark: values for mark in MARKS if (values := _marked(pairs, mark))}
        found[name] = {
            mark: paired_bootstrap([a for a, _ in values], [b for _, b in values])
            for mark, values in marked.items()
        }
    return {name: intervals for name, intervals in found.items() if intervals}


def mark(item: Item, name: str) -> bool | None:
    """One of `MARKS` of an answer; None where the question cannot show it or the judge gives none."""
    if name == "factuality":
        return item.factual
    if name == "behaviour":
        return item.behaves
    return item.asked if item.answerable else None


def _marked(pairs: Sequence[tuple[Item, Item]], name: str) -> list[tuple[float, float]]:
    both = [(mark(a, name), mark(b, name)) for a, b in pairs]
    return [(float(a), float(b)) for a, b in both if a is not None and b is not None]


def _scores(items: Sequence[Item], unscored: float = np.nan) -> np.ndarray:
    return np.array([unscored if item.score is None else item.score for item in items], dtype=float)

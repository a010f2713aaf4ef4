"""From ratings to AIR-Bench's table: tasks, four categories, overall; nothing dropped silently.

As the official scripts intend: speech, sound and music are means over their questions, mixed is the mean
of its two sets, overall the mean of the four (leaderboard: 6.9325 -> 6.93). Of a model run, both orders
are scored apart and averaged by hand; `official` does the same from the same replies.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

from align.evaluation.benchmarks.air_bench import CATEGORIES, Item
from align.evaluation.judges.ratings import Order, Rating, State

COLUMNS = ("speech", "sound", "music", "mixed")
SCALE_MINIMUM = 1.0
"""The lowest score the judge is asked for; what was not scored counts as it in the worst case."""

Mean = float | None
"""None where there is nothing to average."""


def cell(task_name: str) -> str:
    """What a question is averaged within: its category, or its own set where that is mixed."""
    category = CATEGORIES[task_name]
    return task_name if category == "mixed" else category


def weights(task_names: Iterable[str]) -> dict[str, dict[str, float]]:
    """How the means of cells make up the four categories and overall, of those that have questions.

    Returns:
        category or "overall" -> cell -> weight; weights of a mean sum to 1.
    """
    cells: dict[str, set[str]] = {}
    for task in task_names:
        cells.setdefault(CATEGORIES[task], set()).add(cell(task))
    found = {
        column: {name: 1 / len(cells[column]) for name in sorted(cells[column])}
        for column in COLUMNS
        if column in cells
    }
    columns = dict(found)
    found["overall"] = {
        name: weight / len(columns) for inner in columns.values() for name, weight in inner.items()
    }
    return found


def as_scores(
    items: Sequence[Item], ratings: Sequence[Rating], *, minimum: float = SCALE_MINIMUM
) -> dict[str, Any]:
    """The numbers of `scores.json`.

    Args:
        items: every question of the benchmark, also those without an answer or a usable clip.
        ratings: what the judge made of the answers there are, in any order.
        minimum: the scale's lowest score.

    Returns:
        categories, overall, tasks: means of the scored items (both orders averaged per item);
        n, states: how many items there are and how they ended, "missing" without a rating; states_by_task;
        worst_case: the same means with every other item counted as `minimum`;
        orders: per order the raw means of the responses, the reference's under "reference", and n;
        official: the mean of the two orders' means, each over its own parsed replies;
        tasks_missing: tasks of AIR-Bench chat that have no question here; overall then averages fewer.
        A mean without anything to average is None.

    Raises:
        ValueError: two ratings of one item, or a rating of an item that is not there.
    """
    of_item = by_item(items, ratings)
    pairs = [(item, of_item.get(item.uniq_id)) for item in items]
    states = {item.uniq_id: rating.state if rating else "missing" for item, rating in pairs}
    orders = {order: _order(pairs, order) for order in get_args(Order)}
    return {
        **_table((item.task_name, _score(rating)) for item, rating in pairs),
        "n": len(items),
        "states": _counted(states.values()),
        "states_by_task": {
            task: _counted(states[item.uniq_id] for item in items if item.task_name == task)
            for task in CATEGORIES
            if any(item.task_name == task for item in items)
        },
        "worst_case": {
            **_table((item.task_name, _or_minimum(_score(rating), minimum)) for item, rating in pairs),
            "minimum": minimum,
        },
        "orders": orders,
        "official": _mean_of_tables(list(orders.values())),
        "tasks_missing": sorted(set(CATEGORIES) - {item.task_name for item in items}),
    }


def by_item(items: Sequence[Any], ratings: Sequence[Rating]) -> dict[Any, Rating]:
    """Ratings by the id of their item.

    Raises:
        ValueError: two ratings of one item, or a rating of an item that is not there.
    """
    known = {item.uniq_id for item in items}
    found: dict[Any, Rating] = {}
    for rating in ratings:
        if rating.uniq_id not in known:
            raise ValueError(f"rating of {rating.uniq_id!r}, which is none of the {len(known)} items")
        if rating.uniq_id in found:
            raise ValueError(f"item {rating.uniq_id!r} is rated twice; rate each answer once")
        found[rating.uniq_id] = rating
    return found


def _score(rating: Rating | None) -> Mean:
    return rating.score if rating and rating.state == "scored" else None


def _or_minimum(score: Mean, minimum: float) -> float:
    return minimum if score is None else score


def _order(pairs: Sequence[tuple[Item, Rating | None]], order: Order) -> dict[str, Any]:
    """Raw means of one order: every parsed reply counts, whatever became of the other order's."""
    replies = [
        (item.task_name, reply)
        for item, rating in pairs
        for reply in (rating.replies if rating else ())
        if reply.order == order and reply.state == "scored"
    ]
    return {
        **_table((task, reply.response) for task, reply in replies),
        "reference": _table((task, reply.reference) for task, reply in replies),
        "n": len(replies),
    }


def _table(scores: Iterable[tuple[str, Mean]]) -> dict[str, Any]:
    """Categories, overall and tasks from (task, score); None scores count as absent."""
    of_task: dict[str, list[float]] = {}
    for task, score in scores:
        if score is not None:
            of_task.setdefault(task, []).append(score)
    of_cell: dict[str, list[float]] = {}
    for task, values in of_task.items():
        of_cell.setdefault(cell(task), []).extend(values)
    categories: dict[str, Mean] = {column: _mean(of_cell.get(column, [])) for column in COLUMNS}
    mixed = [task for task in CATEGORIES if CATEGORIES[task] == "mixed" and task in of_cell]
    categories["mixed"] = _mean([sum(of_cell[task]) / len(of_cell[task]) for task in mixed])
    return {
        "categories": categories,
        "overall": _mean([value for value in categories.values() if value is not None]),
        "tasks": {task: _mean(of_task[task]) for task in CATEGORIES if task in of_task},
    }


def _mean_of_tables(tables: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The mean of the orders' means; None where an order has none."""
    categories: dict[str, Mean] = {}
    for name in COLUMNS:
        values = [table["categories"][name] for table in tables]
        categories[name] = None if None in values else _mean(values)
    return {
        "categories": categories,
        "overall": _mean([value for value in categories.values() if value is not None]),
    }


def _mean(values: Sequence[float]) -> Mean:
    return sum(values) / len(values) if values else None


def _counted(states: Iterable[str]) -> dict[str, int]:
    found = Counter(states)
    return {state: found[state] for state in (*get_args(State), "missing")}

"""From judged answers to AIR-Bench's table: tasks, four categories, overall; nothing dropped silently.

As the official scripts intend: speech, sound and music are means over their questions, mixed is the mean
of its two sets, overall the mean of the four (leaderboard: 6.9325 -> 6.93). Of a model run, both orders
are scored apart and averaged by hand; `official` does the same from the same replies.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

from align.evaluation.benchmarks.air_bench import CATEGORIES, COLUMNS, Item
from align.evaluation.judged_answers import JudgedAnswer, Order, State

SCALE_MINIMUM = 1.0
"""The lowest score the judge is asked for; what was not scored counts as it in the worst case."""

Mean = float | None
"""None where there is nothing to average."""


def cell(task_name: str) -> str:
    """The cell a question is averaged within: its category, or its own set where that is mixed."""
    category = CATEGORIES[task_name]
    return task_name if category == "mixed" else category


def weights(task_names: Iterable[str]) -> dict[str, dict[str, float]]:
    """Weights of the cells' means in the four categories and overall, for those that have questions.

    Returns:
        category or "overall" -> cell -> weight; weights of a mean sum to 1.
    """
    cells: dict[str, set[str]] = {}
    for task in task_names:
        cells.setdefault(CATEGORIES[task], set()).add(cell(task))
    columns = {
        column: {name: 1 / len(cells[column]) for name in sorted(cells[column])}
        for column in COLUMNS
        if column in cells
    }
    overall = {name: weight / len(columns) for inner in columns.values() for name, weight in inner.items()}
    return {**columns, "overall": overall}


def as_scores(
    items: Sequence[Item], answers: Sequence[JudgedAnswer], *, minimum: float = SCALE_MINIMUM
) -> dict[str, Any]:
    """The numbers of `scores.json`.

    Args:
        items: every question of the benchmark, also those without an answer or a usable clip.
        answers: what the judge made of the answers there are, in any order.
        minimum: the scale's lowest score.

    Returns:
        categories, overall, tasks: means of the scored items (both orders averaged per item);
        n, states: how many items there are and how they ended, "missing" without a row;
        worst_case: the same means with every other item counted as `minimum`;
        orders: per order the raw means of the responses, the reference's under "reference", and n;
        official: the mean of the two orders' means, each over its own parsed replies;
        tasks_missing: tasks of AIR-Bench chat that have no question here; overall then averages fewer.
        A mean without anything to average is None.

    Raises:
        ValueError: two rows of one item, or a row of an item that is not there.
    """
    by_item = _by_item(items, answers)
    pairs = [(item, by_item.get(item.uniq_id)) for item in items]
    states = Counter(answer.state if answer else "missing" for _, answer in pairs)
    orders = {order: _order(pairs, order) for order in get_args(Order)}
    return {
        **table((item.task_name, answer.score if answer else None) for item, answer in pairs),
        "n": len(items),
        "states": {state: states[state] for state in (*get_args(State), "missing")},
        "worst_case": {
            **table(
                (item.task_name, minimum if answer is None or answer.score is None else answer.score)
                for item, answer in pairs
            ),
            "minimum": minimum,
        },
        "orders": orders,
        "official": _mean_of_tables(list(orders.values())),
        "tasks_missing": sorted(set(CATEGORIES) - {item.task_name for item in items}),
    }


def _by_item(items: Sequence[Item], answers: Sequence[JudgedAnswer]) -> dict[str | int, JudgedAnswer]:
    known = {item.uniq_id for item in items}
    by_item: dict[str | int, JudgedAnswer] = {}
    for answer in answers:
        if answer.uniq_id not in known:
            raise ValueError(f"rating of {answer.uniq_id!r}, which is none of the {len(known)} items")
        if answer.uniq_id in by_item:
            raise ValueError(f"item {answer.uniq_id!r} is rated twice; rate each answer once")
        by_item[answer.uniq_id] = answer
    return by_item


def _order(pairs: Sequence[tuple[Item, JudgedAnswer | None]], order: Order) -> dict[str, Any]:
    """Raw means of one order: every parsed reply counts, whatever became of the other order's."""
    replies = [
        (item.task_name, reply)
        for item, answer in pairs
        for reply in (answer.replies if answer else ())
        if reply.order == order and reply.state == "scored"
    ]
    return {
        **table((task, reply.response) for task, reply in replies),
        "reference": table((task, reply.reference) for task, reply in replies),
        "n": len(replies),
    }


def table(scores: Iterable[tuple[str, Mean]]) -> dict[str, Any]:
    """Means by category, overall and by task from (task, score); None scores count as absent."""
    by_task: dict[str, list[float]] = {}
    for task, score in scores:
        if score is not None:
            by_task.setdefault(task, []).append(score)
    by_cell: dict[str, list[float]] = {}
    for task, values in by_task.items():
        by_cell.setdefault(cell(task), []).extend(values)
    categories: dict[str, Mean] = {column: _mean(by_cell.get(column, [])) for column in COLUMNS}
    mixed = [task for task in CATEGORIES if CATEGORIES[task] == "mixed" and task in by_cell]
    categories["mixed"] = _mean([sum(by_cell[task]) / len(by_cell[task]) for task in mixed])
    return {
        "categories": categories,
        "overall": _mean([value for value in categories.values() if value is not None]),
        "tasks": {task: _mean(by_task[task]) for task in CATEGORIES if task in by_task},
    }


def _mean_of_tables(tables: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The mean of the orders' means; None where an order has none."""
    categories: dict[str, Mean] = {}
    for name in COLUMNS:
        values = [order["categories"][name] for order in tables]
        categories[name] = None if None in values else _mean(values)
    return {
        "categories": categories,
        "overall": _mean([value for value in categories.values() if value is not None]),
    }


def _mean(values: Sequence[float]) -> Mean:
    return sum(values) / len(values) if values else None

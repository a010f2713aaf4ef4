"""Two policies' ratings, or several, on the same items: differences, wins, lengths, order effects.

Paired by item, stratified by task, clustered by clip. Scores of different judges, prompts or harnesses
are never comparable; these are functions of one judge's ratings.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from align.evaluation.aggregation import SCALE_MINIMUM, by_item, cell, weights
from align.evaluation.benchmarks.air_bench import Item
from align.evaluation.judges.ratings import Order, OrderReply, Rating
from align.evaluation.statistics import (
    Difference,
    Share,
    bradley_terry,
    length_controlled,
    macro_bootstrap,
    wilson,
)

TIE_MARGIN = 0.5
"""Points of mean score up to which two answers tie: half a point is one order moving by one."""


class Asked(Protocol):
    """What pairing needs of a question."""

    @property
    def uniq_id(self) -> str | int: ...  # noqa: D102

    @property
    def task_name(self) -> str: ...  # noqa: D102

    @property
    def category(self) -> str: ...  # noqa: D102

    @property
    def audio(self) -> str: ...  # noqa: D102


class Replied(Protocol):
    """What order effects need of a rating: the judge's replies, `ratings.OrderReply` or alike."""

    @property
    def replies(self) -> Sequence[Any]: ...  # noqa: D102


class Paired(NamedTuple):
    """Items that both policies were scored on, with both scores; the others are left out and counted."""

    items: tuple[Asked, ...]
    before: np.ndarray
    after: np.ndarray
    left_out: int


class WinRate(NamedTuple):
    """How often the second policy's answer scored higher; a tie counts half in `rate` (95 % interval)."""

    wins: int
    ties: int
    losses: int
    rate: float
    ci_low: float
    ci_high: float
    n: int


class OrderConsistency(NamedTuple):
    """Whether the judge says the same in both orders; a position effect is measured, not assumed."""

    same_preference: Share
    """Share of items where response versus reference comes out better, equal or worse in both orders."""
    first_place_gain: float | None
    """Mean points that an answer, response or reference, gains by standing first."""


class League(NamedTuple):
    """Strengths on the Elo scale (400 points are odds of 10), mean 1000, with 95 % intervals."""

    policy: str
    elo: float
    ci_low: float
    ci_high: float


def pair(items: Sequence[Item], before: Sequence[Rating], after: Sequence[Rating]) -> Paired:
    """Complete cases: items scored for both policies, in the order of `items`."""
    first, second = by_item(items, before), by_item(items, after)
    kept = [item for item in items if _is_scored(first, item) and _is_scored(second, item)]
    return Paired(
        tuple(kept),
        np.array([first[item.uniq_id].score for item in kept], dtype=float),
        np.array([second[item.uniq_id].score for item in kept], dtype=float),
        len(items) - len(kept),
    )


def worst_case(
    items: Sequence[Item],
    before: Sequence[Rating],
    after: Sequence[Rating],
    *,
    minimum: float = SCALE_MINIMUM,
) -> Paired:
    """All items; what was not scored counts as the scale's minimum, for either policy."""
    first, second = by_item(items, before), by_item(items, after)
    sides = [
        np.array([of[item.uniq_id].score if _is_scored(of, item) else minimum for item in items], dtype=float)
        for of in (first, second)
    ]
    return Paired(tuple(items), sides[0], sides[1], 0)


def differences(paired: Paired, *, resamples: int = 4000, seed: int = 0) -> dict[str, Difference]:
    """After minus before for each category and overall, weighted as the published table is."""
    tasks = [item.task_name for item in paired.items]
    return _bootstrap(paired, [cell(task) for task in tasks], weights(tasks), resamples, seed)


def win_rates(
    paired: Paired, *, tie_margin: float = TIE_MARGIN, resamples: int = 4000, seed: int = 0
) -> dict[str, WinRate]:
    """Wins, ties and losses over the items of each category and over all of them."""
    outcome = outcomes(paired, tie_margin)
    categories = [item.category for item in paired.items]
    counts = Counter(categories)
    means = {name: {name: 1.0} for name in counts}
    means["overall"] = {name: n / len(categories) for name, n in counts.items()}
    game = Paired(paired.items, np.zeros_like(outcome), outcome, 0)
    rates = _bootstrap(game, categories, means, resamples, seed)
    results = {
        name: outcome if name == "overall" else outcome[[one == name for one in categories]] for name in means
    }
    return {name: _win_rate(results[name], rate) for name, rate in rates.items()}


def _win_rate(outcome: np.ndarray, rate: Difference) -> WinRate:
    wins, ties, losses = (int((outcome == result).sum()) for result in (1.0, 0.5, 0.0))
    low, high = max(0.0, rate.ci_low), min(1.0, rate.ci_high)
    return WinRate(wins, ties, losses, rate.after, low, high, outcome.size)


def outcomes(paired: Paired, tie_margin: float) -> np.ndarray:
    """1 where the second policy won, 0.5 where both tied, 0 where it lost; shape (items,)."""
    delta = paired.after - paired.before
    return np.where(np.abs(delta) <= tie_margin, 0.5, (delta > 0).astype(float))


def length_controlled_win_rate(
    paired: Paired,
    before_texts: Mapping[Any, str],
    after_texts: Mapping[Any, str],
    *,
    tie_margin: float = TIE_MARGIN,
) -> Share:
    """The second policy's win rate had both answered at equal length (in characters); texts by uniq_id."""
    ids = [item.uniq_id for item in paired.items]
    extra = [len(after_texts[one]) - len(before_texts[one]) for one in ids]
    return length_controlled(outcomes(paired, tie_margin), extra, [item.audio for item in paired.items])


def order_consistency(ratings: Sequence[Replied]) -> OrderConsistency:
    """How much one policy's ratings depend on which answer stood first; items scored in both orders."""
    both = [replies for rating in ratings if (replies := _both_orders(rating))]
    same = sum(_sign(first) == _sign(second) for first, second in both)
    gains = [_first_place_gain(first, second) for first, second in both]
    return OrderConsistency(wilson(same, len(both)), float(np.mean(gains)) if gains else None)


def league(
    items: Sequence[Asked],
    ratings: Mapping[str, Sequence[Rating]],
    *,
    tie_margin: float = TIE_MARGIN,
    resamples: int = 1000,
    seed: int = 0,
) -> list[League]:
    """Policies from strongest to weakest by Bradley and Terry's model, on items scored for all of them.

    Raises:
        ValueError: fewer than two policies, or no item was scored for all.
    """
    of_policy = [by_item(items, one) for one in ratings.values()]
    kept = [item for item in items if all(_is_scored(one, item) for one in of_policy)]
    if len(of_policy) < 2 or not kept:
        raise ValueError(
            f"a league needs two policies and items scored for all, got {list(ratings)}, {len(kept)} items"
        )
    scores = np.array([[one[item.uniq_id].score for one in of_policy] for item in kept], dtype=float)
    delta = scores[:, :, None] - scores[:, None, :]
    games = np.where(np.abs(delta) <= tie_margin, 0.5, (delta > 0).astype(float))
    clips = np.unique([item.audio for item in kept], return_inverse=True)[1]
    per_clip = np.zeros((clips.max() + 1, *games.shape[1:]))
    np.add.at(per_clip, clips, games)
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(len(per_clip), np.full(len(per_clip), 1 / len(per_clip)), size=resamples)
    elo = _elo(bradley_terry(per_clip.sum(axis=0)))
    low, high = np.quantile(_elo(bradley_terry(np.tensordot(drawn, per_clip, 1))), [0.025, 0.975], axis=0)
    table = [League(name, float(elo[i]), float(low[i]), float(high[i])) for i, name in enumerate(ratings)]
    return sorted(table, key=lambda row: -row.elo)


def compare(
    items: Sequence[Item],
    before: Sequence[Rating],
    after: Sequence[Rating],
    before_texts: Mapping[str, str],
    after_texts: Mapping[str, str],
    *,
    tie_margin: float = TIE_MARGIN,
    seed: int = 0,
) -> dict[str, Any]:
    """All of the above for two policies, as plain values for JSON.

    Raises:
        ValueError: no item was scored for both.
    """
    complete = pair(items, before, after)
    if not complete.items:
        raise ValueError(f"none of the {len(items)} items was scored for both policies")
    worst = worst_case(items, before, after)
    lengths = length_controlled_win_rate(complete, before_texts, after_texts, tie_margin=tie_margin)
    rates = win_rates(complete, tie_margin=tie_margin, seed=seed)
    return {
        "differences": {name: one._asdict() for name, one in differences(complete, seed=seed).items()},
        "worst_case": {name: one._asdict() for name, one in differences(worst, seed=seed).items()},
        "wins": {name: one._asdict() for name, one in rates.items()},
        "length_controlled": lengths._asdict(),
        "tie_margin": tie_margin,
        "n": len(complete.items),
        "left_out": complete.left_out,
        "orders": {"before": _plain(order_consistency(before)), "after": _plain(order_consistency(after))},
    }


def _bootstrap(
    paired: Paired,
    cells: Sequence[str],
    means: Mapping[str, Mapping[str, float]],
    resamples: int,
    seed: int,
) -> dict[str, Difference]:
    return macro_bootstrap(
        paired.before,
        paired.after,
        cells=cells,
        strata=[item.task_name for item in paired.items],
        clusters=[item.audio for item in paired.items],
        means=means,
        resamples=resamples,
        seed=seed,
    )


def _is_scored(of: Mapping[Any, Rating], item: Asked) -> bool:
    return item.uniq_id in of and of[item.uniq_id].state == "scored"


def _both_orders(rating: Replied) -> tuple[OrderReply, OrderReply] | None:
    """The replies with the reference first and with the response first, if both have scores."""
    of: dict[Order, OrderReply] = {one.order: one for one in rating.replies if one.state == "scored"}
    if len(of) < 2:
        return None
    return of["reference_first"], of["response_first"]


def _scores(reply: OrderReply) -> tuple[float, float]:
    if reply.reference is None or reply.response is None:
        raise ValueError(f"a scored reply has no scores: {reply}")
    return reply.reference, reply.response


def _sign(reply: OrderReply) -> int:
    reference, response = _scores(reply)
    return (response > reference) - (response < reference)


def _first_place_gain(reference_first: OrderReply, response_first: OrderReply) -> float:
    (reference_1, response_2), (reference_2, response_1) = _scores(reference_first), _scores(response_first)
    return ((reference_1 - reference_2) + (response_1 - response_2)) / 2


def _elo(strength: np.ndarray) -> np.ndarray:
    return 1000 + 400 / np.log(10) * strength


def _plain(one: OrderConsistency) -> dict[str, Any]:
    return {"same_preference": one.same_preference._asdict(), "first_place_gain": one.first_place_gain}

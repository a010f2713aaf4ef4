"""Policies' answers to the same questions side by side: differences, wins, lengths, order effects, leagues.

The evaluate stage, the compare page and the command all use these. Differences are those of one question's
two answers, stratified by task and clustered by clip. Scores of different judges, prompts or harnesses are
never comparable: all rows must come from one judge.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from align.evaluation.aggregation import SCALE_MINIMUM, cell, table, weights
from align.evaluation.benchmarks.air_bench import COLUMNS
from align.evaluation.judged_answers import JudgedAnswer, Order
from align.evaluation.scripts import in_another_script
from align.evaluation.statistics import (
    Difference,
    Interval,
    Share,
    bradley_terry,
    length_controlled,
    macro_bootstrap,
    paired_bootstrap,
    wilson,
)

TIE_MARGIN = 0.5
"""Points of mean score up to which two answers tie: half a point is one order moving by one."""
ALL = "overall"
_LEAGUE_RESAMPLES = 1000
MARKS = ("factuality", "behaviour", "fact_accuracy", "absent_accuracy")
"""Yes-or-no marks that policies are compared on. `fact_accuracy` counts answerable questions only,
`absent_accuracy` the others: those about what is not in the clip."""


class ScorePairs(NamedTuple):
    """Two policies' answers to the same questions and their scores; what is unscored is left out, counted."""

    before_answers: tuple[JudgedAnswer, ...]
    after_answers: tuple[JudgedAnswer, ...]
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


class LeagueRow(NamedTuple):
    """A policy's strength on the Elo scale (400 points are odds of 10), mean 1000, with a 95 % interval."""

    policy: str
    elo: float
    ci_low: float
    ci_high: float


class PolicyDifference(NamedTuple):
    """A policy against a baseline. Tables are keyed by "overall" and category, in published order."""

    scores: dict[str, Difference]
    """On the questions scored for both, averaged as AIR-Bench averages."""
    wins: dict[str, WinRate]
    length_controlled: Share
    """The win rate had both answered at equal length, in characters."""
    left_out: int
    worst_case: dict[str, Difference]
    """`scores` over all questions, with everything unscored counted as the scale's minimum."""
    marks: dict[str, dict[str, Interval]]
    """Yes-or-no mark -> shares and their difference; empty where the judge gives no marks."""
    by_kind: dict[str, dict[str, Interval]]
    """By kind of question, marks and score."""


def compare(
    before: Sequence[JudgedAnswer],
    after: Sequence[JudgedAnswer],
    *,
    tie_margin: float = TIE_MARGIN,
    seed: int = 0,
) -> PolicyDifference:
    """Everything measured of two policies together, on the same questions in the same order."""
    pairs = pair_scores(before, after)
    return PolicyDifference(
        scores=score_differences(pairs, seed=seed),
        wins=win_rates(pairs, tie_margin=tie_margin, seed=seed),
        length_controlled=length_controlled_win_rate(pairs, tie_margin=tie_margin),
        left_out=pairs.left_out,
        worst_case=score_differences(worst_case(before, after), seed=seed),
        marks=mark_differences(before, after, seed),
        by_kind=differences_by_kind(before, after, seed),
    )


def differences(
    before: Sequence[JudgedAnswer], after: Sequence[JudgedAnswer], seed: int = 0
) -> dict[str, dict[str, Interval]]:
    """After minus before: "overall" and each category -> metric (marks and score) -> interval."""
    marks = mark_differences(before, after, seed)
    scores = score_differences(pair_scores(before, after), seed=seed)
    rows: dict[str, dict[str, Interval]] = {name: dict(marks.get(name, {})) for name in {**marks, **scores}}
    for name, row in scores.items():
        rows[name]["score"] = Interval(*(getattr(row, field) for field in Interval._fields))
    return rows


def differences_by_kind(
    before: Sequence[JudgedAnswer], after: Sequence[JudgedAnswer], seed: int = 0
) -> dict[str, dict[str, Interval]]:
    """After minus before over all questions of a kind: kind -> metric (marks and score) -> interval."""
    pairs = _aligned(before, after)
    rows = {}
    for kind in _kinds(before):
        own = [pair for pair in pairs if pair[0].kind == kind]
        rows[kind] = differences([a for a, _ in own], [b for _, b in own], seed).get(ALL, {})
    return rows


def levels(answers: Sequence[JudgedAnswer]) -> dict[str, float]:
    """One policy's numbers by metric: the score over what was scored, the rest over all its answers."""
    values = {
        **{name: [float(m) for answer in answers if (m := answer.mark(name)) is not None] for name in MARKS},
        "over_abstention": [
            float(answer.abstains) for answer in answers if answer.answerable and answer.abstains is not None
        ],
        "words": [float(len(answer.response.split())) for answer in answers],
        "entropy": [answer.entropy for answer in answers if answer.entropy is not None],
        "foreign": [
            float(is_foreign)
            for answer in answers
            if (is_foreign := in_another_script(answer.response, answer.question, answer.answer_gt))
            is not None
        ],
    }
    means = {name: float(np.mean(numbers)) for name, numbers in values.items() if numbers}
    score = table((answer.task_name, answer.score) for answer in answers)["overall"]
    if score is not None:
        means["score"] = score
    return {**means, "distinct": len({answer.response for answer in answers}), "n": len(answers)}


def levels_by_category(answers: Sequence[JudgedAnswer]) -> dict[str, dict[str, float]]:
    """`levels` within each category."""
    return {
        name: levels([answer for answer in answers if answer.category == name])
        for name in ordered(answer.category for answer in answers)
    }


def levels_by_kind(answers: Sequence[JudgedAnswer]) -> dict[str, dict[str, float]]:
    """`levels` within each kind of question."""
    return {kind: levels([answer for answer in answers if answer.kind == kind]) for kind in _kinds(answers)}


def _kinds(answers: Iterable[JudgedAnswer]) -> list[str]:
    return sorted({answer.kind for answer in answers if answer.kind})


def ordered(categories: Iterable[str]) -> list[str]:
    """Categories in the order of the published tables, others behind them as they came; without `ALL`."""
    names = [name for name in dict.fromkeys(categories) if name != ALL]
    return sorted(names, key=lambda name: COLUMNS.index(name) if name in COLUMNS else len(COLUMNS))


# -------------------------------------------------------------------------- scores and marks


def pair_scores(before: Sequence[JudgedAnswer], after: Sequence[JudgedAnswer]) -> ScorePairs:
    """Complete cases: the questions scored for both policies."""
    pairs = _aligned(before, after)
    kept = [(a, b) for a, b in pairs if a.score is not None and b.score is not None]
    first, second = tuple(a for a, _ in kept), tuple(b for _, b in kept)
    return ScorePairs(first, second, _scores(first), _scores(second), len(pairs) - len(kept))


def worst_case(before: Sequence[JudgedAnswer], after: Sequence[JudgedAnswer]) -> ScorePairs:
    """All questions; what was not scored counts as the scale's minimum, for either policy."""
    _aligned(before, after)
    first, second = (_scores(answers, SCALE_MINIMUM) for answers in (before, after))
    return ScorePairs(tuple(before), tuple(after), first, second, 0)


def score_differences(pairs: ScorePairs, *, resamples: int = 4000, seed: int = 0) -> dict[str, Difference]:
    """After minus before overall and per category, weighted as the published table; empty without pairs."""
    if not pairs.before_answers:
        return {}
    tasks = [answer.task_name for answer in pairs.before_answers]
    rows = _bootstrap(pairs, [cell(task) for task in tasks], weights(tasks), seed, resamples)
    return {name: rows[name] for name in (ALL, *ordered(rows))}


def mark_differences(
    before: Sequence[JudgedAnswer], after: Sequence[JudgedAnswer], seed: int = 0
) -> dict[str, dict[str, Interval]]:
    """Differences of the yes-or-no marks by "overall" and category; a mark that nothing shows is left out."""
    groups: dict[str, list[tuple[JudgedAnswer, JudgedAnswer]]] = {ALL: _aligned(before, after)}
    for a, b in groups[ALL]:
        groups.setdefault(a.category, []).append((a, b))
    rows: dict[str, dict[str, Interval]] = {}
    for name in (ALL, *ordered(groups)):
        for mark in MARKS:
            both = [(a.mark(mark), b.mark(mark)) for a, b in groups[name]]
            known = [(float(x), float(y)) for x, y in both if x is not None and y is not None]
            if known:
                sides = [x for x, _ in known], [y for _, y in known]
                rows.setdefault(name, {})[mark] = paired_bootstrap(*sides, seed=seed)
    return rows


def _aligned(
    before: Sequence[JudgedAnswer], after: Sequence[JudgedAnswer]
) -> list[tuple[JudgedAnswer, JudgedAnswer]]:
    pairs = list(zip(before, after, strict=True))
    for number, (a, b) in enumerate(pairs):
        if a.uniq_id != b.uniq_id:
            raise ValueError(f"answer {number}: question {a.uniq_id!r} beside {b.uniq_id!r}; sort both alike")
    return pairs


def _scores(answers: Sequence[JudgedAnswer], unscored: float = np.nan) -> np.ndarray:
    return np.array([unscored if answer.score is None else answer.score for answer in answers], dtype=float)


def _bootstrap(
    pairs: ScorePairs,
    cells: Sequence[str],
    means: Mapping[str, Mapping[str, float]],
    seed: int,
    resamples: int = 4000,
) -> dict[str, Difference]:
    return macro_bootstrap(
        pairs.before,
        pairs.after,
        cells=cells,
        strata=[answer.task_name for answer in pairs.before_answers],
        clusters=[answer.audio for answer in pairs.before_answers],
        means=means,
        resamples=resamples,
        seed=seed,
    )


# -------------------------------------------------------------------------- wins


def win_rates(pairs: ScorePairs, *, tie_margin: float = TIE_MARGIN, seed: int = 0) -> dict[str, WinRate]:
    """Wins, ties and losses over all pairs and over those of each category; empty without pairs."""
    if not pairs.before_answers:
        return {}
    outcome = _outcomes(pairs.after - pairs.before, tie_margin)
    categories = [answer.category for answer in pairs.before_answers]
    counts = Counter(categories)
    means = {name: {name: 1.0} for name in counts}
    means[ALL] = {name: n / len(categories) for name, n in counts.items()}
    games = pairs._replace(before=np.zeros_like(outcome), after=outcome)
    rates = _bootstrap(games, categories, means, seed)
    rows = {}
    for name in (ALL, *ordered(counts)):
        results = outcome[[name in (ALL, category) for category in categories]]
        wins, ties, losses = (int((results == result).sum()) for result in (1.0, 0.5, 0.0))
        low, high = max(0.0, rates[name].ci_low), min(1.0, rates[name].ci_high)
        rows[name] = WinRate(wins, ties, losses, rates[name].after, low, high, results.size)
    return rows


def _outcomes(delta: np.ndarray, tie_margin: float) -> np.ndarray:
    """1 where the second policy won, 0.5 where both tied, 0 where it lost, by its lead in score."""
    return np.where(np.abs(delta) <= tie_margin, 0.5, (delta > 0).astype(float))


def length_controlled_win_rate(pairs: ScorePairs, *, tie_margin: float = TIE_MARGIN) -> Share:
    """The second policy's win rate had both answered at equal length (in characters)."""
    if not pairs.before_answers:
        return Share(None, None, None, 0)
    extra = [
        len(b.response) - len(a.response)
        for a, b in zip(pairs.before_answers, pairs.after_answers, strict=True)
    ]
    clips = [answer.audio for answer in pairs.before_answers]
    return length_controlled(_outcomes(pairs.after - pairs.before, tie_margin), extra, clips)


def league(
    policies: Mapping[str, Sequence[JudgedAnswer]],
    *,
    tie_margin: float = TIE_MARGIN,
    seed: int = 0,
) -> list[LeagueRow]:
    """Policies from strongest to weakest by Bradley and Terry's model, on questions scored for all of them.

    Empty where no question was scored for all.

    Raises:
        ValueError: fewer than two policies.
    """
    if len(policies) < 2:
        raise ValueError(f"a league needs two policies or more, got {list(policies)}")
    rows = list(zip(*policies.values(), strict=True))
    scored = [row for row in rows if all(answer.score is not None for answer in row)]
    if not scored:
        return []
    scores = np.array([[answer.score for answer in row] for row in scored], dtype=float)
    games = _outcomes(scores[:, :, None] - scores[:, None, :], tie_margin)
    clips = np.unique([row[0].audio for row in scored], return_inverse=True)[1]
    per_clip = np.zeros((clips.max() + 1, *games.shape[1:]))
    np.add.at(per_clip, clips, games)
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(len(per_clip), np.full(len(per_clip), 1 / len(per_clip)), size=_LEAGUE_RESAMPLES)
    elo = _elo(bradley_terry(per_clip.sum(axis=0)))
    low, high = np.quantile(_elo(bradley_terry(np.tensordot(drawn, per_clip, 1))), [0.025, 0.975], axis=0)
    ranks = [LeagueRow(name, float(elo[i]), float(low[i]), float(high[i])) for i, name in enumerate(policies)]
    return sorted(ranks, key=lambda row: -row.elo)


def _elo(strength: np.ndarray) -> np.ndarray:
    return 1000 + 400 / np.log(10) * strength


# -------------------------------------------------------------------------- order effects


def order_consistency(answers: Sequence[JudgedAnswer]) -> OrderConsistency | None:
    """How much one policy's scores depend on which answer stood first; None without scores in both orders."""
    leads = []
    for answer in answers:
        lead: dict[Order, float] = {
            reply.order: reply.response - reply.reference
            for reply in answer.replies
            if reply.response is not None and reply.reference is not None
        }
        if len(lead) == 2:
            leads.append((lead["response_first"], lead["reference_first"]))
    if not leads:
        return None
    first, second = np.array(leads).T
    same = int((np.sign(first) == np.sign(second)).sum())
    return OrderConsistency(wilson(same, len(leads)), float(((first - second) / 2).mean()))

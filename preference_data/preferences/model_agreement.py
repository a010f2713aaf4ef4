"""How far a model's judgements agree with people's, and which way it leans beside them.

A model's preference between two completions agrees if it prefers the same one as people, or the one that is
known to be right (gold, factuality alone); a tie is no agreement. People prefer what more than half of those
who compared the two prefer; where there is no such side, there is nothing to agree with. Simulated
annotators count as people.

A comparison counts once, by the share of its pairs of completions: they are not independent of each other,
and neither are the two axes, so intervals (Wilson, 95 %) are those of that many comparisons.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from statistics import fmean
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

from preference_data.preferences import votes
from preference_data.preferences.agreement import wilson
from preference_data.preferences.rules import Removal
from preference_data.schema import AXES, Axis, Judgement, Ranking

Side = Literal["first", "second", "neither"]
_Pair = tuple[str, str, str]
"""A prompt and two texts in the order of the alphabet."""


class ModelDisagrees(ValueError):
    """A model whose judgements agree too little with people's, or nobody knows how far."""


class Rate(BaseModel):
    """A share over `n` comparisons with its 95 % interval."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: float
    low: float
    high: float
    n: int


class Agreement(BaseModel):
    """Of one axis, or of both."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    share: Rate | None
    """None: no comparison of the model's has a side that people prefer, or that is known to be right."""
    pairs: int
    """Pairs of completions with such a side."""
    gold: int
    """Those of them where it is known."""
    ties: int
    """Those of them that the model ties: it does not agree there."""


class ModelAgreement(BaseModel):
    """A model beside people."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    judge: str
    axes: dict[Axis, Agreement]
    overall: Agreement


class Biases(BaseModel):
    """What sways preferences beside the truth; None: nothing to measure it on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    flips: Rate | None = None
    """Of a model: pairs whose preference turns round with the order in which they are shown."""
    first_place: Rate | None
    """Of a model: flips in favour of what stands first. Of people: clear preferences for it."""
    longer: Rate | None
    """Clear preferences for the longer of two texts of different length."""
    own: Rate | None = None
    """Of a model: clear preferences for its own completion over another policy's."""


class UsableJudgements(NamedTuple):
    """Judgements to learn from, how many rankings of models were left out by axis, and why."""

    judgements: list[Judgement]
    left_out: dict[Axis, int]
    measured: list[ModelAgreement]


def measure(judgements: Iterable[Judgement], judge: str, *, min_heard: float) -> ModelAgreement:
    """The agreement of the model `judge` with people and gold.

    Args:
        judgements: people's and models'; of people only what counts as a vote.
        judge: the model's name as annotator.
        min_heard: share of the clip that a person must have played.
    """
    given = list(judgements)
    people = _of_people(given, min_heard)
    own = [item for item in given if item.annotator_kind == "model" and item.annotator == judge]
    majorities = {axis: _majorities(people, axis) for axis in AXES}
    axes = {axis: _agreement([_marks(item, [axis], majorities) for item in own]) for axis in AXES}
    overall = _agreement([_marks(item, AXES, majorities) for item in own])
    return ModelAgreement(judge=judge, axes=axes, overall=overall)


def require(agreement: ModelAgreement, bound: float) -> tuple[Axis, ...]:
    """The axes on which the lower end of the interval is at `bound` or above; with 0, both.

    Raises:
        ModelDisagrees: there is none; says the figures, the bound, and what to do.
    """
    passed = tuple(axis for axis in AXES if not bound or _low(agreement.axes[axis]) >= bound)
    if not passed:
        figures = "; ".join(f"{axis}: {_in_words(agreement.axes[axis])}" for axis in AXES)
        raise ModelDisagrees(
            f"the judgements of the model {agreement.judge!r} cannot be used. {figures}. "
            f"min_model_agreement asks that the whole interval of an axis lies at {bound:g} or above. Next: "
            "where the interval is wide, have people judge more of the comparisons (people_share of the "
            "annotate stage); else mend the judge (another model, or one that hears the clip), annotate by "
            "people alone, leave the model out (exclude), or lower min_model_agreement"
        )
    return passed


def usable(
    judgements: Sequence[Judgement], *, bound: float, min_heard: float, exclude: Collection[str] = ()
) -> UsableJudgements:
    """People's judgements, and models' without their rankings on the axes where they agree too little.

    Args:
        judgements: of all annotators.
        bound: see `require`.
        min_heard: see `measure`.
        exclude: annotators who do not count: people do not measure a model, and a model is not measured.

    Raises:
        ModelDisagrees: a model agrees too little on both axes.
    """
    counting = [item for item in judgements if item.annotator not in exclude]
    judges = {item.annotator for item in counting if item.annotator_kind == "model"}
    measured = [measure(counting, judge, min_heard=min_heard) for judge in sorted(judges)]
    passed = dict.fromkeys(exclude, AXES) | {item.judge: require(item, bound) for item in measured}
    kept: list[Judgement] = []
    left_out: Counter[Axis] = Counter()
    for item in judgements:
        if item.annotator_kind == "model":
            failed = [axis for axis in AXES if axis not in passed[item.annotator]]
            left_out.update(failed)
            item = item.model_copy(update=dict.fromkeys(failed))
        kept.append(item)
    return UsableJudgements(kept, {axis: left_out[axis] for axis in AXES}, measured)


def removals(used: UsableJudgements) -> list[Removal]:
    """What the bound left out of models' rankings; empty where no model has judged."""
    names = {item.judge for item in used.measured}
    total = sum(item.annotator in names for item in used.judgements)
    return [
        Removal(
            "min_model_agreement",
            used.left_out[axis],
            f"rankings of {axis} by a model",
            total,
            "; ".join(f"{item.judge}: {_in_words(item.axes[axis])}" for item in used.measured),
        )
        for axis in (AXES if names else ())
    ]


def biases_of_people(judgements: Iterable[Judgement], *, min_heard: float) -> Biases:
    """How people lean, over the judgements that count as votes."""
    people = _of_people(judgements, min_heard)
    first = [[better < worse for better, worse in _clear(item)] for item in people]
    return Biases(first_place=_rate(first), longer=_longer(people))


def biases_of_model(
    judgements: Iterable[Judgement],
    replies: Iterable[tuple[Mapping[Axis, Ranking], Mapping[Axis, Ranking]]],
    *,
    policies: Mapping[str, str],
    own: Collection[str],
) -> Biases:
    """How a model leans.

    Args:
        judgements: the model's.
        replies: its rankings of each comparison as shown and in the reversed order, both in the places of
            the comparison as shown.
        policies: completion id -> who made it, as far as known.
        own: the names under which the model itself stands there.
    """
    compared = [item for item in judgements if item.purpose == "comparison"]
    flips = [list(_flips(*both)) for both in replies]
    selfish = [
        [policies[item.completions[better]] in own for better, _ in pairs]
        for item in compared
        if (pairs := [pair for pair in _clear(item) if _is_own_against_other(item, pair, policies, own)])
    ]
    return Biases(
        flips=_rate([[flip is not None for flip in pairs] for pairs in flips]),
        first_place=_rate([[flip for flip in pairs if flip is not None] for pairs in flips]),
        longer=_longer(compared),
        own=_rate(selfish),
    )


# ------------------------------------------------------------------ pairs of completions


def _of_people(judgements: Iterable[Judgement], min_heard: float) -> list[Judgement]:
    return votes.counted((item for item in judgements if item.annotator_kind != "model"), min_heard)


def _sides(judgement: Judgement, ranking: Ranking | None) -> Iterator[tuple[_Pair, Side]]:
    """Every pair of different texts, and which of the two is better."""
    for i, j in combinations(range(len(judgement.texts)) if ranking else (), 2):
        assert ranking
        first, second = sorted((i, j), key=lambda place: judgement.texts[place])
        if judgement.texts[i] != judgement.texts[j]:
            pair = (judgement.prompt_id, judgement.texts[first], judgement.texts[second])
            yield pair, _side(ranking, first, second)


def _side(ranking: Ranking, first: int, second: int) -> Side:
    sides: dict[int, Side] = {votes.FIRST: "first", votes.SECOND: "second"}
    return sides.get(votes.vote(ranking, first, second), "neither")


def _majorities(people: Iterable[Judgement], axis: Axis) -> dict[_Pair, Side]:
    """What more than half of those prefer who compared a pair; pairs without such a side are left out."""
    counts: dict[_Pair, Counter[Side]] = defaultdict(Counter)
    for item in people:
        for pair, side in _sides(item, item.ranking(axis)):
            counts[pair][side] += 1
    sides: tuple[Side, Side] = ("first", "second")
    return {pair: side for pair, own in counts.items() for side in sides if 2 * own[side] > own.total()}


class _Marks(NamedTuple):
    """Of a model's judgement: how each pair that has a right side is judged, against that side."""

    pairs: list[tuple[Side, Side]]
    is_gold: bool


def _marks(own: Judgement, axes: Iterable[Axis], majorities: Mapping[Axis, Mapping[_Pair, Side]]) -> _Marks:
    pairs = []
    for axis in axes:
        right = majorities[axis] if own.purpose == "comparison" else {}
        if own.purpose == "gold" and axis == "factuality":
            right = {pair: side for pair, side in _sides(own, own.expected) if side != "neither"}
        pairs += [(side, right[pair]) for pair, side in _sides(own, own.ranking(axis)) if pair in right]
    return _Marks(pairs, own.purpose == "gold")


def _agreement(marks: Sequence[_Marks]) -> Agreement:
    return Agreement(
        share=_rate([[side == right for side, right in item.pairs] for item in marks]),
        pairs=sum(len(item.pairs) for item in marks),
        gold=sum(len(item.pairs) for item in marks if item.is_gold),
        ties=sum(side == "neither" for item in marks for side, _ in item.pairs),
    )


def _clear(judgement: Judgement) -> list[tuple[int, int]]:
    """Places of the better and the worse of every pair that is not tied, on either axis."""
    rankings = [ranking for axis in AXES if (ranking := judgement.ranking(axis))]
    places = range(len(judgement.texts))
    return [
        (better, worse)
        for ranking in rankings
        for better in places
        for worse in places
        if ranking.prefers(better, worse) and judgement.texts[better] != judgement.texts[worse]
    ]


def _longer(judgements: Iterable[Judgement]) -> Rate | None:
    lengths = (
        [(len(item.texts[better]), len(item.texts[worse])) for better, worse in _clear(item)]
        for item in judgements
    )
    return _rate([[better > worse for better, worse in pairs if better != worse] for pairs in lengths])


def _flips(as_shown: Mapping[Axis, Ranking], turned: Mapping[Axis, Ranking]) -> Iterator[bool | None]:
    """Of every pair on every axis: None if its preference does not turn round, else whether to the first."""
    for axis in AXES:
        first, second = as_shown[axis], turned[axis]
        for i, j in combinations(range(len(first.ranks)), 2):
            to_first = first.prefers(i, j) and second.prefers(j, i)
            to_last = first.prefers(j, i) and second.prefers(i, j)
            yield to_first if to_first or to_last else None


def _is_own_against_other(
    judgement: Judgement, pair: tuple[int, int], policies: Mapping[str, str], own: Collection[str]
) -> bool:
    makers = [policies.get(judgement.completions[place]) for place in pair]
    return None not in makers and sum(maker in own for maker in makers) == 1


# ------------------------------------------------------------------ figures


def _rate(comparisons: Iterable[Sequence[bool]]) -> Rate | None:
    """The mean over comparisons of the share of their pairs, with Wilson's interval; None of nothing."""
    shares = [fmean(hits) for hits in comparisons if hits]
    n = len(shares)
    if not n:
        return None
    value = fmean(shares)
    low, high = wilson(value, n)
    return Rate(value=value, low=float(low), high=float(high), n=n)


def _low(agreement: Agreement) -> float:
    return agreement.share.low if agreement.share else 0.0


def _in_words(agreement: Agreement) -> str:
    share = agreement.share
    if not share:
        return "nothing to compare it with, for people judged none of its comparisons and there is no gold"
    return (
        f"it agrees with {share.value:.3f} of people's preferences and gold (95 % interval {share.low:.3f} "
        f"to {share.high:.3f}, n {share.n})"
    )

"""The quality report on judgements: measures, overall and per annotator, and remarks on what stands out.

Chance makes an annotator look odd wherever many are tested. So remarks about a person are statistical tests,
and all tests of a report share one error level (Holm's method): if all annotators are honest, at most 5 % of
reports name any of them. An effect must also be large enough to matter. Counts need no test.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict
from scipy import special

from preference_data.preferences import agreement, votes
from preference_data.preferences.agreement import Alpha, Consistency, FirstPlace, Rise, Seconds, Share
from preference_data.schema import AXES, Axis, ErrorType, Judgement, Purpose

ERROR_LEVEL = 0.05
"""How often a report may name anybody when nothing is wrong with anybody."""
FIRST_PLACE_OFF = 0.1
"""A lean below 60 to 40 costs little: orders are drawn by lot, so it blurs preferences and bends none."""
GOLD_EXPECTED = 0.8
"""Gold has a right answer that listening tells; attentive people slip, but not at one in five."""
SAME_EXPECTED = 0.6
"""People repeat clear preferences far more often, and near-ties about as often; guessing repeats 1 in 4."""
RISE_MATTERS = 0.1
"""Less hardly changes how an alpha is read: Krippendorff's "tentative" and "reliable" lie 0.13 apart."""
UNHEARD_MATTERS = 0.1
"""Answers without listening are dropped anyway; beyond one in ten, so is much of the person's work."""
FAST_MATTERS = 0.2
"""A clip known from an earlier question can be answered faster; not one in five."""


class Measured(BaseModel):
    """Everything measured on all answers, or on one annotator's. None: nothing to measure."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    answers: dict[Purpose, int]
    unusable: int
    """Answers that call the audio unusable."""
    corrected: int
    """Answers that come with a better one."""
    unheard: Share | None
    """Answers whose annotator had not played `min_heard` of the clip, or of whom it is not known."""
    unknown: int
    """Of these, those of whom it is not known."""
    gold: Share | None
    same: dict[Axis, Consistency | None]
    """Judgements given to retests, against the first time."""
    first_place: dict[Axis, FirstPlace | None]
    """How often what was shown first wins."""
    seconds: Seconds | None
    too_fast: Share | None
    """Answers given sooner than `min_heard` of the clip lasts, among those whose time and clip are known."""

    @property
    def n(self) -> int:
        """All answers, whatever for."""
        return sum(self.answers.values())


class Quality(BaseModel):
    """How far judgements can be trusted. `model_dump_json` and `model_validate_json` keep all of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min_heard: float
    overall: Measured
    annotators: dict[str, Measured]
    alpha: dict[Axis, Alpha]
    """Over the answers that count as votes: heard, audio usable."""
    without: dict[str, dict[Axis, Rise | None]]
    """Alpha with and without each annotator."""
    errors: dict[ErrorType, int]
    """How many answers were marked with each error, over comparisons."""
    tests: int
    """How many tests share the error level."""
    remarks: list[str]
    """What stands out, in sentences; empty if nothing does."""


class _Test(NamedTuple):
    """Is an annotator out of line? How likely that is by chance alone, and what to say if it is not."""

    p: float
    matters: bool
    remark: str


def assess(
    judgements: Sequence[Judgement],
    *,
    min_heard: float,
    seed: int,
    clip_seconds: Mapping[str, float] | None = None,
) -> Quality:
    """Measure judgements and say what stands out.

    Args:
        judgements: all answers, also those that will not count.
        min_heard: share of the clip that must have been played for an answer to count.
        seed: of the bootstrap.
        clip_seconds: prompt id -> seconds of audio it plays; without it nobody is too fast.
    """
    people: dict[str, list[Judgement]] = {
        name: [] for name in sorted({item.annotator for item in judgements})
    }
    for item in judgements:
        people[item.annotator].append(item)
    counted = votes.counted(judgements, min_heard)
    clips = clip_seconds or {}
    measured = {name: _measure(given, min_heard, clips) for name, given in people.items()}
    tables = {axis: votes.tabulate(counted, axis) for axis in AXES}
    alpha = {axis: agreement.alpha(table, seed=seed) for axis, table in tables.items()}
    without = {
        name: {axis: agreement.rise_without(table, name, seed=seed) for axis, table in tables.items()}
        for name in people
    }
    of_comparisons = [item for item in judgements if item.purpose == "comparison"]
    marked = Counter(error for item in of_comparisons for errors in item.errors for error in errors)
    tests = [test for name in people for test in _tests(name, measured[name], without[name])]
    facts = [fact for name in people for fact in _facts(name, measured[name], min_heard)]
    return Quality(
        min_heard=min_heard,
        overall=_measure(judgements, min_heard, clips),
        annotators=measured,
        alpha=alpha,
        without=without,
        errors=dict(marked.most_common()),
        tests=len(tests),
        remarks=[*_on_agreement(alpha), *_holm(tests), *facts],
    )


def metrics(quality: Quality) -> dict[str, float]:
    """The report's figures over all annotators, for MLflow; what was not measured is left out."""
    overall = quality.overall
    values: dict[str, float | None] = {
        "annotators": float(len(quality.annotators)),
        "answers": float(overall.n),
        "unusable": float(overall.unusable),
        "corrected": float(overall.corrected),
        "unheard": overall.unheard.value if overall.unheard else None,
        "gold_accuracy": overall.gold.value if overall.gold else None,
        "seconds_median": overall.seconds.median if overall.seconds else None,
    }
    for axis, alpha in quality.alpha.items():
        same, first = overall.same[axis], overall.first_place[axis]
        values |= {
            f"alpha_{axis}": alpha.value,
            f"alpha_{axis}_low": alpha.low,
            f"alpha_{axis}_high": alpha.high,
            f"alpha_{axis}_comparisons": float(alpha.comparisons),
            f"self_consistency_{axis}": same.share.value if same else None,
            f"first_place_{axis}": first.share.value if first else None,
        }
    return {name: value for name, value in values.items() if value is not None}


def _measure(given: Sequence[Judgement], min_heard: float, clip_seconds: Mapping[str, float]) -> Measured:
    timed = [
        item.seconds < min_heard * clip_seconds[item.prompt_id]
        for item in given
        if item.seconds is not None and item.prompt_id in clip_seconds
    ]
    unheard = [item for item in given if not votes.is_heard(item, min_heard)]
    return Measured(
        answers=dict(Counter(item.purpose for item in given)),
        unusable=sum(item.audio_unusable for item in given),
        corrected=sum(bool((item.corrected or "").strip()) for item in given),
        unheard=agreement.share(len(unheard), len(given)),
        unknown=sum(item.heard is None for item in unheard),
        gold=agreement.gold_accuracy(given),
        same={axis: agreement.self_consistency(given, axis) for axis in AXES},
        first_place={axis: agreement.first_place(given, axis) for axis in AXES},
        seconds=agreement.seconds(given),
        too_fast=agreement.share(sum(timed), len(timed)),
    )


# ---------------------------------------------------------------- what stands out


def _on_agreement(alpha: Mapping[Axis, Alpha]) -> Iterator[str]:
    for axis, measured in alpha.items():
        if not measured.comparisons:
            yield f"Whether annotators agree on {axis} is unknown: no comparison has two answers that count."
        elif measured.value is None:
            yield (
                f"Whether annotators agree on {axis} cannot be measured: all answers to the "
                f"{measured.comparisons} comparisons judged by two or more are the same."
            )
        elif measured.low is not None and measured.low <= 0:
            yield (
                f"Annotators agree on {axis} no better than chance would: alpha {_signed(measured.value)} "
                f"({_signed(measured.low)} to {_signed(measured.high)}) over {measured.comparisons} "
                "comparisons."
            )


def _tests(name: str, measured: Measured, without: Mapping[Axis, Rise | None]) -> Iterator[_Test]:
    """Every test on one annotator, whatever comes of it: Holm's method has to know how many there are."""
    for axis in AXES:
        if first := measured.first_place[axis]:
            yield _leaning(name, axis, first)
    if gold := measured.gold:
        yield _Test(
            _below(gold.value, gold.n, GOLD_EXPECTED),
            True,
            f"{name} gets {gold.hits} of {gold.n} comparisons right whose answer is known "
            f"({_percent(gold.value)}; at least {_percent(GOLD_EXPECTED)} expected of somebody who listens).",
        )
    for axis in AXES:
        if same := measured.same[axis]:
            yield _Test(
                _below(same.share.value, same.retests, SAME_EXPECTED),
                True,
                f"{name} contradicts their own judgement of {axis} when the order is another: the same for "
                f"{same.share.hits} of {same.share.n} pairs in {same.retests} retests "
                f"({_percent(same.share.value)}; at least {_percent(SAME_EXPECTED)} expected).",
            )
    for axis in AXES:
        if rise := without[axis]:
            yield _Test(
                rise.p,
                rise.without - rise.all >= RISE_MATTERS,
                f"{name} judges {axis} unlike everybody else: alpha rises from {_signed(rise.all)} to "
                f"{_signed(rise.without)} without them, over {rise.comparisons} comparisons.",
            )


def _leaning(name: str, axis: Axis, first: FirstPlace) -> _Test:
    value, expected = first.share.value, first.expected
    place, often, by_lot = ("first", value, expected)
    if value < expected:
        place, often, by_lot = "later", 1 - value, 1 - expected
    return _Test(
        first.p,
        often - by_lot >= FIRST_PLACE_OFF,
        f"{name} prefers what is shown {place} in {_percent(often)} of {first.share.n} clear answers about "
        f"{axis} ({_percent(by_lot)} expected).",
    )


def _below(share: float, n: int, expected: float) -> float:
    """How likely so small a share is for somebody who hits `expected` of the time: the binomial's lower tail.

    As an incomplete beta function it takes shares of pairs too, where `n` retests are not whole hits.
    """
    hits = share * n
    return 1.0 if hits >= n else float(special.betainc(n - hits, hits + 1, 1 - expected))


def _holm(tests: Sequence[_Test]) -> list[str]:
    """Remarks of the tests that stand although there are so many of them, in the order given.

    Holm (1979): the smallest p must be below level / m, the next below level / (m - 1), and so on to the
    first that is not. It needs no independence, which these tests do not have.
    """
    standing: set[int] = set()
    for done, i in enumerate(sorted(range(len(tests)), key=lambda i: tests[i].p)):
        if tests[i].p > ERROR_LEVEL / (len(tests) - done):
            break
        standing.add(i)
    return [test.remark for i, test in enumerate(tests) if i in standing and test.matters]


def _facts(name: str, measured: Measured, min_heard: float) -> Iterator[str]:
    unheard, fast = measured.unheard, measured.too_fast
    if unheard and unheard.value > UNHEARD_MATTERS:
        unknown = f" (of {measured.unknown} it is not known)" if measured.unknown else ""
        yield (
            f"{name} submitted {_percent(unheard.value)} of {unheard.n} answers without having played "
            f"{_percent(min_heard)} of the clip{unknown}: these do not count."
        )
    if fast and fast.value > FAST_MATTERS:
        yield (
            f"{name} gave {_percent(fast.value)} of {fast.n} timed answers faster than "
            f"{_percent(min_heard)} of the clip can be played."
        )


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _signed(value: float | None) -> str:
    return "?" if value is None else f"{value:z.2f}".replace("-", "−")

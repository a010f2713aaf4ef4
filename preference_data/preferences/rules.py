"""Which judgements count, and how much: findings about annotators, acted upon.

Every judgement is left out by the first of these rules that applies to it, and counted there:

1. Gold, and retests by somebody who judged the comparison itself, measure annotators and are no votes.
2. `exclude` names annotators whose judgements do not count.
3. `min_gold`: neither do those of an annotator whose accuracy on gold is below it for certain: the upper end
   of its 95 % interval lies below. Somebody with little gold is never certain.
4. Nor does a judgement that calls the audio unusable,
5. or whose annotator had played less than `min_heard` of the clip when submitting; unknown is not heard.

Those that count weigh the same (`equal`), or what their annotator's are worth (`dawid_skene`, see
`annotator_weights`), on each axis by itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

from preference_data.preferences import annotator_weights, votes
from preference_data.preferences.agreement import Share, gold_accuracy
from preference_data.schema import AXES, Axis, Judgement

AnnotatorWeights = Literal["equal", "dawid_skene"]


class UnknownAnnotator(ValueError):
    """A recipe excludes somebody who has judged nothing."""


class Rules(NamedTuple):
    """The rules' values; see the module."""

    min_heard: float
    exclude: tuple[str, ...] = ()
    min_gold: float | None = None
    annotator_weights: AnnotatorWeights = "equal"


class Removal(NamedTuple):
    """What a rule left out; a row of rules.json and of the page that shows it."""

    rule: str
    left_out: int
    of: str
    """Of what: judgements, or pairs of completions on an axis."""
    total: int
    why: str


class Tally(NamedTuple):
    """How many judgements each rule left out, and how many count."""

    controls: int
    excluded: int
    below_gold: int
    unusable: int
    unheard: int
    counted: int


class CountedJudgements(NamedTuple):
    """The judgements that count, and how much."""

    votes: Sequence[Judgement]
    adjudications: Sequence[Judgement]
    corrections: Sequence[Judgement]
    """Judgements of a completion that an annotator typed, beside others."""
    weights: Mapping[Axis, Mapping[str, float]]
    """Axis -> annotator -> weight; who is not named has 1."""
    below_gold: Mapping[str, Share]
    """Annotators left out by `min_gold`, with their accuracy."""
    tally: Tally


def count(judgements: Iterable[Judgement], rules: Rules) -> CountedJudgements:
    """Apply the rules.

    Raises:
        UnknownAnnotator: `exclude` names somebody who is not there.
        annotator_weights.UnknownWeights: `dawid_skene` has nothing to learn from.
    """
    judgements = sorted(judgements, key=lambda item: item.id)
    names = {item.annotator for item in judgements}
    if missing := sorted(set(rules.exclude) - names):
        raise UnknownAnnotator(
            f"exclude: nobody called {', '.join(map(repr, missing))} has judged anything; those who have are "
            f"{', '.join(sorted(names)) or 'nobody'}"
        )
    below = {} if rules.min_gold is None else _below(judgements, rules.min_gold)
    opinions = {item.id for item in votes.opinions(judgements)}
    reasons: Counter[str] = Counter()
    kept: list[Judgement] = []
    for item in judgements:
        is_control = item.id not in opinions and item.purpose not in ("adjudication", "correction")
        reason = "controls" if is_control else _reason(item, rules, below)
        reasons[reason] += 1
        if reason == "counted":
            kept.append(item)
    voting = [item for item in kept if item.purpose in ("comparison", "retest")]
    gold = [
        item
        for item in judgements
        if item.expected is not None
        and not item.audio_unusable
        and item.annotator not in rules.exclude
        and item.annotator not in below
    ]
    weights: dict[Axis, dict[str, float]] = {axis: {} for axis in AXES}
    if rules.annotator_weights == "dawid_skene":
        weights = annotator_weights.dawid_skene(voting, gold)
    return CountedJudgements(
        voting,
        [item for item in kept if item.purpose == "adjudication"],
        [item for item in kept if item.purpose == "correction"],
        weights,
        below,
        Tally(**{name: reasons[name] for name in Tally._fields}),
    )


def removals(counted: CountedJudgements, rules: Rules, *, control_tokens: int) -> list[Removal]:
    """What each rule left out of the judgements, in the order in which the rules apply.

    Args:
        counted: of these rules.
        rules: their values.
        control_tokens: judgements that were left out before, for a text of theirs would steer the model.
    """
    tally = counted.tally
    total = sum(tally) + control_tokens
    below = ", ".join(
        f"{name}: {right.hits} of {right.n} right, at most {right.high:.0%}"
        for name, right in counted.below_gold.items()
    )
    rows = (
        ("control tokens", control_tokens, "a text would steer the model, see quarantine.jsonl"),
        ("controls", tally.controls, "gold and retests by the same annotator measure annotators"),
        ("exclude", tally.excluded, ", ".join(rules.exclude) or "nobody is excluded"),
        ("min_gold", tally.below_gold, below or _nobody_below(rules.min_gold)),
        ("audio unusable", tally.unusable, "the annotator says so"),
        ("min_heard", tally.unheard, f"less than {rules.min_heard:.0%} of the clip played, or unknown"),
    )
    return [Removal(rule, n, "judgements", total, why) for rule, n, why in rows]


def _nobody_below(min_gold: float | None) -> str:
    return "no limit is set" if min_gold is None else f"nobody is below {min_gold:.0%} for certain"


def _reason(item: Judgement, rules: Rules, below: Mapping[str, Share]) -> str:
    """The rule that leaves a judgement out, as `Tally` names it."""
    if item.annotator in rules.exclude:
        return "excluded"
    if item.annotator in below:
        return "below_gold"
    if item.audio_unusable:
        return "unusable"
    return "counted" if votes.is_heard(item, rules.min_heard) else "unheard"


def _below(judgements: Sequence[Judgement], min_gold: float) -> dict[str, Share]:
    """Annotators whose accuracy on gold is certainly below, by name."""
    gold: dict[str, list[Judgement]] = {}
    for item in judgements:
        if item.expected is not None:
            gold.setdefault(item.annotator, []).append(item)
    measured = {name: gold_accuracy(given) for name, given in sorted(gold.items())}
    return {name: right for name, right in measured.items() if right and right.high < min_gold}

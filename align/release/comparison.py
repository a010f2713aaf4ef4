"""Two or more policies on the same benchmark questions: who is better, by how much, and where it got worse.

Policies may come from different runs: what must agree is the questions and the judge. The first policy
is the baseline; every difference is policy minus baseline on the same questions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from align.evaluation.comparison import League, OrderConsistency, WinRate
from align.evaluation.statistics import Difference, Interval, Share
from align.release import evaluations, paired, provenance
from align.release.evaluations import Evaluation, Item
from align.release.provenance import Gate
from align.run_folder.artifacts import MANIFEST

Outcome = Literal["regressed", "improved", "unchanged", "unscored"]
OUTCOMES: tuple[Outcome, ...] = ("regressed", "improved", "unchanged", "unscored")
_JUDGE_IS = ("name", "model", "protocol", "prompt_sha256")
"""What must agree for two judges' scores to be comparable, of the keys that `scores.json` has."""


class CannotCompare(ValueError):
    """The policies were not scored on the same questions by the same judge, or not scored at all."""


class Policy(NamedTuple):
    """One policy and what was measured of it alone."""

    label: str
    folder: Path
    evaluation: Evaluation
    items: tuple[Item, ...]
    """Its answers, in the order of the baseline's."""
    levels: dict[str, float]
    states: dict[str, int]
    """How the judging of its answers ended: state -> number."""
    order_effect: OrderConsistency | None
    gate: Gate | None
    """The verdict of its run's gate, if that judged this policy."""


class Against(NamedTuple):
    """A policy against the baseline, on the questions that were scored for both."""

    label: str
    scores: dict[str, Difference]
    """Of "overall" and each category, as AIR-Bench averages."""
    wins: dict[str, WinRate]
    length_controlled: Share
    left_out: int
    worst_case: dict[str, Difference]
    """`scores` with everything unscored counted as the scale's minimum."""
    marks: dict[str, dict[str, Interval]]
    """"overall" or category -> yes-or-no mark -> shares and their difference; empty without marks."""


class Question(NamedTuple):
    """A benchmark question with every policy's answer, in the order of the policies."""

    items: tuple[Item, ...]
    outcome: Outcome
    """Regressed if any policy scores below the baseline, else improved if any scores above it."""
    change: float | None
    """Score difference to the baseline that decided the outcome."""


class Comparison(NamedTuple):
    """Everything the table, the JSON and the page say. The first policy is the baseline."""

    policies: tuple[Policy, ...]
    against: tuple[Against, ...]
    """One for each policy but the baseline."""
    league: tuple[League, ...]
    """Of three policies or more."""
    questions: tuple[Question, ...]
    """Regressions first, the gravest first; then improvements, then the rest."""
    judge: dict[str, Any]
    judge_agreement: dict[str, Any]
    """How often the judge prefers as people do, where the evaluation has measured it."""
    tie_margin: float
    split: str
    corpus: Path


class _Scored(NamedTuple):
    folder: Path
    evaluation: Evaluation
    items: dict[str | int, Item]


def compare(policies: Sequence[Path]) -> Comparison:
    """Join policies' evaluated answers by question.

    Args:
        policies: stage folders such as `runs/demo/2_sft`, or run folders, which stand for their
            evaluation's `after` policy.

    Raises:
        CannotCompare: a policy has no evaluation, or the questions or judges differ; says by how much.
    """
    if len(policies) < 2:
        raise CannotCompare(f"comparing takes two policies or more, got {len(policies)}")
    scored = [_find(folder) for folder in policies]
    labels = _labels([one.folder for one in scored])
    for other in scored[1:]:
        _check_same_benchmark(scored[0], other)
    found = [_policy(label, one, list(scored[0].items)) for label, one in zip(labels, scored, strict=True)]
    told = scored[0].evaluation.scores
    judge = told.get("judge", {})
    margin = float(judge.get("tie_margin", 0.0))
    league = paired.league({one.label: one.items for one in found}, margin) if len(found) > 2 else []
    return Comparison(
        policies=tuple(found),
        against=tuple(_against(found[0], other, margin) for other in found[1:]),
        league=tuple(league),
        questions=_regressions_first(
            [_question(items, margin) for items in zip(*(one.items for one in found), strict=True)]
        ),
        judge=judge,
        judge_agreement=told.get("judge_agreement", {}),
        tie_margin=margin,
        split=told.get("split", "?"),
        corpus=scored[0].evaluation.corpus,
    )


def _find(folder: Path) -> _Scored:
    """The newest evaluation that scored a policy; the test split is preferred."""
    folder = folder.resolve()
    is_run = not (folder / MANIFEST).exists()
    run = folder if is_run else folder.parent
    found = evaluations.find(run)
    if not found:
        raise CannotCompare(
            f"{run} has no finished evaluation: name a run folder, or the folder of a policy stage in a run "
            "whose evaluate stage has finished"
        )
    name = found[0].scores["after"] if is_run else folder.name
    for evaluation in found:
        if name in evaluation.scores["policies"]:
            return _Scored(run / name, evaluation, evaluations.read_items(evaluation, name))
    known = ", ".join(sorted({policy for evaluation in found for policy in evaluation.scores["policies"]}))
    raise CannotCompare(
        f"{name!r} was not evaluated in {run} (evaluated: {known}): "
        "add it to `policies` of the evaluate stage and run that stage again"
    )


def _labels(folders: list[Path]) -> list[str]:
    """The shortest names that tell the policies apart: stage, run/stage, or the whole path."""
    for n_parts in (1, 2):
        labels = ["/".join(folder.parts[-n_parts:]) for folder in folders]
        if len(set(labels)) == len(labels):
            return labels
    if len(set(folders)) < len(folders):
        twice = Counter(folders).most_common(1)[0][0]
        raise CannotCompare(f"{twice} is named twice; a policy compared with itself says nothing")
    return [str(folder) for folder in folders]


def _check_same_benchmark(first: _Scored, other: _Scored) -> None:
    names = f"{first.folder} and {other.folder}"
    judges = [one.evaluation.scores.get("judge", {}) for one in (first, other)]
    for key in _JUDGE_IS:
        if judges[0].get(key) != judges[1].get(key):
            raise CannotCompare(
                f"{names} were marked by different judges ({key}): "
                f"{judges[0].get(key)!r} and {judges[1].get(key)!r}; evaluate both with the same judge"
            )
    shared = first.items.keys() & other.items.keys()
    if len(shared) < max(len(first.items), len(other.items)):
        raise CannotCompare(
            f"{names} were asked different questions: {len(first.items)} and {len(other.items)}, of which "
            f"{len(shared)} are the same; evaluate both on the same benchmark"
        )
    changed = [
        key
        for key in first.items
        if (first.items[key].question, first.items[key].answer_gt)
        != (other.items[key].question, other.items[key].answer_gt)
    ]
    if changed:
        raise CannotCompare(
            f"{names} share their {len(shared)} question ids, but {len(changed)} questions or references "
            f"behind them differ, the first of them {changed[0]!r}: they are different benchmarks"
        )


def _policy(label: str, one: _Scored, order: list[str | int]) -> Policy:
    items = tuple(one.items[key] for key in order)
    return Policy(
        label=label,
        folder=one.folder,
        evaluation=one.evaluation,
        items=items,
        levels=paired.levels(items),
        states=dict(Counter(item.state for item in items)),
        order_effect=paired.order_effect(items),
        gate=provenance.gate(one.folder, one.evaluation),
    )


def _against(baseline: Policy, other: Policy, tie_margin: float) -> Against:
    complete = paired.pair(baseline.items, other.items)
    return Against(
        label=other.label,
        scores=paired.score_differences(complete),
        wins=paired.win_rates(complete, tie_margin),
        length_controlled=paired.length_controlled_win_rate(
            complete, baseline.items, other.items, tie_margin
        ),
        left_out=complete.left_out,
        worst_case=paired.worst_case(baseline.items, other.items),
        marks=paired.mark_differences(baseline.items, other.items),
    )


def _question(items: tuple[Item, ...], tie_margin: float) -> Question:
    baseline, *others = [item.score for item in items]
    changes = [score - baseline for score in others if score is not None and baseline is not None]
    if not changes:
        return Question(items, "unscored", None)
    if min(changes) < -tie_margin:
        return Question(items, "regressed", min(changes))
    return Question(items, "improved" if max(changes) > tie_margin else "unchanged", max(changes))


def _regressions_first(questions: list[Question]) -> tuple[Question, ...]:
    return tuple(sorted(questions, key=lambda one: (OUTCOMES.index(one.outcome), -abs(one.change or 0.0))))

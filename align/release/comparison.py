"""Two or more policies on the same benchmark questions: who is better, by how much, and where it got worse.

Policies may come from different runs: what must agree is the questions and the judge. The first policy
is the baseline; every difference is policy minus baseline on the same questions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from align.evaluation import comparison, judged_answers
from align.evaluation.comparison import LeagueRow, OrderConsistency, PolicyDifference
from align.evaluation.judged_answers import JudgedAnswer
from align.release import ancestry, evaluations
from align.release.ancestry import Gate
from align.release.evaluations import Evaluation
from align.run_folder.artifacts import MANIFEST

Outcome = Literal["regressed", "improved", "unchanged", "unscored"]
OUTCOMES: tuple[Outcome, ...] = ("regressed", "improved", "unchanged", "unscored")
_JUDGE_IDENTITY = ("name", "model", "protocol", "prompt_sha256")
"""Keys of the judge in `scores.json` that must agree for scores to be comparable."""


class CannotCompare(ValueError):
    """The policies were not scored on the same questions by the same judge, or not scored at all."""


class EvaluatedPolicy(NamedTuple):
    """One policy and what was measured of it alone."""

    label: str
    folder: Path
    evaluation: Evaluation
    answers: tuple[JudgedAnswer, ...]
    """In the order of the baseline's."""
    levels: dict[str, float]
    states: dict[str, int]
    """State of the judging -> number of answers."""
    order_effect: OrderConsistency | None
    gate: Gate | None
    """The verdict of its run's gate, if that judged this policy."""


class ComparedQuestion(NamedTuple):
    """A benchmark question with every policy's answer, in the order of the policies."""

    answers: tuple[JudgedAnswer, ...]
    outcome: Outcome
    """Regressed if any policy scores below the baseline, else improved if any scores above it."""
    change: float | None
    """Score difference to the baseline that decided the outcome."""


class PolicyComparison(NamedTuple):
    """Everything the table, the JSON and the page say. The first policy is the baseline."""

    policies: tuple[EvaluatedPolicy, ...]
    differences: dict[str, PolicyDifference]
    """By label, for each policy but the baseline."""
    league: tuple[LeagueRow, ...]
    """For three policies or more."""
    questions: tuple[ComparedQuestion, ...]
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
    answers: dict[str | int, JudgedAnswer]


def compare(policies: Sequence[Path]) -> PolicyComparison:
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
    labels = _labels([policy.folder for policy in scored])
    for other in scored[1:]:
        _check_same_benchmark(scored[0], other)
    evaluated = [
        _evaluated(label, policy, list(scored[0].answers))
        for label, policy in zip(labels, scored, strict=True)
    ]
    answers = {policy.label: policy.answers for policy in evaluated}
    scores = scored[0].evaluation.scores
    judge = scores.get("judge", {})
    margin = float(judge.get("tie_margin", 0.0))
    baseline, *others = evaluated
    return PolicyComparison(
        policies=tuple(evaluated),
        differences={
            policy.label: comparison.compare(baseline.answers, policy.answers, tie_margin=margin)
            for policy in others
        },
        league=tuple(comparison.league(answers, tie_margin=margin)) if len(others) > 1 else (),
        questions=tuple(
            sorted(
                (compare_answers(row, margin) for row in zip(*answers.values(), strict=True)),
                key=lambda question: (OUTCOMES.index(question.outcome), -abs(question.change or 0.0)),
            )
        ),
        judge=judge,
        judge_agreement=scores.get("judge_agreement", {}),
        tie_margin=margin,
        split=scores.get("split", "?"),
        corpus=scored[0].evaluation.corpus,
    )


def _find(folder: Path) -> _Scored:
    """The newest evaluation that scored a policy; the test split is preferred."""
    folder = folder.resolve()
    is_run = not (folder / MANIFEST).exists()
    run = folder if is_run else folder.parent
    finished = evaluations.find(run)
    if not finished:
        raise CannotCompare(
            f"{run} has no finished evaluation: name a run folder, or the folder of a policy stage in a run "
            "whose evaluate stage has finished"
        )
    name = finished[0].scores["after"] if is_run else folder.name
    for evaluation in finished:
        if name in evaluation.scores["policies"]:
            return _Scored(
                run / name, evaluation, judged_answers.read(evaluations.answers_path(evaluation, name))
            )
    known = ", ".join(sorted({name for evaluation in finished for name in evaluation.scores["policies"]}))
    raise CannotCompare(
        f"{name!r} was not evaluated in {run} (evaluated: {known}): "
        "add it to `policies` of the evaluate stage and run that stage again"
    )


def _labels(folders: list[Path]) -> list[str]:
    """The shortest names that differ: stage, run/stage, or the whole path."""
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
    judges = [policy.evaluation.scores.get("judge", {}) for policy in (first, other)]
    for key in _JUDGE_IDENTITY:
        if judges[0].get(key) != judges[1].get(key):
            raise CannotCompare(
                f"{names} were judged by different judges ({key}): "
                f"{judges[0].get(key)!r} and {judges[1].get(key)!r}; evaluate both with the same judge"
            )
    shared = first.answers.keys() & other.answers.keys()
    if len(shared) < max(len(first.answers), len(other.answers)):
        raise CannotCompare(
            f"{names} answered different questions: {len(first.answers)} and {len(other.answers)}, of which "
            f"{len(shared)} are the same; evaluate both on the same benchmark"
        )
    changed = [
        key
        for key in first.answers
        if (first.answers[key].question, first.answers[key].answer_gt)
        != (other.answers[key].question, other.answers[key].answer_gt)
    ]
    if changed:
        raise CannotCompare(
            f"{names} share their {len(shared)} question ids, but {len(changed)} questions or references "
            f"behind them differ, the first of them {changed[0]!r}: they are different benchmarks"
        )


def _evaluated(label: str, policy: _Scored, order: list[str | int]) -> EvaluatedPolicy:
    answers = tuple(policy.answers[key] for key in order)
    evaluation = policy.evaluation
    return EvaluatedPolicy(
        label=label,
        folder=policy.folder,
        evaluation=evaluation,
        answers=answers,
        levels=comparison.levels(answers),
        states=dict(Counter(answer.state for answer in answers)),
        order_effect=comparison.order_consistency(answers),
        gate=ancestry.gate(policy.folder, evaluation.folder),
    )


def compare_answers(answers: Sequence[JudgedAnswer], tie_margin: float) -> ComparedQuestion:
    """Whether a question's answers got better; the first answer is the baseline's."""
    baseline, *others = [answer.score for answer in answers]
    changes = [score - baseline for score in others if score is not None and baseline is not None]
    if not changes:
        return ComparedQuestion(tuple(answers), "unscored", None)
    if min(changes) < -tie_margin:
        return ComparedQuestion(tuple(answers), "regressed", min(changes))
    outcome: Outcome = "improved" if max(changes) > tie_margin else "unchanged"
    return ComparedQuestion(tuple(answers), outcome, max(changes))

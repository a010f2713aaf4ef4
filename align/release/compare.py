"""Two or more policies side by side on the same benchmark questions: differences, regressions, answers.

Policies may come from different runs: what must agree is the questions and the judge. The first policy
is the baseline; every difference is policy minus baseline on the same questions.
"""

from __future__ import annotations

import difflib
import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from markupsafe import Markup

from align.artifacts import MANIFEST
from align.release import evaluations, page
from align.release.evaluations import METRICS, Evaluation, Item
from preference_data.statistics import Interval
from preference_data.store import write_text

Outcome = Literal["regressed", "improved", "unchanged"]
_ON_PAGE: dict[Outcome, int] = {"regressed": 100, "improved": 70, "unchanged": 30}
"""Most questions of each outcome on the page: clips are inside the file, and it should open at once."""


class CannotCompare(ValueError):
    """The policies were not scored on the same questions by the same judge, or not scored at all."""


class Policy(NamedTuple):
    """One policy and what the evaluation measured of it."""

    label: str
    folder: Path
    evaluation: Path
    overall: dict[str, float]
    """The policy's `overall` block of `scores.json`."""


class Difference(NamedTuple):
    """A policy against the baseline. Wins, ties and losses count questions by score."""

    label: str
    overall: dict[str, Interval]
    categories: dict[str, dict[str, Interval]]
    wins: int
    ties: int
    losses: int


class Question(NamedTuple):
    """A benchmark question with every policy's answer, in the order of the policies."""

    items: tuple[Item, ...]

    @property
    def change(self) -> float:
        """Score difference to the baseline that matters most: the worst if any is worse, else the best."""
        changes = [item.score - self.items[0].score for item in self.items[1:]]
        return min(changes) if min(changes) < 0 else max(changes)

    @property
    def outcome(self) -> Outcome:
        """Regressed if any policy scores below the baseline, else improved if any scores above it."""
        if self.change == 0:
            return "unchanged"
        return "regressed" if self.change < 0 else "improved"


class Comparison(NamedTuple):
    """Everything the table, the JSON and the page say. The first policy is the baseline."""

    policies: tuple[Policy, ...]
    differences: tuple[Difference, ...]
    """One for each policy but the baseline."""
    questions: tuple[Question, ...]
    """Regressions first, the gravest first; then improvements, then the rest."""
    judge: dict[str, Any]
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
    columns = [[one.items[key] for key in scored[0].items] for one in scored]
    return Comparison(
        policies=tuple(
            Policy(label, one.folder, one.evaluation.folder, _overall(one))
            for label, one in zip(labels, scored, strict=True)
        ),
        differences=tuple(
            _difference(label, columns[0], column)
            for label, column in zip(labels[1:], columns[1:], strict=True)
        ),
        questions=_regressions_first([Question(items) for items in zip(*columns, strict=True)]),
        judge=scored[0].evaluation.scores.get("judge", {}),
        split=scored[0].evaluation.scores.get("split", "?"),
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


def _overall(one: _Scored) -> dict[str, float]:
    overall: dict[str, float] = one.evaluation.scores["policies"][one.folder.name]["overall"]
    return overall


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
    judges = [one.evaluation.scores.get("judge", {}).get("name") for one in (first, other)]
    if judges[0] != judges[1]:
        raise CannotCompare(f"{names} were marked by different judges: {judges[0]!r} and {judges[1]!r}")
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


def _difference(label: str, before: list[Item], after: list[Item]) -> Difference:
    changes = [b.score - a.score for a, b in zip(before, after, strict=True)]
    by_category: dict[str, dict[str, Interval]] = {}
    for category in dict.fromkeys(item.category for item in before):
        rows = [index for index, item in enumerate(before) if item.category == category]
        by_category[category] = evaluations.differences([before[i] for i in rows], [after[i] for i in rows])
    return Difference(
        label=label,
        overall=evaluations.differences(before, after),
        categories=by_category,
        wins=sum(change > 0 for change in changes),
        ties=sum(change == 0 for change in changes),
        losses=sum(change < 0 for change in changes),
    )


def _regressions_first(questions: list[Question]) -> tuple[Question, ...]:
    def gravity(question: Question) -> tuple[int, float]:
        return ("regressed", "improved", "unchanged").index(question.outcome), -abs(question.change)

    return tuple(sorted(questions, key=gravity))


def to_json(c: Comparison) -> dict[str, Any]:
    """The comparison as plain JSON values; every question with its outcome and scores."""
    return {
        "baseline": c.policies[0].label,
        "split": c.split,
        "judge": c.judge,
        "n": len(c.questions),
        "policies": [
            {"label": p.label, "folder": str(p.folder), "evaluation": str(p.evaluation), "overall": p.overall}
            for p in c.policies
        ],
        "differences": [
            {
                "policy": d.label,
                "wins": d.wins,
                "ties": d.ties,
                "losses": d.losses,
                "overall": {metric: interval._asdict() for metric, interval in d.overall.items()},
                "by_category": {
                    category: {metric: interval._asdict() for metric, interval in metrics.items()}
                    for category, metrics in d.categories.items()
                },
            }
            for d in c.differences
        ],
        "questions": [
            {
                "uniq_id": question.items[0].uniq_id,
                "category": question.items[0].category,
                "outcome": question.outcome,
                "scores": [item.score for item in question.items],
            }
            for question in c.questions
        ],
    }


def as_table(c: Comparison) -> list[str]:
    """Lines for the terminal: a row per policy, then a row of paired differences per policy."""
    shown = (*METRICS, "over_abstention", "words")
    rows = [["", *(page.LABELS[metric] for metric in shown)]]
    rows += [[p.label, *(page.value(p.overall.get(metric), metric) for metric in shown)] for p in c.policies]
    for d in c.differences:
        cells = [_interval_text(d.overall[metric], metric) if metric in d.overall else "" for metric in shown]
        rows.append([f"{d.label} − {c.policies[0].label}", *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows
    ]
    lines.insert(1 + len(c.policies), "")
    lines += [
        f"{d.label}: {d.wins} wins, {d.ties} ties, {d.losses} losses by score against {c.policies[0].label}"
        for d in c.differences
    ]
    return [
        *lines,
        f"{len(c.questions)} questions ({c.split}); differences with 95 % intervals, shares in points",
    ]


def _interval_text(interval: Interval, metric: str) -> str:
    low, delta, high = (
        page.difference(number, metric) for number in (interval.ci_low, interval.delta, interval.ci_high)
    )
    return f"{delta} [{low}, {high}]"


def write_html(c: Comparison, path: Path) -> None:
    """Write the page: one file with its audio inside, regressions first."""
    shown = [
        question
        for outcome, most in _ON_PAGE.items()
        for question in [q for q in c.questions if q.outcome == outcome][:most]
    ]
    write_text(
        path,
        page.render(
            "compare.html",
            comparison=c,
            metrics=METRICS,
            categories=list(dict.fromkeys(question.items[0].category for question in c.questions)),
            counts=Counter(question.outcome for question in c.questions),
            cards=[_card(question, c.corpus) for question in shown],
        ),
    )


def _card(question: Question, corpus: Path) -> dict[str, Any]:
    texts = [item.response for item in question.items]
    answers = [
        {"item": item, "text": diff_words(text, texts[1:] if index == 0 else texts[:1])}
        for index, (item, text) in enumerate(zip(question.items, texts, strict=True))
    ]
    first = question.items[0]
    url = page.audio_url(corpus, first.audio)
    return {"first": first, "outcome": question.outcome, "answers": answers, "audio": url}


def diff_words(text: str, others: Sequence[str]) -> Markup:
    """The text, escaped, with the words marked that none of the other texts has in the same place."""
    words = text.split()
    kept: set[int] = set()
    for other in others:
        matcher = difflib.SequenceMatcher(a=words, b=other.split(), autojunk=False)
        kept.update(
            i for block in matcher.get_matching_blocks() for i in range(block.a, block.a + block.size)
        )
    runs = itertools.groupby(range(len(words)), key=kept.__contains__)
    return Markup(" ").join(
        Markup("{}" if is_kept else "<mark>{}</mark>").format(" ".join(words[i] for i in run))
        for is_kept, run in runs
    )

"""The output of `align compare`: a table, the numbers as JSON, and a page, all with the same numbers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from align.evaluation.comparison import ALL, ordered
from align.release import cards, charts, clips, page
from align.release.ancestry import ancestry, manifest_of
from align.release.clips import Placing
from align.release.comparison import OUTCOMES, EvaluatedPolicy, PolicyComparison
from align.run_folder.artifacts import METRICS, plain_values, read_metrics
from preference_data.schema import LETTERS
from preference_data.store import write_text

PAGE_BYTES = 14_000_000
"""Limit for a page with clips inside it: it should open at once and fit into a message."""


def to_json(c: PolicyComparison) -> dict[str, Any]:
    """The comparison as plain JSON values; every question with its outcome and scores."""
    report: dict[str, Any] = plain_values(
        {
            "baseline": c.policies[0].label,
            "split": c.split,
            "judge": c.judge,
            "judge_agreement": c.judge_agreement,
            "tie_margin": c.tie_margin,
            "n": len(c.questions),
            "policies": [_policy(policy) for policy in c.policies],
            "differences": [{"label": label, **row._asdict()} for label, row in c.differences.items()],
            "league": c.league,
            "questions": [
                {
                    "uniq_id": question.answers[0].uniq_id,
                    "category": question.answers[0].category,
                    "task": question.answers[0].task_name,
                    "outcome": question.outcome,
                    "change": question.change,
                    "scores": [answer.score for answer in question.answers],
                    "states": [answer.state for answer in question.answers],
                }
                for question in c.questions
            ],
        }
    )
    return report


def _policy(policy: EvaluatedPolicy) -> dict[str, Any]:
    """A policy's numbers and its lineage, without the stages' configuration, which their manifests hold."""
    return {
        "label": policy.label,
        "folder": str(policy.folder),
        "evaluation": str(policy.evaluation.folder),
        "levels": policy.levels,
        "states": policy.states,
        "order_effect": policy.order_effect,
        "gate": policy.gate,
        "lineage": [
            {
                "stage": ancestor.name,
                "kind": ancestor.manifest.get("kind", ""),
                "digest": ancestor.digest,
                "commit": ancestor.manifest.get("git_commit", ""),
                "seed": ancestor.manifest.get("seed"),
                "versions": ancestor.manifest.get("versions", {}),
                "is_changed": ancestor.is_changed,
            }
            for ancestor in ancestry(policy.folder).ancestors
        ],
    }


def as_table(c: PolicyComparison) -> list[str]:
    """Lines for the terminal: a row per policy, then a row of differences per policy."""
    metrics = [metric for metric in page.LABELS if any(metric in policy.levels for policy in c.policies)]
    rows = [["", *(page.LABELS[metric] for metric in metrics)]]
    rows += [
        [policy.label, *(page.value(policy.levels.get(metric), metric) for metric in metrics)]
        for policy in c.policies
    ]
    baseline = c.policies[0].label
    for label, difference in c.differences.items():
        intervals = {"score": difference.scores.get(ALL), **difference.marks.get(ALL, {})}
        cells = [page.interval(intervals.get(metric), metric) for metric in metrics]
        rows.append([f"{label} − {baseline}", *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows
    ]
    lines.insert(1 + len(c.policies), "")
    for label, difference in c.differences.items():
        if ALL in difference.wins:
            won = difference.wins[ALL]
            lines.append(
                f"{label}: {won.wins} wins, {won.ties} ties, {won.losses} losses by score against "
                f"{baseline}; {difference.left_out} of {len(c.questions)} not scored for both"
            )
    lines += [f"{row.policy}: {row.elo:.0f} Elo [{row.ci_low:.0f}, {row.ci_high:.0f}]" for row in c.league]
    lines.append(
        f"{len(c.questions)} questions ({c.split}); differences with 95 % intervals, shares in points"
    )
    return lines


def write_html(
    c: PolicyComparison, path: Path, audio: Placing = "packed", most_bytes: int = PAGE_BYTES
) -> None:
    """Write the page: one file that needs no network, regressions first.

    Args:
        c: the comparison to show.
        path: of the page; linked clips are found relative to it.
        audio: whether clips are inside the page, as far as they go, or beside it.
        most_bytes: of a page with clips inside; what does not go into it is linked.
    """
    sounds = clips.gather(c.corpus, [question.answers[0].audio for question in c.questions], path)
    values = _values(c) | {"cards": cards.make(c, sounds)}
    is_linked = any(not clip.problem for clip in sounds.values())
    html = page.render("compare.html", **values, packed=page.as_data({}), is_linked=is_linked)
    if audio == "packed":
        packed = clips.pack(c.corpus, sounds, most_bytes - len(html.encode()))
        is_linked = any(not clip.problem and name not in packed for name, clip in sounds.items())
        html = page.render("compare.html", **values, packed=page.as_data(packed), is_linked=is_linked)
    write_text(path, html)


def _values(c: PolicyComparison) -> dict[str, Any]:
    """The template's values besides the cards and their sound."""
    lengths = {
        policy.label: [(len(a.response.split()), a.score) for a in policy.answers if a.score is not None]
        for policy in c.policies
    }
    states = {state for policy in c.policies for state in policy.states}
    return {
        "comparison": c,
        "all": ALL,
        "differences": c.differences,
        "outcomes": OUTCOMES,
        "counts": Counter(question.outcome for question in c.questions),
        "categories": ordered(answer.category for answer in c.policies[0].answers),
        "letters": LETTERS,
        "bars": clips.BARS,
        "numbers": page.as_data(to_json(c)),
        "states": sorted(states, key=lambda state: (state != "scored", state)),
        "has_orders": any(policy.order_effect for policy in c.policies),
        "lengths": charts.lengths(lengths),
        "training": [view for policy in c.policies if (view := _training(policy))],
        "lineages": {policy.label: ancestry(policy.folder).ancestors for policy in c.policies},
    }


def _training(policy: EvaluatedPolicy) -> dict[str, Any] | None:
    """Curves of the policy's own training; None where its stage logged nothing."""
    manifest = manifest_of(policy.folder)
    view = charts.training(read_metrics(policy.folder / METRICS), manifest.get("metrics", {}))
    return view and {"policy": policy.label, "kind": manifest.get("kind", ""), **view}

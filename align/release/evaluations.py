"""What an evaluate stage left in its run: the scores, and every question with a policy's answer and marks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from align.artifacts import read_json, read_manifest
from preference_data.statistics import Interval, paired_bootstrap
from preference_data.store import BadRecord

SCORES = "scores.json"
METRICS = ("factuality", "behaviour", "score", "asked")
"""What policies are compared on. `asked` counts answerable questions only."""


class Item(BaseModel):
    """One benchmark question, a policy's answer and the judge's marks."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    uniq_id: str | int
    task_name: str
    category: str
    audio: str
    """Path relative to the corpus folder."""
    question: str
    answer_gt: str
    response: str
    factual: bool
    behaves: bool
    asked: bool | None
    abstains: bool
    answerable: bool
    score: float


class Evaluation(NamedTuple):
    """A finished evaluate stage: its folder, its `scores.json`, and the corpus folder of its audio."""

    folder: Path
    scores: dict[str, Any]
    corpus: Path


def find(run: Path) -> list[Evaluation]:
    """The evaluations of a run: those of the test split first, then the latest stage first."""
    found = []
    for path in sorted(
        run.glob(f"[!.]*/{SCORES}"), key=lambda path: stage_order(path.parent.name), reverse=True
    ):
        config = read_manifest(path.parent).get("config", {})
        found.append(Evaluation(path.parent, read_json(path), run / config.get("corpus", "")))
    return sorted(found, key=lambda evaluation: evaluation.scores.get("split") != "test")


def stage_order(name: str) -> tuple[int, str]:
    """Sorts stage names by their leading number: 2_sft before 10_promote."""
    number = name.partition("_")[0]
    return (int(number) if number.isdecimal() else 10**9, name)


def items_path(evaluation: Evaluation, policy: str) -> Path:
    """Where an evaluation keeps a policy's answers; a policy of another run has a slash in its name."""
    return evaluation.folder / "items" / f"{policy.replace('/', '_')}.jsonl"


def read_items(evaluation: Evaluation, policy: str) -> dict[str | int, Item]:
    """The questions a policy answered, by `uniq_id`, in the order of the file.

    Raises:
        FileNotFoundError: the evaluation kept no answers of this policy.
        BadRecord: naming the file, the line and the problem.
    """
    path = items_path(evaluation, policy)
    items: dict[str | int, Item] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            item = Item.model_validate(json.loads(line))
        except (ValidationError, json.JSONDecodeError) as error:
            raise BadRecord(f"{path}:{number}: not an evaluated question: {error}") from error
        if item.uniq_id in items:
            raise BadRecord(f"{path}:{number}: uniq_id {item.uniq_id!r} is there twice")
        items[item.uniq_id] = item
    return items


def differences(before: list[Item], after: list[Item]) -> dict[str, Interval]:
    """Paired differences per metric between two policies' answers to the same questions, in one order.

    A metric that no question can show (`asked` where nothing is answerable) is left out.
    """
    scored = {metric: _values(metric, before, after) for metric in METRICS}
    return {
        metric: paired_bootstrap([a for a, _ in pairs], [b for _, b in pairs])
        for metric, pairs in scored.items()
        if pairs
    }


def _values(metric: str, before: list[Item], after: list[Item]) -> list[tuple[float, float]]:
    pairs = list(zip(before, after, strict=True))
    match metric:
        case "factuality":
            return [(float(a.factual), float(b.factual)) for a, b in pairs]
        case "behaviour":
            return [(float(a.behaves), float(b.behaves)) for a, b in pairs]
        case "asked":
            return [(float(a.asked or 0), float(b.asked or 0)) for a, b in pairs if a.answerable]
        case _:
            return [(a.score, b.score) for a, b in pairs]

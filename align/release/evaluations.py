"""What an evaluate stage left in its run: the scores, and every question with a policy's answer and marks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from align.run_folder.artifacts import read_json, read_manifest
from preference_data.store import BadRecord

SCORES = "scores.json"


class Reply(BaseModel):
    """One reply of a judge that rates both answers; `order` says which answer stood first in the prompt."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    order: str
    reference: float | None
    response: float | None
    state: str
    text: str


class Item(BaseModel):
    """One benchmark question, a policy's answer and what the judge made of it.

    The marks are None where a judge gives none, and the score where the item has none; `state` says why.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    uniq_id: str | int
    task_name: str
    category: str
    audio: str
    """Path relative to the evaluation's folder of audio."""
    question: str
    answer_gt: str
    response: str = ""
    score: float | None
    state: str = "scored"
    factual: bool | None = None
    behaves: bool | None = None
    asked: bool | None = None
    abstains: bool | None = None
    answerable: bool | None = None
    replies: tuple[Reply, ...] = ()

    @model_validator(mode="after")
    def _a_score_goes_with_its_state(self) -> Item:
        if (self.state == "scored") != (self.score is not None):
            raise ValueError(f"state {self.state!r} does not go with score {self.score!r}")
        return self


class Evaluation(NamedTuple):
    """A finished evaluate stage: its folder, its `scores.json`, and the folder of its audio."""

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
        scores = read_json(path)
        clips = scores.get("audio_root", config.get("corpus", ""))  # absolute for a benchmark from elsewhere
        found.append(Evaluation(path.parent, scores, run / clips))
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

"""The finished evaluations of a run: their scores, and every question with a policy's answer and marks."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from align.release.ancestry import manifest_of, newest_first
from align.run_folder.artifacts import read_json

SCORES = "scores.json"


class Evaluation(NamedTuple):
    """A finished evaluate stage: its folder, its `scores.json`, and the folder of its audio."""

    folder: Path
    scores: dict[str, Any]
    corpus: Path


def find(run: Path) -> list[Evaluation]:
    """The evaluations of a run: those of the test split first, then the latest stage first."""
    finished = []
    for folder in newest_first(run, SCORES):
        scores = read_json(folder / SCORES)
        corpus = manifest_of(folder).get("config", {}).get("corpus", "")
        clips = scores.get("audio_root", corpus)  # absolute for a benchmark from elsewhere
        finished.append(Evaluation(folder, scores, run / clips))
    return sorted(finished, key=lambda evaluation: evaluation.scores.get("split") != "test")


def answers_path(evaluation: Evaluation, policy: str) -> Path:
    """The file of a policy's answers; a policy of another run has a slash in its name."""
    return evaluation.folder / "items" / f"{policy.replace('/', '_')}.jsonl"

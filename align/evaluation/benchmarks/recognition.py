"""Rows to recognise, as the Qwen2-Audio evaluation has them: JSON lines {audio, prompt, gt, source}."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from align.evaluation.benchmarks.rows import json_lines, require_text


class Utterance(NamedTuple):
    """One clip (path relative to the corpus), its prompt, the reference text, its group.

    Languages and question are ours, for prompts that state them: see `TaskExample`.
    """

    audio: str
    prompt: str
    gt: str
    source: str
    audio_language: str | None = None
    text_language: str | None = None
    question: str | None = None


def read(path: Path) -> list[Utterance]:
    """The rows of a recognition file; blank lines are skipped.

    Raises:
        BadBenchmark: naming file, line and key.
    """
    return [_utterance(row, where) for where, row in json_lines(path, "rows")]


def _utterance(row: Any, where: str) -> Utterance:
    ours = [key for key in Utterance._field_defaults if isinstance(row, dict) and row.get(key) is not None]
    needed = [*(key for key in Utterance._fields if key not in Utterance._field_defaults), *ours]
    return Utterance(**require_text(row, needed, where))

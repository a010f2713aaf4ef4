"""AIR-Bench chat (arXiv:2402.07729) in its official layout, questions and answers.

Reads `Chat/Chat_meta.json` with audio at `Chat/{task_name}_{dataset_name}/{path}`, as downloaded; the
demo's made evaluation set is written the same way. Answers use the official inference keys, so they
can be judged elsewhere, and answers made elsewhere can be judged here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from preference_data.store import write_text

CATEGORIES = {
    "speech_QA": "speech",
    "speech_dialogue_QA": "speech",
    "sound_QA": "sound",
    "sound_generation_QA": "sound",
    "music_QA": "music",
    "music_generation_analysis_QA": "music",
    "speech_and_sound_QA": "mixed",
    "speech_and_music_QA": "mixed",
}
"""The four columns of the published tables."""

_KEYS = ("path", "question", "answer_gt", "meta_info", "task_name", "dataset_name", "uniq_id")


class Item(NamedTuple):
    """One question about one clip. `meta_info` describes the clip to a judge that cannot hear."""

    uniq_id: str
    path: str
    question: str
    answer_gt: str
    meta_info: str
    task_name: str
    dataset_name: str

    @property
    def category(self) -> str:
        """speech, sound, music or mixed."""
        return CATEGORIES[self.task_name]

    @property
    def audio(self) -> str:
        """The clip's file relative to the folder that holds `Chat/`."""
        return f"Chat/{self.task_name}_{self.dataset_name}/{self.path}"


class BadBenchmark(ValueError):
    """The benchmark's folder is not as AIR-Bench ships it."""


def read(root: Path) -> list[Item]:
    """All questions below `root`, the folder that holds `Chat/`.

    Raises:
        BadBenchmark: naming file, item and key.
    """
    meta = root / "Chat" / "Chat_meta.json"
    if not meta.exists():
        raise BadBenchmark(f"{meta} is missing: point to the folder that holds AIR-Bench's Chat/")
    items = []
    for number, row in enumerate(json.loads(meta.read_text(encoding="utf-8"))):
        missing = [key for key in _KEYS if key not in row]
        if missing:
            raise BadBenchmark(f"{meta}: item {number}: no {', '.join(missing)}")
        if row["task_name"] not in CATEGORIES:
            raise BadBenchmark(f"{meta}: item {number}: unknown task_name {row['task_name']!r}")
        items.append(Item(**{key: str(row[key]) for key in _KEYS}))
    return items


def write_answers(path: Path, items: Sequence[Item], responses: Iterable[str]) -> None:
    """Answers as JSON lines with the official inference keys."""
    rows = [
        {
            "meta_info": item.meta_info,
            "question": item.question,
            "answer_gt": item.answer_gt,
            "path": item.path,
            "task_name": item.task_name,
            "dataset_name": item.dataset_name,
            "response": response,
            "uniq_id": item.uniq_id,
        }
        for item, response in zip(items, responses, strict=True)
    ]
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

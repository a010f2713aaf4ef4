"""AIR-Bench chat (arXiv:2402.07729) in its official layout, questions and answers.

Reads `Chat/Chat_meta.json` with audio at `Chat/{task_name}_{dataset_name}/{path}`, as downloaded; the
demo's synthetic evaluation set is written the same way. Answers use the official inference keys, so they
can be judged elsewhere, and answers made elsewhere can be judged here. Some files of the official
download are empty or damaged: `audit` finds and counts them, nothing is left out silently.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from align.evaluation.benchmarks.rows import BadBenchmark, json_lines, json_list, response_of, text_fields
from preference_data.audio import decode
from preference_data.audio.clip_files import resolve_inside
from preference_data.prompts.prompts import transcript
from preference_data.schema import Prompt
from preference_data.store import write_rows

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
"""The tasks, and the column of the published tables that each counts towards."""

COLUMNS = ("speech", "sound", "music", "mixed")
"""The four columns, in their published order."""

LONGEST_S = 600.0
"""Longest clip of the benchmark in seconds; models that hear less are given its beginning."""

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
        """speech, sound, music or mixed; of a question from elsewhere its task."""
        return CATEGORIES.get(self.task_name, self.task_name)

    @property
    def audio(self) -> str:
        """The clip's file relative to the folder that holds `Chat/`."""
        return f"Chat/{self.task_name}_{self.dataset_name}/{self.path}"


def item_of(prompt: Prompt, number: int) -> Item:
    """A prompt as a question of the benchmark; several answers to it are several items.

    Of several turns, or with a system prompt, the question is the whole conversation as text.
    """
    name = PurePosixPath(prompt.audios[0]).name if prompt.audios else ""
    known = transcript(prompt), prompt.answer_gt, prompt.meta_info, prompt.task_name
    return Item(f"{prompt.id}-{number}", name, *known, dataset_name="")


class Missing(NamedTuple):
    """An item that is left out: its clip was refused. `code` is one of `preference_data.audio.Reason`."""

    uniq_id: str
    code: str
    why: str


def read(root: Path) -> list[Item]:
    """All questions below `root`, the folder that holds `Chat/`.

    Raises:
        BadBenchmark: naming file, item and key.
    """
    meta = root / "Chat" / "Chat_meta.json"
    if not meta.exists():
        raise BadBenchmark(f"{meta} is missing: point to the folder that holds AIR-Bench's Chat/")
    items = [_item(row, f"{meta}: item {number}") for number, row in enumerate(json_list(meta))]
    _refuse_duplicates(items, str(meta))
    return items


class Audit(NamedTuple):
    """Items split by whether their clip can be used, in the order given, and usable clips' lengths."""

    usable: list[Item]
    missing: list[Missing]
    seconds: dict[str, float]
    """By an item's `audio`."""


def audit(root: Path, items: Sequence[Item], longest_s: float = LONGEST_S) -> Audit:
    """Decode every clip below `root`, the folder that holds `Chat/`, once; longer ones cannot be used."""
    clips = sorted({item.audio for item in items})
    good, refused = decode.audit(
        partial(resolve_inside, root), [(clip, clip) for clip in clips], max_duration_s=longest_s
    )
    reasons = {clip.id: clip for clip in refused}
    missing = [
        Missing(item.uniq_id, reasons[item.audio].code, f"{item.audio}: {reasons[item.audio].detail}")
        for item in items
        if item.audio in reasons
    ]
    usable = [item for item in items if item.audio in good]
    return Audit(usable, missing, {clip: info.duration_s for clip, info in good.items()})


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
            "uniq_id": _official_id(item.uniq_id),
        }
        for item, response in zip(items, responses, strict=True)
    ]
    write_rows(path, rows)


def read_answers(path: Path) -> list[tuple[Item, str]]:
    """Items and responses of an answer file in the official jsonl, whoever made it.

    A response that is null is read as the empty answer. Keys beyond the official ones are ignored.

    Raises:
        BadBenchmark: naming file, line and key: not JSON, a key that is absent or null, an unknown task, a
            response that is not text, an id that comes twice, a file without answers.
    """
    answers = [(_item(row, where), response_of(row, where)) for where, row in json_lines(path)]
    _refuse_duplicates([item for item, _ in answers], str(path))
    return answers


def _refuse_duplicates(items: Sequence[Item], where: str) -> None:
    """Ids join questions, answers and ratings, so each may come once."""
    for uniq_id, n in Counter(item.uniq_id for item in items).items():
        if n > 1:
            raise BadBenchmark(f"{where}: uniq_id {uniq_id!r} comes more than once; keep one row of it")


def _official_id(uniq_id: str) -> int | str:
    """The id as the official files have it: they count with integers."""
    return int(uniq_id) if uniq_id.isdecimal() and str(int(uniq_id)) == uniq_id else uniq_id


def _item(row: Any, where: str) -> Item:
    fields = text_fields(row, _KEYS, where)
    if fields["task_name"] not in CATEGORIES:
        raise BadBenchmark(
            f"{where}: unknown task_name {fields['task_name']!r}; AIR-Bench chat has {', '.join(CATEGORIES)}"
        )
    return Item(**fields)

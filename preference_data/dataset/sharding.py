"""A prepared data set -> the same data set with its audio in tar shards, as WebDataset lays them out.

For file systems on which a million small files are slow. The audio's bytes stay what they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from preference_data import store
from preference_data.audio.clip_paths import SOURCE, BadAudio, ClipFile, ClipRoot
from preference_data.audio.tar_shards import write_shards
from preference_data.dataset.dataset_folder import check_out, digest_of, writing
from preference_data.dataset.manifest import open_manifest
from preference_data.dataset.sources import Table, table, table_path
from preference_data.schema import AudioClip, Chat, Prompt, Record, TaskExample

_KINDS: dict[Table, type[Record]] = {"pretrain": TaskExample, "sft": Chat, "prompts": Prompt}
_PLAIN = ("dev/recognition.jsonl", "test/recognition.jsonl", "quarantine.jsonl")
_SHARDS = "shards"


def shard(folder: Path, out: Path, *, max_bytes: int = 1 << 28) -> dict[str, Any]:
    """Write `out/shards/*.tar` and records that refer to them; keeps some 300 bytes a clip in memory.

    Args:
        folder: a data set as `dataset_folder.prepare` writes it.
        out: the new one, which can move as a whole; an earlier one is replaced.
        max_bytes: a shard that has reached this size is closed.

    Returns:
        What the new `source.json` holds.

    Raises:
        BadCorpus: `out` is something else.
        BadAudio: a clip is not there.
        ValueError: `folder` has no clips.
    """
    root = ClipRoot(folder)
    check_out(out, folder)
    clips = table(folder, "clips", AudioClip)
    about: dict[str, Any] = json.loads((folder / SOURCE).read_text(encoding="utf-8"))
    with writing(out) as partial:
        samples = ((f"{number:09d}", _parts(root, clip)) for number, clip in enumerate(clips))
        written = write_shards(partial / _SHARDS, samples, max_bytes=max_bytes)
        moved = {
            clip.path: f"{name}/{key}.{_ending(clip.path)}"
            for (key, name), clip in zip(written, clips, strict=True)
        }
        store.write(
            partial / "clips.jsonl", (clip.model_copy(update={"path": moved[clip.path]}) for clip in clips)
        )
        for name, kind in _KINDS.items():
            if path := table_path(folder, name):
                records = open_manifest(path, kind)
                store.write_rows(partial / f"{name}.jsonl", (_moved(one, moved) for one in records))
        for plain in _PLAIN:
            store.write_rows(partial / plain, _moved_plain(folder / plain, moved))
        about |= {"root": _SHARDS, "digest": digest_of(partial)}
        store.write_text(partial / SOURCE, json.dumps(about, indent=2, ensure_ascii=False) + "\n")
    return about


def _parts(root: ClipRoot, clip: AudioClip) -> dict[str, bytes]:
    """A clip's members: the file as it is, and what is known of it for other readers of such shards."""
    file: ClipFile = root.find(clip.path)
    try:
        data = file.read_bytes() if isinstance(file, Path) else file.read()
    except FileNotFoundError:
        raise BadAudio(file, "missing", "does not exist; prepare the data set again") from None
    return {_ending(clip.path): data, "json": clip.model_dump_json().encode()}


def _ending(path: str) -> str:
    """What follows the last dot, as far as it is letters and digits; WebDataset tells members by it."""
    found = re.search(r"\.([A-Za-z0-9]{1,8})$", path)
    return found[1].lower() if found and found[1].lower() != "json" else "audio"


def _moved(record: Record, moved: Mapping[str, str]) -> dict[str, Any]:
    row = record.model_dump(mode="json")
    for part in (row, *row.get("turns", ())):
        if "audios" in part:
            part["audios"] = [moved[path] for path in part["audios"]]
    return row


def _moved_plain(path: Path, moved: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Rows with an `audio`; quarantined ones, which have none, as they are."""
    if path.exists():
        with path.open(encoding="utf-8") as file:
            for row in map(json.loads, file):
                yield {**row, "audio": moved[row["audio"]]} if "audio" in row else row

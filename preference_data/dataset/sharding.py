"""A dataset -> the same dataset with its audio in tar shards, as WebDataset lays them out.

For file systems on which a million small files are slow. The audio's bytes stay what they are.
"""

from __future__ import annotations

import re
from pathlib import Path

from preference_data import store
from preference_data.audio.clip_files import BadAudio
from preference_data.audio.tar_shards import write_shards
from preference_data.dataset.dataset import (
    QUARANTINE,
    RECOGNITION,
    TABLES,
    Dataset,
    Row,
    describe,
    read_rows,
    replacing_dataset,
    with_paths,
)
from preference_data.dataset.manifest import open_manifest
from preference_data.schema import AudioClip

_SHARDS = "shards"


def shard(folder: Path, out: Path, *, max_bytes: int = 1 << 28) -> Row:
    """Write `out/shards/*.tar` and records that refer to them; keeps some 300 bytes a clip in memory.

    Args:
        folder: a dataset.
        out: the new one, which can move as a whole; an earlier one is replaced.
        max_bytes: a shard that has reached this size is closed.

    Returns:
        The description of the new dataset.

    Raises:
        BadDataset: `out` is something else, or `folder` has no clips.
        BadAudio: a clip is not there.
    """
    dataset = Dataset(folder)
    with replacing_dataset(out, folder) as partial:
        clips = dataset.table(AudioClip)
        samples = ((f"{number:09d}", _members(dataset, clip)) for number, clip in enumerate(clips))
        written = write_shards(partial / _SHARDS, samples, max_bytes=max_bytes)
        moved = {
            clip.path: f"{name}/{key}.{_ending(clip.path)}"
            for (key, name), clip in zip(written, clips, strict=True)
        }
        for kind, table in TABLES.items():
            if path := dataset.path_of(kind):
                rows = (record.model_dump(mode="json") for record in open_manifest(path, kind))
                renamed = (with_paths(row, moved.__getitem__) for row in rows)
                store.write_rows(partial / f"{table}.jsonl", renamed)
        for name in RECOGNITION.values():
            renamed = (with_paths(row, moved.__getitem__) for row in read_rows(folder / name, "audio"))
            store.write_rows(partial / name, renamed)
        store.write_rows(partial / QUARANTINE, read_rows(folder / QUARANTINE))
        return describe(partial, {**dataset.about, "root": _SHARDS})


def _members(dataset: Dataset, clip: AudioClip) -> dict[str, bytes]:
    """A clip's members: the file as it is, and what is known of it for other readers of such shards."""
    file = dataset.find(clip.path)
    try:
        data = file.read_bytes() if isinstance(file, Path) else file.read()
    except FileNotFoundError:
        raise BadAudio(file, "missing", "does not exist; prepare the dataset again") from None
    return {_ending(clip.path): data, "json": clip.model_dump_json().encode()}


def _ending(path: str) -> str:
    """The letters and digits after the last dot; WebDataset distinguishes members by them."""
    match = re.search(r"\.([A-Za-z0-9]{1,8})$", path)
    return match[1].lower() if match and match[1].lower() != "json" else "audio"

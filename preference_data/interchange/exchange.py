"""Files of preference pairs and chats in and out, with their audio. Rows are `convert`'s business."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

from preference_data import store
from preference_data.audio import decode
from preference_data.audio.clip_files import BadAudio, resolve_inside
from preference_data.audio.decode import AudioInfo
from preference_data.dataset.dataset import (
    QUARANTINE,
    Dataset,
    RecordWriter,
    describe,
    is_described,
    replacing_dataset,
    with_paths,
)
from preference_data.interchange.convert import BadRow, Form, chat_row, dataset_info, pair_row, read_row
from preference_data.schema import AudioClip, Axis, Chat, PreferencePair

_MAX_DURATION_S = 30.0  # what Qwen2-Audio hears
_MOST_REFUSED = 20  # rows whose reasons are kept

_Infos = Mapping[str, AudioInfo | BadAudio]


class Exported(NamedTuple):
    """A file of rows that was written."""

    path: Path
    kind: Literal["pairs", "chats"]
    written: int


class Imported(NamedTuple):
    """Counts of what was read; `refused` are the first rows that could not be, with place and reason."""

    pairs: int
    chats: int
    clips: int
    n_refused: int
    refused: list[str]


def write_rows(records: Path, form: Form, corpus: Path, out: Path) -> Exported:
    """Write a file of pairs or chats as others read it: `out/{name}.jsonl`, audio by absolute path.

    Args:
        records: JSON lines of `PreferencePair` or of `Chat`.
        form: whose rows.
        corpus: folder that audio paths are relative to, or a dataset.
        out: also gets `dataset_info.json` for LLaMA-Factory.

    Raises:
        BadRow: a record cannot be written in this format, or a clip is not there.
        BadRecord: a line is neither a pair nor a chat.
    """
    with records.open(encoding="utf-8") as file:
        is_pairs = '"rejected"' in file.readline()
    dataset = Dataset(corpus)
    rows = out / f"{records.stem}.jsonl"
    out.mkdir(parents=True, exist_ok=True)
    written = 0
    with store.replacing(rows) as file:
        for record in store.stream(records, PreferencePair) if is_pairs else store.stream(records, Chat):
            audios = [_file_of(dataset, path, record.id) for path in record.audios]
            row = (
                pair_row(record, audios, form)
                if isinstance(record, PreferencePair)
                else chat_row(record, audios, form)
            )
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            written += 1
    kind: Literal["pairs", "chats"] = "pairs" if is_pairs else "chats"
    if form == "llamafactory":
        entry = dataset_info(f"align_{records.stem}", rows.name, kind)
        known = out / "dataset_info.json"
        entries = json.loads(known.read_text(encoding="utf-8")) if known.exists() else {}
        store.write_text(known, json.dumps({**entries, **entry}, indent=2) + "\n")
    return Exported(rows, kind, written)


def read_rows(
    rows: Path,
    form: Form,
    out: Path,
    *,
    audio_root: Path,
    axis: Axis = "factuality",
    on_checked: Callable[[int, int], object] | None = None,
) -> Imported:
    """Read others' rows into a dataset that a recipe can name as pairs and as corpus.

    `quarantine.jsonl` says which rows were left out and why. The audio is linked to `out/audio/` by its
    sha256, or copied where that cannot be.

    Args:
        rows: JSON lines, or a JSON list.
        form: whose rows.
        out: the dataset; must not be there.
        audio_root: what the rows' audio paths are relative to, and must lie in.
        axis: what pairs are about whose rows do not say.
        on_checked: called with how many clips are checked, and of how many.

    Raises:
        BadRow: the file is not JSON, or none of its rows can be used; with the first reasons.
        BadDataset: `out` is there.
    """
    if is_described(out):
        raise BadRow(f"{out} holds a data set already; name another folder, or remove it first")
    with replacing_dataset(out, audio_root) as partial:
        infos = _checked(_records(rows, form, axis, audio_root), audio_root, on_checked)
        with RecordWriter(partial) as writer:
            refused = _write(writer, _records(rows, form, axis, audio_root), infos, audio_root)
        pairs, chats, clips, n_refused = (
            writer.rows[name] for name in ("pairs.jsonl", "sft.jsonl", "clips.jsonl", QUARANTINE)
        )
        if not pairs + chats:
            raise BadRow(f"{rows}: none of its {n_refused} rows can be used: " + "; ".join(refused[:3]))
        name = re.sub(r"[^A-Za-z0-9_-]", "-", rows.stem).strip("-_")[:64] or "imported"
        counts = {"pairs.jsonl": pairs, "sft.jsonl": chats, "clips.jsonl": clips}
        describe(partial, {"name": name, "root": ".", "records": counts, "quarantined": {"row": n_refused}})
    return Imported(pairs, chats, clips, n_refused, refused)


_Read = tuple[int, "PreferencePair | Chat | BadRow"]
"""Number of a row, and the record that it is."""


def _records(rows: Path, form: Form, axis: Axis, root: Path) -> Iterator[_Read]:
    for number, row in _json(rows):
        try:
            yield number, _renamed(read_row(row, form, axis), lambda path: _below(root, path))
        except BadRow as error:
            yield number, error


def _renamed(record: PreferencePair | Chat, rename: Callable[[str], str]) -> PreferencePair | Chat:
    return type(record).model_validate(with_paths(record.model_dump(), rename))


def _checked(
    records: Iterator[_Read], root: Path, on_checked: Callable[[int, int], object] | None
) -> dict[str, AudioInfo | BadAudio]:
    """Describe every file that the rows name."""
    paths = sorted({path for _, record in records for path in _audios_of(record)})
    infos: dict[str, AudioInfo | BadAudio] = {}
    outcomes = decode.examine(Dataset(root, {}).find, paths, by="header", max_duration_s=_MAX_DURATION_S)
    for path, outcome in zip(paths, outcomes, strict=True):
        infos[path] = outcome
        if on_checked:
            on_checked(len(infos), len(paths))
    return infos


def _json(path: Path) -> Iterator[tuple[int, Any]]:
    """Rows of a JSON list by index from 1, or of JSON lines by line."""
    with path.open(encoding="utf-8-sig") as file:
        try:
            if file.read(4096).lstrip().startswith("["):
                file.seek(0)
                yield from enumerate(json.load(file), start=1)
                return
        except ValueError as error:
            raise BadRow(f"{path}: is not a JSON list: {error}") from error
        file.seek(0)
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    row = json.loads(line.removeprefix("\ufeff"))
                except ValueError as error:
                    raise BadRow(f"{path}:{number}: is not JSON: {error}") from error
                yield number, row


def _below(root: Path, named: str) -> str:
    """A row's path relative to the root; absolute ones must lie in it."""
    if not named.startswith("/"):
        return named
    with suppress(ValueError):
        return Path(named).relative_to(root.absolute()).as_posix()
    raise BadRow(f"audio {named!r} lies outside {root}; name a folder above it by --audio-root")


def _audios_of(record: PreferencePair | Chat | BadRow) -> tuple[str, ...]:
    return () if isinstance(record, BadRow) else record.audios


def _write(writer: RecordWriter, records: Iterator[_Read], infos: _Infos, root: Path) -> list[str]:
    """Write the records whose clips are good, and those clips; returns the first reasons to refuse rows."""
    refused: list[str] = []
    linked: set[str] = set()
    ids: set[str] = set()
    for number, record in records:
        problem = _problem(record, infos, ids)
        if isinstance(record, BadRow) or problem:
            path = "".join(_audios_of(record)[:1])
            row = {"id": f"row-{number}", "path": path, "code": "bad_row", "detail": problem}
            writer.add_row(QUARANTINE, row)
            refused += [f"row {number}: {problem}"] if len(refused) < _MOST_REFUSED else []
            continue
        ids.add(record.id)
        clips = {path: _clip(path, infos[path], record) for path in record.audios}
        for path, clip in clips.items():
            if clip.path not in linked:
                linked.add(clip.path)
                _link(resolve_inside(root, path), writer.folder / clip.path)
                writer.add(clip)
        writer.add(_renamed(record, {path: clip.path for path, clip in clips.items()}.__getitem__))
    return refused


def _problem(record: PreferencePair | Chat | BadRow, infos: _Infos, ids: set[str]) -> str:
    if isinstance(record, BadRow):
        return str(record)
    bad = [info for path in record.audios if isinstance(info := infos[path], BadAudio)]
    if bad:
        return f"audio {bad[0]}"
    return f"id {record.id!r} comes more than once; the first is taken" if record.id in ids else ""


def _clip(path: str, info: AudioInfo | BadAudio, record: PreferencePair | Chat) -> AudioClip:
    assert isinstance(info, AudioInfo), "rows with bad audio are left out before"
    return AudioClip(
        id=f"clip-{info.sha256[:16]}",
        path=f"audio/{info.sha256[:16]}{Path(path).suffix.lower()[:8]}",
        split="preference" if isinstance(record, PreferencePair) else "train",
        duration_s=info.duration_s,
        sha256=info.sha256,
        source="imported",
    )


def _link(file: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(file.resolve(), target)
    except OSError:  # another disk, or a file system without hard links
        shutil.copyfile(file, target)


def _file_of(dataset: Dataset, path: str, record_id: str) -> str:
    try:
        file = dataset.find(path)
    except BadAudio as error:
        raise BadRow(f"record {record_id!r}: {error}") from error
    if not isinstance(file, Path):
        raise BadRow(f"record {record_id!r}: {file} is inside a tar; others read files only, so unpack it")
    if not file.is_file():
        raise BadRow(f"record {record_id!r}: no file {file}; is {dataset.folder} the folder of its corpus?")
    return str(file)

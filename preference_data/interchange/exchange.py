"""Files of preference pairs and chats in and out, with their audio. Rows are `convert`'s business."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

from preference_data import store
from preference_data.audio import decode
from preference_data.audio.clip_paths import ClipRoot
from preference_data.audio.decode import AudioInfo, BadAudio
from preference_data.dataset.dataset_folder import SOURCE, check_out, digest_of, writing
from preference_data.interchange.convert import (
    BadRow,
    Form,
    chat_row,
    dataset_info,
    pair_row,
    read_row,
    with_audios,
)
from preference_data.schema import AudioClip, Axis, Chat, PreferencePair

_MAX_DURATION_S = 30.0  # what Qwen2-Audio hears
_KEPT = 20  # refused rows that are told


class Exported(NamedTuple):
    """What was written."""

    path: Path
    kind: Literal["pairs", "chats"]
    written: int


class Imported(NamedTuple):
    """What was read; `refused` are the first rows that could not be, each with its place and reason."""

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
        corpus: folder that audio paths are relative to; a dataset folder names its root itself.
        out: also gets `dataset_info.json` for LLaMA-Factory.

    Raises:
        BadRow: a record cannot be said in this format, or a clip is not there.
        BadRecord: a line is neither a pair nor a chat.
    """
    with records.open(encoding="utf-8") as file:
        is_pairs = '"rejected"' in file.readline()
    root = ClipRoot(corpus)
    rows = out / f"{records.stem}.jsonl"
    out.mkdir(parents=True, exist_ok=True)
    written = 0
    with store.replacing(rows) as file:
        for record in store.stream(records, PreferencePair) if is_pairs else store.stream(records, Chat):
            audios = [_found(root, path, record.id) for path in record.audios]
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
    """Read others' rows into a folder that a recipe can name as pairs and as corpus.

    Writes pairs.jsonl, sft.jsonl, clips.jsonl and source.json; quarantine.jsonl says which rows were left out
    and why. The audio is linked to `out/audio/` by its sha256, or copied where that cannot be.

    Args:
        rows: JSON lines, or a JSON list.
        form: whose rows.
        out: the folder; an earlier one is replaced.
        audio_root: what the rows' audio paths are relative to, and must lie in.
        axis: what pairs are about whose rows do not say.
        on_checked: told how many clips are checked, and of how many.

    Raises:
        BadRow: the file is no JSON, or none of its rows can be used; with the first reasons.
    """
    check_out(out, audio_root)
    named = sorted(
        {path for _, _, record in _records(rows, form, axis, audio_root) for path in _audios_of(record)}
    )
    infos: dict[str, AudioInfo | BadAudio] = {}
    outcomes = decode.examine(audio_root, named, by="header", max_duration_s=_MAX_DURATION_S)
    for path, outcome in zip(named, outcomes, strict=True):
        infos[path] = outcome
        if on_checked:
            on_checked(len(infos), len(named))
    with writing(out) as partial:
        told = _write(partial, _records(rows, form, axis, audio_root), infos, audio_root)
        if not told.pairs + told.chats:
            raise BadRow(
                f"{rows}: none of its {told.n_refused} rows can be used: " + "; ".join(told.refused[:3])
            )
        about = {
            "name": re.sub(r"[^A-Za-z0-9_-]", "-", rows.stem).strip("-_")[:64] or "imported",
            "root": ".",
            "records": {"pairs.jsonl": told.pairs, "sft.jsonl": told.chats, "clips.jsonl": told.clips},
            "quarantined": {"row": told.n_refused},
            "digest": digest_of(partial, ("clips.jsonl", "pairs.jsonl", "sft.jsonl")),
        }
        store.write_text(partial / SOURCE, json.dumps(about, indent=2, ensure_ascii=False) + "\n")
    return told


_Read = tuple[int, Any, "PreferencePair | Chat | BadRow"]
"""Number of a row, the row, and what it is."""


def _records(rows: Path, form: Form, axis: Axis, root: Path) -> Iterator[_Read]:
    for number, row in _json(rows):
        try:
            record = read_row(row, form, axis)
            yield (
                number,
                row,
                with_audios(record, [_below(root, one) for one in record.audios]),
            )
        except BadRow as error:
            yield number, row, error


def _json(path: Path) -> Iterator[tuple[int, Any]]:
    """Rows of a JSON list by index from 1, or of JSON lines by line."""
    with path.open(encoding="utf-8-sig") as file:
        try:
            if file.read(4096).lstrip().startswith("["):
                file.seek(0)
                yield from enumerate(json.load(file), start=1)
                return
        except ValueError as error:
            raise BadRow(f"{path}: is no JSON list: {error}") from error
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


def _write(
    folder: Path, records: Iterator[_Read], infos: dict[str, AudioInfo | BadAudio], root: Path
) -> Imported:
    """All records whose clips are good, their clips, and the rows that were left out."""
    counts = {"pairs.jsonl": 0, "sft.jsonl": 0, "clips.jsonl": 0, "quarantine.jsonl": 0}
    refused: list[str] = []
    linked: set[str] = set()
    seen: set[str] = set()
    with ExitStack() as open_files:
        names = (*counts, "pretrain.jsonl", "prompts.jsonl")
        files = {name: open_files.enter_context(store.replacing(folder / name)) for name in names}

        def put(name: str, line: str) -> None:
            files[name].write(line + "\n")
            counts[name] += 1

        for number, _, record in records:
            problem = _problem(record, infos, seen)
            if isinstance(record, BadRow) or problem:
                named = _audios_of(record)[:1]
                bad = {"id": f"row-{number}", "path": "".join(named), "code": "bad_row", "detail": problem}
                put("quarantine.jsonl", json.dumps(bad, ensure_ascii=False))
                refused += [f"row {number}: {problem}"] if len(refused) < _KEPT else []
                continue
            seen.add(record.id)
            clips = [_clip(path, infos[path], record) for path in record.audios]
            for path, clip in zip(record.audios, clips, strict=True):
                if clip.path not in linked:
                    linked.add(clip.path)
                    _link(decode.resolve_inside(root, path), folder / clip.path)
                    put("clips.jsonl", clip.model_dump_json())
            placed = with_audios(record, [clip.path for clip in clips])
            name = "pairs.jsonl" if isinstance(record, PreferencePair) else "sft.jsonl"
            put(name, placed.model_dump_json())
    pairs, chats, n_clips, n_refused = counts.values()
    return Imported(pairs, chats, n_clips, n_refused, refused)


def _problem(
    record: PreferencePair | Chat | BadRow, infos: dict[str, AudioInfo | BadAudio], seen: set[str]
) -> str:
    if isinstance(record, BadRow):
        return str(record)
    bad = [info for path in record.audios if isinstance(info := infos[path], BadAudio)]
    if bad:
        return f"audio {bad[0]}"
    return f"id {record.id!r} comes more than once; the first is taken" if record.id in seen else ""


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


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another disk, or a file system without hard links
        shutil.copyfile(source, target)


def _found(root: ClipRoot, path: str, record_id: str) -> str:
    try:
        found = root.find(path)
    except BadAudio as error:
        raise BadRow(f"record {record_id!r}: {error}") from error
    if not isinstance(found, Path):
        raise BadRow(f"record {record_id!r}: {found} is inside a tar; others read files only, so unpack it")
    if not found.is_file():
        raise BadRow(f"record {record_id!r}: no file {found}; is {root.folder} the folder of its corpus?")
    return str(found)

"""Files of rows as others write them: JSON lines, a JSON list, CSV or TSV, Parquet, and Arrow.

A row that cannot be read is an item among the others, so that it ends nothing.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from preference_data.text_files import (
    BadText,
    find_table,
    load_json,
    numbered_lines,
    open_lines,
    open_text,
    parse_json,
    refuse_half_pairs,
)

if TYPE_CHECKING:
    import pyarrow as pa

EMBEDDED = "embedded:"
"""Begins the path of a clip whose bytes came within a row."""
_BATCH = 16
"""Rows of a Parquet or Arrow file decoded at a time: each may hold whole clips."""
_LARGEST_CELL = 1 << 27


class FileRow(NamedTuple):
    """A row of a file: the number of the line where it ends, or its place in a list or table from 1."""

    number: int
    value: Any
    """What the row holds, or a `BadText` that says why it cannot be read."""


def read_rows(path: Path, clips: Path) -> Iterator[FileRow]:
    """The rows of a file in order; clips whose bytes a row holds are written to `clips`.

    Raises:
        BadText: the file is not what its name says: text in another encoding, a damaged list or table.
        OSError: it cannot be opened.
    """
    match path.suffix.lower():
        case ".parquet":
            yield from _batches(path, "a Parquet", _parquet, clips)
        case ".arrow":
            yield from _batches(path, "an Arrow", _arrow, clips)
        case ".csv" | ".tsv":
            yield from _table(path)
        case _:
            try:
                yield from _json(path)
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise BadText(f"{path} is cut off or damaged ({error}); fetch it again") from error


def path_below(root: Path, named: str) -> str:
    """A row's path of a clip relative to the root; absolute ones must lie in it.

    Raises:
        BadText: an absolute one does not.
    """
    if not named.startswith("/"):
        return named
    with suppress(ValueError):
        return Path(named).relative_to(root.absolute()).as_posix()
    raise BadText(
        f"audio {named[:255]!r} lies outside {root}; name a folder above it by --audio-root (in a recipe: "
        "audio_root)"
    )


def _json(path: Path) -> Iterator[FileRow]:
    """One list or object, on one line or on many, or a value a line."""
    lines = numbered_lines(path)
    head = list(islice(lines, 2))
    if head and head[0][1].lstrip()[:1] in (b"[", b"{") and not (len(head) > 1 and _is_json(head[0][1])):
        try:
            with open_lines(path) as file:
                whole = load_json(file.read(), str(path))
        except BadText:  # or a damaged first line
            if head[0][1].lstrip().startswith(b"[") and not any(_is_json(line) for _, line in head[1:]):
                raise
        else:
            for number, row in enumerate(whole if isinstance(whole, list) else [whole], start=1):
                yield FileRow(number, _checked(row))
            return
    for number, line in chain(head, lines):
        try:
            yield FileRow(number, parse_json(line))
        except BadText as error:
            yield FileRow(number, error)


def _is_json(text: bytes) -> bool:
    with suppress(BadText):
        load_json(text)
        return True
    return False


def _checked(row: Any) -> Any:
    """The row, or what is wrong with its strings."""
    try:
        refuse_half_pairs(row)
    except BadText as error:
        return error
    return row


def _table(path: Path) -> Iterator[FileRow]:
    """Rows under a header; lists and objects stand in cells as JSON."""
    csv.field_size_limit(_LARGEST_CELL)
    with open_text(path, errors="surrogateescape") as file:
        table = find_table(file)
        separator = "\t" if path.suffix.lower() == ".tsv" else table.separator
        lines = csv.reader(table.lines, delimiter=separator)
        try:
            names = [name.strip() for name in next(lines, [])]
            "".join(names).encode()
        except (csv.Error, UnicodeEncodeError) as error:
            raise BadText(f"{path}: its header cannot be read ({error}); save it as CSV in UTF-8") from error
        if twice := [name for name in names if names.count(name) > 1]:
            raise BadText(f"{path}: has several columns {twice[0]!r}; keep one")
        while True:
            try:
                if any(cells := next(lines)):
                    yield FileRow(table.skipped + lines.line_num, _row(names, cells))
            except StopIteration:
                return
            except (csv.Error, BadText) as error:
                reason = BadText(f"is not a row of a table: {error}")
                yield FileRow(table.skipped + lines.line_num, reason)


def _row(names: list[str], cells: list[str]) -> dict[str, Any]:
    if len(cells) != len(names):
        raise BadText(f"it has {len(cells)} cells for {len(names)} columns")
    try:
        "".join(cells).encode()
    except UnicodeEncodeError as error:
        raise BadText("it is not UTF-8; convert the file, e.g. iconv -f WINDOWS-1252 -t UTF-8") from error
    return dict(zip(names, map(_cell, cells), strict=True))


def _cell(text: str) -> Any:
    if text.lstrip().startswith(("[", "{")):
        with suppress(BadText):
            return parse_json(text.encode())
    return text or None


def _batches(
    path: Path, kind: str, read: Callable[[Path], Iterator[pa.RecordBatch]], clips: Path
) -> Iterator[FileRow]:
    import pyarrow as pa  # when there is such a file: it takes long to load

    try:
        for number, row in enumerate((row for batch in read(path) for row in batch.to_pylist()), start=1):
            yield FileRow(number, _with_clips_in(clips, row))
    except pa.ArrowException as error:
        raise BadText(f"{path} is not {kind} file, or it is damaged: {error}") from error


def _parquet(path: Path) -> Iterator[pa.RecordBatch]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        yield from file.iter_batches(batch_size=_BATCH, use_threads=False)


def _arrow(path: Path) -> Iterator[pa.RecordBatch]:
    """Of a stream of Arrow's, as `datasets` saves tables."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
        for batch in stream:
            yield from (batch.slice(start, _BATCH) for start in range(0, batch.num_rows, _BATCH))


def _with_clips_in(folder: Path, value: Any) -> Any:
    """The value with the path of a file for bytes, or for {bytes, path} as `datasets` writes a clip."""
    if isinstance(value, bytes):
        return _write(folder, value, "")
    if isinstance(value, dict):
        if isinstance(value.get("bytes"), bytes):
            return _write(folder, value["bytes"], Path(str(value.get("path") or "")).suffix)
        return {key: _with_clips_in(folder, inner) for key, inner in value.items()}
    return [_with_clips_in(folder, inner) for inner in value] if isinstance(value, list) else value


def _write(folder: Path, clip: bytes, suffix: str) -> str:
    name = hashlib.sha256(clip).hexdigest() + (suffix if suffix[1:].isalnum() else "")
    if not (folder / name).exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f".{name}.{os.getpid()}.tmp"
        partial.write_bytes(clip)
        partial.replace(folder / name)
    return EMBEDDED + name

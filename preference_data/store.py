"""Records <-> JSON lines. Writing is atomic: the file is complete or it is not there."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO, TypeVar

from pydantic import BaseModel, ValidationError

from preference_data.schema import Record
from preference_data.text_files import BadText, numbered_lines

R = TypeVar("R", bound=BaseModel)


class BadRecord(ValueError):
    """A line of a record file that is not the record it should be."""

    @classmethod
    def of(cls, error: ValidationError, kind: type[BaseModel], place: str) -> BadRecord:
        """The first problem of a record that stands at `place`."""
        return cls(f"{place}: {kind.__name__}: {problem_of(error)}")


def problem_of(error: ValidationError) -> str:
    """The first problem of a record: field, what is wrong, and the value."""
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"])) or "the line"
    return f"{where}: {first['msg']} (got {str(first['input'])[:80]!r})"


@contextmanager
def replacing(path: Path) -> Iterator[TextIO]:
    """A file to write to that takes the place of `path` in one step, durable once the block has ended.

    If the block fails, `path` is what it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with partial.open("w", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        error.filename = error.filename or str(path)  # of a full disk it says no more than that it is full
        raise
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` in one step, durable once this returns."""
    with replacing(path) as file:
        file.write(text)


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write plain rows as JSON lines, one at a time."""
    with replacing(path) as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write(path: Path, records: Iterable[Record]) -> None:
    """Write records as JSON lines, one at a time."""
    with replacing(path) as file:
        file.writelines(record.model_dump_json() + "\n" for record in records)


def stream(path: Path, kind: type[R]) -> Iterator[R]:
    """Yield the records of a JSON-lines file.

    Raises:
        BadRecord: naming file, line, field and problem of the first bad line.
    """
    try:
        for number, line in numbered_lines(path):
            yield parse(line, kind, f"{path}:{number}")
    except BadText as error:
        raise BadRecord(str(error)) from error


def parse(line: str | bytes, kind: type[R], place: str) -> R:
    """One record from its line.

    Raises:
        BadRecord: naming place, field and problem.
    """
    try:
        return kind.model_validate_json(line)
    except ValidationError as error:
        raise BadRecord.of(error, kind, place) from error


def read(path: Path, kind: type[R]) -> list[R]:
    """All records of a JSON-lines file, see `stream`."""
    return list(stream(path, kind))

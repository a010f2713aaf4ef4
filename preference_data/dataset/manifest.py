"""Rows of a manifest by number, without holding them: JSON lines or Parquet.

Opening a JSON-lines file reads it once to note where every 64th row begins, so a row costs one short read:
8 bytes of memory per 32 rows. A Parquet file knows where its row groups are; the last few used stay
decoded, so its row groups must be small. Rows are validated when they are read.
"""

from __future__ import annotations

import bisect
from abc import abstractmethod
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from pydantic import ValidationError

from preference_data.schema import Record
from preference_data.store import BadRecord, parse
from preference_data.text_files import content, open_lines

if TYPE_CHECKING:
    import pyarrow as pa

R = TypeVar("R", bound=Record)

_STRIDE = 64
_GROUPS = 4
_LARGEST_GROUP = 20_000
"""Rows. A random row costs the decoding of its group: about 20 ms at this size."""


class Manifest(Sequence[R]):
    """The records of a manifest. Can be pickled and used after a fork; holds no file position."""

    path: Path

    def __getitem__(self, number: int) -> R:  # type: ignore[override]  # no slices: see `Selection`
        """Record `number`.

        Raises:
            BadRecord: it is not what it should be; with file, row, field and problem.
        """
        return self._read(range(len(self))[number])

    @abstractmethod
    def _read(self, number: int) -> R: ...


class Selection(Sequence[R]):
    """Some of the records of a manifest, by their numbers; reads what it is asked for."""

    def __init__(self, records: Sequence[R], numbers: range | np.ndarray) -> None:
        self._records, self._numbers = records, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, number: int) -> R:  # type: ignore[override]  # no slices
        return self._records[int(self._numbers[number])]


def open_manifest(path: Path, kind: type[R]) -> Manifest[R]:
    """The rows of `path` (.jsonl or .parquet) as records of `kind`.

    Raises:
        FileNotFoundError: there is no such file.
        BadRecord: it is not a Parquet file, or its row groups are too large to read single rows from.
    """
    return _Parquet(path, kind) if path.suffix == ".parquet" else _JsonLines(path, kind)


class _JsonLines(Manifest[R]):
    """Every 64th row's offset and line; blank lines do not count."""

    def __init__(self, path: Path, kind: type[R]) -> None:
        self.path, self.kind = path, kind
        self._offsets, self._lines = array("Q"), array("Q")
        self._rows = 0
        with open_lines(path) as file:
            at = file.tell()
            for number, line in enumerate(file, start=1):
                if content(line):
                    if self._rows % _STRIDE == 0:
                        self._offsets.append(at)
                        self._lines.append(number)
                    self._rows += 1
                at += len(line)

    def __len__(self) -> int:
        return self._rows

    def _read(self, number: int) -> R:
        return next(self._from(number))

    def __iter__(self) -> Iterator[R]:
        return self._from(0) if self._rows else iter(())

    def _from(self, number: int) -> Iterator[R]:
        """Records from `number` on, in one pass."""
        stride, left = divmod(number, _STRIDE)
        with self.path.open("rb") as file:
            file.seek(self._offsets[stride])
            for at, line in enumerate(file, start=self._lines[stride]):
                if not (text := content(line)):
                    continue
                if left:
                    left -= 1
                    continue
                yield parse(text, self.kind, f"{self.path}:{at}")


class _Parquet(Manifest[R]):
    """Columns are the record's fields; nulls stand for fields that are not given."""

    def __init__(self, path: Path, kind: type[R]) -> None:
        import pyarrow as pa  # when there is such a file: it takes long to load
        import pyarrow.parquet as pq

        self.path, self.kind = path, kind
        try:
            meta = pq.read_metadata(path)
        except pa.ArrowInvalid as error:
            raise BadRecord(f"{path} is not a Parquet file, or it is cut off: {error}") from error
        sizes = [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]
        if max(sizes, default=0) > _LARGEST_GROUP:
            raise BadRecord(
                f"{path} has a row group of {max(sizes)} rows, too many to read single rows from; write it "
                "again with smaller ones, e.g. pyarrow.parquet.write_table(table, path, row_group_size=1000)"
            )
        self._starts = [0, *accumulate(sizes)]
        self._groups: OrderedDict[int, pa.Table] = OrderedDict()

    def __len__(self) -> int:
        return self._starts[-1]

    def _read(self, number: int) -> R:
        group = bisect.bisect_right(self._starts, number) - 1
        row = self._group(group).slice(number - self._starts[group], 1).to_pylist()[0]
        try:
            return self.kind.model_validate(_without_nulls(row))
        except ValidationError as error:
            raise BadRecord.of(error, self.kind, f"{self.path} row {number}") from error

    def _group(self, group: int) -> pa.Table:
        if group not in self._groups:
            import pyarrow.parquet as pq

            with pq.ParquetFile(self.path) as file:
                self._groups[group] = file.read_row_group(group, use_threads=False)
            if len(self._groups) > _GROUPS:
                self._groups.popitem(last=False)
        self._groups.move_to_end(group)
        return self._groups[group]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_groups": OrderedDict()}


def _without_nulls(value: Any) -> Any:
    """Arrow gives every row every field; what a record was not given is null there."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value

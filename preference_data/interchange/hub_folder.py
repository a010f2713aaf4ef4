"""Preference pairs, labels or chats -> a folder that is a dataset of the Hugging Face Hub, audio inside.

    README.md       the card: licences, how annotators agreed, by which rules the rows were chosen
    data/train-*    Parquet in TRL's conversational form, clips as `datasets` stores them, licences per clip

`datasets.load_dataset(FOLDER)` reads it, and `hf upload NAME FOLDER --repo-type dataset` publishes it. No row
names a path outside.
"""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import yaml

from preference_data import store
from preference_data.dataset.dataset import Dataset
from preference_data.dataset.licences import plain
from preference_data.interchange.columns import BadRow
from preference_data.interchange.convert import Kind, write_row
from preference_data.interchange.exchange import (
    KINDS,
    Exported,
    Usable,
    bytes_of,
    kind_of,
    refuse_nothing,
    usable,
)
from preference_data.schema import PreferencePair

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

Row = dict[str, Any]

_ROWS, _GROUP_BYTES = 100, 64 << 20
"""A row group has at most so many rows, and is closed once it has so many bytes of audio."""
_SHARD_BYTES = 500 << 20
_HUB_LICENCES = re.compile(
    r"cc0-1\.0|cc-by(-nc)?(-sa|-nd)?-[1-4]\.[05]|mit|apache-2\.0|odc-by|odbl|pddl|cdla-(permissive|sharing)-[12]\.0"
)
"""Licences that the Hub knows by these names."""
_SIZES = (("n<1K", 10**3), ("1K<n<10K", 10**4), ("10K<n<100K", 10**5), ("100K<n<1M", 10**6))
_WHAT: dict[Kind, str] = {
    "pairs": "preference pairs: a prompt, the chosen and the rejected completion",
    "labels": "completions, each with a label: is it desirable?",
    "chats": "chats about audio",
}
_COLUMNS: dict[Kind, str] = {
    "pairs": "`prompt`, `chosen`, `rejected`",
    "labels": "`prompt`, `completion`, `label`, `weight`",
    "chats": "`messages`",
}


def write(
    records: Path, corpus: Path, out: Path, *, licences: Collection[str] = (), history: Sequence[str] = ()
) -> Exported:
    """Write `out`, which must not be there.

    Args:
        records: JSON lines of `PreferencePair`, of `Label` or of `Chat`.
        corpus: folder that audio paths are relative to, or a dataset.
        out: the new folder.
        licences: records about clips with others, or with none, are left out; empty: none is.
        history: paragraphs of Markdown for the card: who judged and how far they agreed, which rules chose.

    Raises:
        BadRow: none of the records can be written, or `out` is there.
        BadText: the file is not JSON lines in UTF-8.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BadRow(f"{out} is there and is not empty; name a new folder")
    kind, dataset, refused = kind_of(records), Dataset(corpus), list[str]()
    name, partial = KINDS[kind], out.with_name(f".partial-{out.name}")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "data").mkdir(parents=True)
    try:
        with _Shards(partial / "data", _features(name)) as shards:
            counts = _Counts()
            for item in usable(records, kind, dataset, licences, refused):
                try:
                    shards.add(_row(item))
                except BadRow as error:
                    refused.append(f"{item.place}: record {item.record.id!r}: {error}")
                else:
                    counts.add(item)
        refuse_nothing(records, shards.written, refused)
        store.write_text(
            partial / "README.md", _card(records, name, shards.written, counts, len(refused), history)
        )
        with suppress(FileNotFoundError):
            out.rmdir()  # it is empty
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Exported(out, name, shards.written, refused)


def _row(item: Usable) -> Row:
    """TRL's row with the clips themselves."""
    contents = [bytes_of(clip) for clip in item.clips]
    names = [f"audio/{PurePosixPath(path).name}" for path in item.record.audios]
    clips = [{"bytes": data, "path": name} for data, name in zip(contents, names, strict=True)]
    return {**write_row(item.record, names, "trl"), "audios": clips, "licences": item.licences}


def _features(kind: Kind) -> datasets.Features:
    from datasets import Audio, Features, List, Value  # takes a second

    text = Value("string")
    messages = List({"role": text, "content": List({"type": text, "text": text})})
    columns: dict[Kind, dict[str, Any]] = {
        "pairs": {
            **{"prompt": messages, "chosen": messages, "rejected": messages},
            **{"prompt_id": text, "axis": text, "agreement": Value("float64")},
        },
        "labels": {
            **{"prompt": messages, "completion": messages, "label": Value("bool")},
            **{"prompt_id": text, "weight": Value("float64"), "source": text},
        },
        "chats": {"messages": messages},
    }
    return Features({**columns[kind], "audios": List(Audio()), "licences": List(text), "id": text})


class _Shards:
    """Parquet files of rows with audio, of about `_SHARD_BYTES` each; few rows are in memory at a time."""

    def __init__(self, folder: Path, features: datasets.Features) -> None:
        self._folder, self._schema = folder, features.arrow_schema
        self._rows: list[Row] = []
        self._bytes_in_rows = self._bytes_in_shard = 0
        self._files: list[Path] = []
        self._writer: Any = None
        self.written = 0

    def __enter__(self) -> _Shards:
        return self

    def add(self, row: Row) -> None:
        """Write a row, soon."""
        self._rows.append(row)
        self._bytes_in_rows += sum(len(clip["bytes"]) for clip in row["audios"])
        self.written += 1
        if len(self._rows) == _ROWS or self._bytes_in_rows >= _GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        if self._writer is None:
            self._files.append(self._folder / f"{len(self._files)}.parquet")
            self._writer = pq.ParquetWriter(self._files[-1], self._schema)
        table: pa.Table = pa.Table.from_pylist(self._rows, schema=self._schema)
        self._writer.write_table(table)
        self._bytes_in_shard += self._bytes_in_rows
        self._rows, self._bytes_in_rows = [], 0
        if self._bytes_in_shard >= _SHARD_BYTES:
            self._close()

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer, self._bytes_in_shard = None, 0

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self._rows:
            self._flush()
        self._close()
        for number, file in enumerate(self._files):
            file.rename(self._folder / f"train-{number:05d}-of-{len(self._files):05d}.parquet")


class _Counts:
    """What the card says of all rows."""

    def __init__(self) -> None:
        self.licences: Counter[str] = Counter()
        self.agreement: list[float] = []
        self.axes: Counter[str] = Counter()
        self._seen: set[str] = set()

    def add(self, item: Usable) -> None:
        for path, licence in zip(item.record.audios, item.licences, strict=True):
            if path not in self._seen:
                self._seen.add(path)
                self.licences[licence or "unknown"] += 1
        if isinstance(item.record, PreferencePair):
            self.agreement.append(item.record.agreement)
            self.axes[item.record.axis] += 1


def _card(records: Path, kind: Kind, n: int, counts: _Counts, n_refused: int, history: Sequence[str]) -> str:
    licences = sorted({plain(name) for name in counts.licences})
    known = len(licences) == 1 and _HUB_LICENCES.fullmatch(licences[0])
    head = {
        "license": licences[0] if known else "other" if counts.licences.keys() != {"unknown"} else "unknown",
        "task_categories": ["audio-text-to-text"],
        "tags": ["audio", "trl", {"pairs": "dpo", "labels": "kto", "chats": "sft"}[kind]],
        "size_categories": [next((name for name, limit in _SIZES if n < limit), "n>1M")],
        "configs": [
            {"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*.parquet"}]}
        ],
    }
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {records.stem.replace('_', ' ').capitalize()} about {counts.licences.total():,} clips",
        f'{n:,} {_WHAT[kind]}. Clips are inside, the first `{{"type": "audio"}}` of a prompt stands for the '
        f"first of `audios`. Columns: {_COLUMNS[kind]} in TRL's conversational form, `audios`, `licences` "
        "(one per clip, in order), `id` and what else is known of a row.",
        '```python\nfrom datasets import load_dataset\n\nrows = load_dataset(FOLDER, split="train")\n```',
        "## Licences",
        "| licence | clips |\n| --- | --- |\n"
        + "\n".join(f"| {_cell(name)} | {n:,} |" for name, n in counts.licences.most_common()),
        'To keep some alone: `rows.filter(lambda own: set(own) <= {"CC-BY-4.0"}, input_columns="licences")`.',
        "## Where the preferences come from",
        *(history or ["Nothing is recorded of who judged, and by which rules."]),
        *_agreement(counts),
        *(
            [f"{n_refused:,} records were left out: for their licence, or what could not be written."]
            * (n_refused > 0)
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _agreement(counts: _Counts) -> Iterator[str]:
    """How many annotators agreed, as the pairs say."""
    if counts.agreement:
        whole = sum(value == 1 for value in counts.agreement) / len(counts.agreement)
        axes = ", ".join(f"{axis} {n:,}" for axis, n in counts.axes.most_common())
        mean = sum(counts.agreement) / len(counts.agreement)
        yield (
            f"The chosen completion is better at: {axes}. `agreement` is the share of annotators who say so, "
            f"{mean:.2f} on average; in {whole:.0%} of the pairs nobody disagrees, which says nothing of a "
            "single annotator or of a reward."
        )


def _cell(text: str) -> str:
    """Text of others within a table or a line."""
    return re.sub(r"[|\r\n<>`]+", " ", text)[:300]

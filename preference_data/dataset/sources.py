"""The data sets that a corpus is made of, each with its share of what is trained on.

A corpus of one data set needs no file for that. A mixed one has `sources.json` beside its records, whose rows
stand source after source in every file:

    {"temperature": 2.0, "sources": [{"name": "librispeech", "root": "/data/librispeech", "share": null,
                                      "rows": {"clips": 281241, "pretrain": 281241, "sft": 0, ...}}, ...]}
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, TypeVar

from preference_data.audio.clip_paths import SOURCES
from preference_data.dataset.manifest import Manifest, open_manifest
from preference_data.dataset.mixing import mixing_shares
from preference_data.schema import Record

R = TypeVar("R", bound=Record)
Table = Literal["clips", "pretrain", "sft", "prompts"]
TABLES: tuple[Table, ...] = ("clips", "pretrain", "sft", "prompts")
"""Record files of a corpus, `<table>.jsonl` or `<table>.parquet`."""


class Source(NamedTuple, Generic[R]):
    """The records of one data set, and the share of the draws that they get."""

    name: str
    records: Sequence[R]
    share: float


def table_path(folder: Path, name: Table) -> Path | None:
    """The file of a table, if the folder has it.

    Raises:
        ValueError: it is there twice.
    """
    found = [path for path in (folder / f"{name}.jsonl", folder / f"{name}.parquet") if path.exists()]
    if len(found) > 1:
        raise ValueError(f"{folder} holds both {found[0].name} and {found[1].name}; remove one")
    return found[0] if found else None


def table(corpus: Path, name: Table, kind: type[R]) -> Manifest[R]:
    """All rows of a table of a corpus, data set after data set.

    Raises:
        ValueError: there are none.
    """
    path = table_path(corpus, name)
    records = open_manifest(path, kind) if path else None
    if not records:
        raise ValueError(f"{corpus} has no rows in {name}.jsonl: nothing of this kind to train on")
    return records


def sources(corpus: Path, name: Table, kind: type[R]) -> list[Source[R]]:
    """The data sets of a corpus that have rows in a table; their shares sum to 1.

    Raises:
        ValueError: there are no rows, or another number than `sources.json` says.
    """
    records = table(corpus, name, kind)
    listed = corpus / SOURCES
    if not listed.exists():
        return [Source("", records, 1.0)]
    mixed: dict[str, Any] = json.loads(listed.read_text(encoding="utf-8"))
    sizes = [source["rows"][name] for source in mixed["sources"]]
    if sum(sizes) != len(records):
        raise ValueError(
            f"{records.path} has {len(records)} rows, {listed} says {sum(sizes)}; make the corpus again"
        )
    shares = mixing_shares(sizes, [source["share"] for source in mixed["sources"]], mixed["temperature"])
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [
        Source(source["name"], records[start : start + size], share)
        for source, start, size, share in zip(mixed["sources"], starts, sizes, shares, strict=True)
        if size
    ]

"""Published numbers of Qwen-Audio, Qwen2-Audio, AIR-Bench and others, as reference rows beside ours."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from align.evaluation.benchmarks.air_bench import COLUMNS


class BenchmarkRow(NamedTuple):
    """One policy's number on one benchmark, in the units of `tasks.score`."""

    benchmark: str
    metric: str
    policy: str
    source: str
    value: float
    unit: str
    """The unit in which errors are counted: word or character."""


def air_bench_chat() -> list[dict[str, Any]]:
    """AIR-Bench chat as published, from strongest to weakest: policy, source, the four columns, overall.

    Scores are 1..10; `overall` is the mean of the columns, which printed averages are not always.
    """
    rows = _rows("air_bench_chat")
    for row in rows:
        row["overall"] = sum(row[name] for name in COLUMNS) / len(COLUMNS)
    return sorted(rows, key=lambda row: -row["overall"])


def air_bench_foundation() -> list[dict[str, Any]]:
    """AIR-Bench foundation as published: policy, source, speech, sound, music, average; shares 0..1."""
    return _rows("air_bench_foundation")


def multiple_choice(kind: str) -> list[dict[str, Any]]:
    """A benchmark of `multiple_choice` as published: policy, source (with the harness), accuracy (0..1)."""
    return [
        {name: value for name, value in row.items() if name != "benchmark"}
        for row in _rows("multiple_choice")
        if row["benchmark"] == kind
    ]


def as_line(row: Mapping[str, Any]) -> str:
    """A row of such a table for the terminal."""
    numbers = "  ".join(f"{name} {value:.3g}" for name, value in row.items() if isinstance(value, float))
    return f"published: {row['policy']}  {numbers}  ({row['source']})"


def benchmarks() -> list[BenchmarkRow]:
    """The other benchmarks of both reports."""
    sources = _load()["sources"]
    return [
        BenchmarkRow(
            row["benchmark"], row["metric"], policy, sources[policy], row[policy], row.get("unit", "word")
        )
        for row in _load()["benchmarks"]
        for policy in ("qwen_audio", "qwen2_audio", "qwen2_audio_hf")
        if policy in row
    ]


def beside(source: str, numbers: Mapping[str, Any], split: str = "test") -> list[BenchmarkRow]:
    """The published rows for a source, in the metrics that `numbers` has.

    Args:
        source: that of the reports' rows (`covost2_en_de_test`), or a corpus' own, where a mixture has put
            the data set's name before it (`librispeech/librispeech_test_clean`).
        numbers: as `tasks.score` gives them for it.
        split: that of a corpus' own rows. Only a name that says dev is published for dev.
    """
    name = source.rpartition("/")[2]
    if split != "test" and split not in name.split("_"):
        return []
    unit = numbers.get("unit", "word")
    return [
        row
        for row in benchmarks()
        if row.benchmark in (name, name.removesuffix("_test"))
        and row.metric in numbers
        and (row.metric != "wer" or row.unit == unit)
    ]


def warnings() -> list[str]:
    """The warnings that belong beside these rows on every page."""
    data = _load()
    return [data["warning"], *data["air_bench_chat"]["notes"]]


def _rows(table: str) -> list[dict[str, Any]]:
    sources = _load()["sources"]
    return [{**row, "source": sources[row["source"]]} for row in _load()[table]["rows"]]


@cache
def _load() -> dict[str, Any]:
    path = Path(__file__).with_name("published.yaml")
    data: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return data

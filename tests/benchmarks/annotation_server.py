"""How fast the annotation server is with many records. For a person to run; pytest does not.

    python -m tests.benchmarks.annotation_server [--records 10000]

Starts a server with a new home, measures over HTTP as an annotator sees it, prints a table, and removes it
all again.
"""

from __future__ import annotations

import argparse
import itertools
import platform
import random
import sqlite3
import statistics
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import argilla as rg
import httpx
import psutil

from ui_annotation import client, launch, render
from ui_annotation.environment import ARGILLA

ANNOTATOR = "annotator-1"
REPEATS = 40
ANSWERS = 200
WORDS = (
    "piano violin siren rain engine dog bark laughter speech train kettle door crowd birds ocean wind".split()
)
PENDING = {"type": "terms", "scope": {"entity": "response", "property": "status"}, "values": ["pending"]}
TASK = {"entity": "metadata", "metadata_property": "task"}
ASR = {"type": "terms", "scope": TASK, "values": ["asr"]}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", type=int, default=10_000)
    count = parser.parse_args().records
    if not ARGILLA.is_ready:
        ARGILLA.install(print)
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "home"
        started = time.perf_counter()
        server = launch.start(home, users=(ANNOTATOR,))
        rows = [("start, new home", f"{time.perf_counter() - started:.1f} s")]
        try:
            rows += measure(server, home, count)
        finally:
            launch.stop(home)
    print(
        f"\n{count} records; {platform.platform()}; Python {platform.python_version()}; SQLite "
        f"{sqlite3.sqlite_version}; argilla {version('argilla')}; {psutil.cpu_count()} cores, "
        f"load {psutil.getloadavg()[0]:.1f}\n"
    )
    for name, figure in rows:
        print(f"{name:<38}{figure}")


def measure(server: launch.Running, home: Path, count: int) -> Iterator[tuple[str, str]]:
    """Log, search, answer and pull: rows of the table."""
    keys = {name: who["api_key"] for name, who in launch.credentials(home)["users"].items()}
    dataset = make_dataset(client.connect(server.url, keys["owner"]))
    annotator = httpx.Client(
        base_url=f"{server.url}/api/v1", headers={"X-Argilla-Api-Key": keys[ANNOTATOR]}, timeout=120
    )
    logged = seconds(lambda: dataset.records.log(records(count), batch_size=500))
    yield "log", f"{logged:.1f} s, {count / logged:.0f} records/s"

    def search(limit: int = 10, offset: int = 0, **body: Any) -> Any:
        page = {"limit": limit, "offset": offset}
        path = f"/me/datasets/{dataset.id}/records/search"
        return annotator.post(path, params=page, json=body).raise_for_status().json()

    def get(path: str) -> Any:
        return annotator.get(path).raise_for_status().json()

    def text(words: str) -> dict[str, Any]:
        return {"text": {"q": words}}

    queue = {"filters": {"and": [PENDING]}}
    ids = iter([item["record"]["id"] for item in search(limit=ANSWERS, **queue)["items"]])

    def submit() -> None:
        answer = {"values": {"choice": {"value": "a"}}, "status": "submitted"}
        annotator.post(f"/records/{next(ids)}/responses", json=answer).raise_for_status()

    yield "submit", spread(submit, min(ANSWERS, count))
    yield "queue page (pending, 10)", spread(lambda: search(**queue))
    yield "queue page, far in", spread(lambda: search(offset=count * 4 // 5, **queue))
    yield "text: one word", spread(lambda: search(query=text("kettle")))
    yield "text: phrase, without, pending", spread(lambda: search(query=text('"dog bark" -rain'), **queue))
    yield "filter: metadata, pending", spread(lambda: search(filters={"and": [PENDING, ASR]}))
    yield "sort: metadata", spread(lambda: search(sort=[{"scope": TASK, "order": "desc"}]))
    yield "progress", spread(lambda: get(f"/datasets/{dataset.id}/progress"))
    yield "own metrics", spread(lambda: get(f"/me/datasets/{dataset.id}/metrics"))
    found = []
    pulled = seconds(lambda: found.extend(dataset.records(with_responses=True)))
    yield f"pull of all {len(found)}", f"{pulled:.1f} s"
    yield "memory of the server (RSS)", f"{psutil.Process(server.pid).memory_info().rss / 2**20:.0f} MiB"
    yield "database", f"{(home / 'argilla.db').stat().st_size / 2**20:.0f} MiB"


def make_dataset(owner: rg.Argilla) -> rg.Dataset:
    """Fields as annotators get them, one question, one number to filter by."""
    fields = ("audio", "prompt", "response_a", "response_b")
    settings = rg.Settings(
        fields=[rg.TextField(name, use_markdown=True) for name in fields],
        questions=[rg.LabelQuestion("choice", labels=["a", "b", "tie"])],
        metadata=[rg.TermsMetadataProperty("task")],
        distribution=rg.TaskDistribution(min_submitted=2),
    )
    return rg.Dataset(
        f"benchmark-{uuid.uuid4()}", workspace="audio", settings=settings, client=owner
    ).create()


def records(count: int) -> list[rg.Record]:
    """Records of seeded words."""
    draw = random.Random(0)

    def sentence(words: int) -> str:
        return render.verbatim(" ".join(draw.choices(WORDS, k=words)) + ".")

    return [
        rg.Record(
            id=f"r{i}",
            fields={
                "audio": render.players([(f"/media/audio/{i:064x}.wav", 12.5)]),
                "prompt": render.verbatim(f"What do you hear in clip {i}?"),
                "response_a": sentence(25),
                "response_b": sentence(25),
            },
            metadata={"task": draw.choice(["asr", "aqa"])},
        )
        for i in range(count)
    ]


def seconds(call: Callable[[], object]) -> float:
    """How long a call takes."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def spread(call: Callable[[], object], repeats: int = REPEATS) -> str:
    """Median and 95th percentile of a call's duration."""
    took = sorted(1000 * seconds(call) for _ in itertools.repeat(None, repeats))
    return f"{statistics.median(took):6.0f} ms median {took[int(0.95 * (repeats - 1))]:6.0f} ms p95"


if __name__ == "__main__":
    main()

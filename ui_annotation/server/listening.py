"""Which bytes of a clip were sent to whom, and how much of it they played: a SQLite file beside Argilla's.

How much was played is a claim by a script in the browser, so no more of it counts than was sent.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

_TABLES = """
CREATE TABLE IF NOT EXISTS heard (
    workspace TEXT, annotator TEXT, clip TEXT, share REAL, at TEXT,
    PRIMARY KEY (workspace, annotator, clip, share)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS sent (
    workspace TEXT, annotator TEXT, clip TEXT, start INTEGER, stop INTEGER, at TEXT
);
CREATE INDEX IF NOT EXISTS sent_of ON sent (workspace, annotator, clip);
"""
_PLAYED = """
INSERT INTO heard SELECT ?1, ?2, ?3, ?4, ?5 WHERE ?4 > coalesce((
    SELECT max(share) FROM heard WHERE workspace = ?1 AND annotator = ?2 AND clip = ?3
), -1)
"""
_HEARD = """
SELECT annotator, clip, share, at, (
    SELECT min(at) FROM sent
    WHERE sent.workspace = heard.workspace AND sent.annotator = heard.annotator AND sent.clip = heard.clip
) AS since
FROM heard WHERE workspace = ? ORDER BY annotator, clip, share
"""
_SENT = "SELECT start, stop FROM sent WHERE workspace = ? AND annotator = ? AND clip = ?"

T = TypeVar("T")
Key = tuple[str, str, str]
"""Workspace, annotator, sha256 of a clip."""


@dataclass
class Transfer:
    """An answer that is being sent; `stop` moves on with what has left."""

    key: Key
    start: int
    stop: int
    row: int
    """Of the table `sent`."""


class Listening:
    """The store. One connection in one thread: writes queue there, never in the event loop."""

    def __init__(self, file: Path) -> None:
        """Open `file`, or make it; its folder must exist."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="listening")
        self._db = self._thread.submit(_open, file).result()
        self._transfers: list[Transfer] = []

    async def begin(self, key: Key, start: int) -> Transfer:
        """Count an answer from its first byte on: browsers leave that of a long clip open while it plays."""
        values = (*key, start, start, _now())
        insert = "INSERT INTO sent VALUES (?, ?, ?, ?, ?, ?)"
        row = await self._do(lambda: self._db.execute(insert, values).lastrowid)
        transfer = Transfer(key, start, start, row or 0)
        self._transfers.append(transfer)
        return transfer

    async def end(self, transfer: Transfer) -> None:
        """Keep what was sent of an answer that ended."""
        values, update = (transfer.stop, transfer.row), "UPDATE sent SET stop = ? WHERE rowid = ?"
        await self._do(lambda: self._db.execute(update, values))
        self._transfers.remove(transfer)

    async def played(self, key: Key, share: float, size: int) -> None:
        """Keep `share` (0 to 1), if it is more than this annotator had played of the clip before.

        Args:
            key: What the annotator says to have played.
            share: Of the clip; no more than the share of its bytes that were sent to the annotator.
            size: Of the clip, in bytes.
        """
        parts = [(item.start, item.stop) for item in self._transfers if item.key == key]
        parts += await self._do(lambda: self._db.execute(_SENT, key).fetchall())
        share = min(share, _length(parts) / size) if size else 0.0
        row = (*key, share, _now())
        await self._do(lambda: self._db.execute(_PLAYED, row))

    async def heard(self, workspace: str) -> list[dict[str, str | float | None]]:
        """Shares that were played in a workspace, each more than before, by annotator and clip.

        Every step up is kept: who heard most of a clip, judged, and played it to its end later, had heard it.
        `at` says when it was reached, and `since` when the clip was first sent to the annotator.
        """
        rows = await self._do(lambda: self._db.execute(_HEARD, (workspace,)).fetchall())
        return [dict(zip(("annotator", "clip", "share", "at", "since"), row, strict=True)) for row in rows]

    async def _do(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


def _length(parts: Iterable[tuple[int, int]]) -> int:
    """How many bytes there are in the union of parts."""
    length = end = 0
    for start, stop in sorted(parts):
        length += max(0, stop - max(start, end))
        end = max(end, stop)
    return length


def _open(file: Path) -> sqlite3.Connection:
    file.touch(mode=0o600)  # sqlite would make it as readable as the umask allows
    db = sqlite3.connect(file, isolation_level=None, timeout=30)  # every statement is its own transaction
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = NORMAL")
    db.executescript(_TABLES)
    return db


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")

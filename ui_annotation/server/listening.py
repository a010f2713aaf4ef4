"""Who has listened to what: a SQLite file beside Argilla's.

What was played is a claim by a script in the browser. No more of it counts than was sent of the clip to this
annotator, and than there was time to play since, at `FASTEST`.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeVar

FASTEST = 2.0
"""Of the normal speed: what the browsers' players offer, and listening.js lets them have, at most."""

_TABLES = """
CREATE TABLE IF NOT EXISTS heard (
    workspace TEXT, annotator TEXT, clip TEXT, share REAL, at TEXT,
    PRIMARY KEY (workspace, annotator, clip, share)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS played (
    workspace TEXT, annotator TEXT, clip TEXT, start REAL, stop REAL,
    PRIMARY KEY (workspace, annotator, clip, start)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS sent (
    workspace TEXT, annotator TEXT, clip TEXT, start INTEGER, stop INTEGER, at TEXT
);
CREATE INDEX IF NOT EXISTS sent_of ON sent (workspace, annotator, clip);
"""
_OF_KEY = "WHERE workspace = ?1 AND annotator = ?2 AND clip = ?3"
_PLAY = """
INSERT INTO played VALUES (?1, ?2, ?3, ?4, ?5)
ON CONFLICT DO UPDATE SET stop = max(stop, excluded.stop)
"""
_HEAR = f"""
INSERT INTO heard SELECT ?1, ?2, ?3, ?4, ?5
WHERE ?4 > coalesce((SELECT max(share) FROM heard {_OF_KEY}), -1)
"""
_HEARD = "SELECT annotator, clip, share, at FROM heard WHERE workspace = ? ORDER BY annotator, clip, share"

T = TypeVar("T")
Key = tuple[str, str, str]
"""Workspace, annotator, sha256 of a clip."""
Sent = tuple[int, int, str]
"""First byte, the one behind the last, and the time when the first was sent."""


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
        values = (*key, start, start, _now().isoformat())
        insert = "INSERT INTO sent VALUES (?, ?, ?, ?, ?, ?)"
        row = await self._do(lambda: self._db.execute(insert, values).lastrowid)
        transfer = Transfer(key, start, start, row or 0)
        self._transfers.append(transfer)
        return transfer

    async def end(self, transfer: Transfer) -> None:
        """Keep what was sent of an answer that ended."""
        self._transfers.remove(transfer)
        await self._do(lambda: self._save([transfer]))

    async def has_all(self, key: Key, size: int) -> bool:
        """Whether every byte of a clip was sent to this annotator before."""
        return _length((start, stop) for start, stop, _ in await self._do(lambda: self._sent(key))) >= size

    async def played(
        self, key: Key, start: float, stop: float, *, size: int, duration_s: float | None
    ) -> None:
        """Add a part to what an annotator played of a clip, and keep how much of the clip that now is.

        Args:
            key: What the annotator says to have played.
            start: Where the part begins, as a share of the clip.
            stop: Where it ends.
            size: Of the clip, in bytes.
            duration_s: Of the clip; None if it is not known: then time does not limit it.
        """
        open_now, now = [item for item in self._transfers if item.key == key], _now()

        def add() -> None:
            self._save(open_now)
            self._db.execute(_PLAY, (*key, start, stop))
            parts = self._db.execute(f"SELECT start, stop FROM played {_OF_KEY}", key).fetchall()
            share = min(_length(parts), playable(self._sent(key), size, duration_s, now))
            self._db.execute(_HEAR, (*key, share, datetime.now(UTC).isoformat(timespec="milliseconds")))

        await self._do(add)

    async def heard(self, workspace: str) -> list[dict[str, str | float]]:
        """Shares that were played in a workspace, each more than before, by annotator and clip.

        Every step up is kept with its time: who heard most of a clip, judged, and played it to its end later,
        had heard it.
        """
        rows = await self._do(lambda: self._db.execute(_HEARD, (workspace,)).fetchall())
        return [dict(zip(("annotator", "clip", "share", "at"), row, strict=True)) for row in rows]

    def _sent(self, key: Key) -> list[Sent]:
        return self._db.execute(f"SELECT start, stop, at FROM sent {_OF_KEY} ORDER BY at", key).fetchall()

    def _save(self, transfers: Iterable[Transfer]) -> None:
        rows = [(transfer.stop, transfer.row) for transfer in transfers]
        self._db.executemany("UPDATE sent SET stop = ? WHERE rowid = ?", rows)

    async def _do(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


def playable(sent: Sequence[Sent], size: int, duration_s: float | None, now: datetime) -> float:
    """The largest share of a clip that somebody can have played by `now`.

    No more than was sent; and, for each time that something was sent: no more than had been sent before, and
    what could be played since. So bytes that came late do not profit from the time before.

    Args:
        sent: What was sent, by time.
        size: Of the clip, in bytes.
        duration_s: Of the clip; None if it is not known.
        now: By the clock of `sent`.
    """
    share = 1.0
    parts: list[tuple[int, int]] = []
    for start, stop, at in sent:
        before = _length(parts)
        parts.append((start, stop))
        if duration_s is not None and _length(parts) > before:
            elapsed_s = (now - datetime.fromisoformat(at)).total_seconds()
            share = min(share, before / size + FASTEST * elapsed_s / duration_s)
    return min(share, _length(parts) / size) if size else 0.0


def _length(parts: Iterable[tuple[float, float]]) -> float:
    """How much there is in the union of parts."""
    length = end = 0.0
    for start, stop in sorted(parts):
        length += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return length


def _open(file: Path) -> sqlite3.Connection:
    file.touch(mode=0o600)  # sqlite would make it as readable as the umask allows
    db = sqlite3.connect(file, isolation_level=None, timeout=30)  # every statement is its own transaction
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = NORMAL")
    db.executescript(_TABLES)
    db.execute("UPDATE sent SET at = ?1 WHERE at > ?1", (_now().isoformat(),))  # the clock was set back since
    return db


_STARTED = datetime.now(UTC), time.monotonic()


def _now() -> datetime:
    """The time by a clock that nobody sets while this process runs."""
    return _STARTED[0] + timedelta(seconds=time.monotonic() - _STARTED[1])

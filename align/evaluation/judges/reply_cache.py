"""A judge's replies, kept on disk, so that no question is paid for twice."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from align.evaluation.judges.chat_model import Reply


class ReplyCache:
    """Replies by the hash of the request, in one file of JSON lines that only grows.

    Each reply is one write: once `put` returns, no death of the process can lose it, and where the whole
    machine dies, at most the last replies are lost and requested again. Processes may share the file.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._replies = dict(_read(path))

    def get(self, keys: Iterable[str]) -> dict[str, Reply]:
        """The replies that are there, by key."""
        return {key: self._replies[key] for key in keys if key in self._replies}

    def put(self, key: str, reply: Reply) -> None:
        """Keep a reply."""
        line = json.dumps({"key": key, **reply._asdict()}) + "\n"
        with self.path.open("ab", buffering=0) as file:
            file.write(line.encode())
        self._replies[key] = reply


def _read(path: Path) -> Iterator[tuple[str, Reply]]:
    """The file's replies; a torn last line (the machine died) is cut off so that the next line is whole."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        whole = 0
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                file.truncate(whole)
                return
            whole += len(line)
            try:
                row = json.loads(line)
                yield row.pop("key"), Reply(**row)
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ValueError(
                    f"{path}:{number}: is not a kept reply. Delete this line: that one is requested again"
                ) from None

"""Many files of one publisher: several at once, over connections that are kept, each as `fetch` has it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

from preference_data.corpora.fetch import OnBytes, Publisher, RemoteFile, Stopped, fetch


def fetch_many(
    files: Sequence[RemoteFile],
    folder: Path,
    label: str,
    on_bytes: OnBytes | None = None,
    *,
    at_once: int,
    wait_s: float = 1.0,
) -> None:
    """Fetch all files into `folder`, but for those that are there; at most `at_once` requests at a time.

    The first failure ends the others; parts of files stay and are continued by the next call.

    Args:
        files: of one publisher, with their `size` if progress is to be told.
        folder: where to.
        label: under which progress is told, all files together.
        on_bytes: told how far they are, by one thread at a time.
        at_once: how many requests a publisher gets at a time.
        wait_s: see `fetch`.

    Raises:
        DownloadFailed: see `fetch`; of several failures the first in the order of `files`.
    """
    told = _Together(label, sum(file.size for file in files), on_bytes)
    left = []
    for file in files:
        if (folder / file.name).exists():
            told(file.name, file.size, file.size)
        else:
            left.append(file)
    with Publisher(at_once) as publisher, ThreadPoolExecutor(at_once) as pool:
        fetching = [
            pool.submit(fetch, file, folder, told, wait_s=wait_s, publisher=publisher) for file in left
        ]
        try:
            wait(fetching, return_when=FIRST_EXCEPTION)
        finally:  # also on Ctrl-C: else the pool would first fetch all the rest
            publisher.stop()
            pool.shutdown(cancel_futures=True)
    errors = [future.exception() for future in fetching if not future.cancelled()]
    for error in sorted((one for one in errors if one), key=lambda one: isinstance(one, Stopped)):
        raise error


class _Together:
    """Adds up how far single files are."""

    def __init__(self, label: str, total: int, on_bytes: OnBytes | None) -> None:
        self._label, self._total, self._on_bytes = label, total, on_bytes
        self._done: dict[str, int] = {}
        self._sum = 0
        self._lock = threading.Lock()

    def __call__(self, name: str, done: int, total: int) -> None:
        with self._lock:
            self._sum += done - self._done.get(name, 0)
            self._done[name] = done
            if self._on_bytes:
                self._on_bytes(self._label, self._sum, self._total)

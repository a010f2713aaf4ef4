"""Fetch files over HTTP: streamed, resumed where they stopped, checked, and in place only when whole.

A file grows in `.NAME.part` and gets its name once its length and checksum are right. A part is
continued (RFC 9110, Range) only if the server says that the file is still the same, or a checksum will.
A server that asks to wait (Retry-After) is left alone for as long, by all that fetch from it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import httpx

from preference_data.corpora.unpack import unpack
from preference_data.store import write_text

OnBytes = Callable[[str, int, int], object]
"""Told a file's name, how many of its bytes are there, and how many there will be (0: unknown)."""

_ATTEMPTS = 6  # in a row that bring nothing new
_FIRST_WAIT_S = 1.0  # doubled with every attempt
_LONGEST_WAIT_S = 600.0  # that a server may ask for
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


class DownloadFailed(RuntimeError):
    """A file could not be fetched, or what came is not the file."""


class UnknownPart(ValueError):
    """A corpus has no part of this name."""


class RemoteFile(NamedTuple):
    """A file at its publisher. `max_gb` bounds what is accepted; `checksum` is "md5:…" or "sha256:…"."""

    url: str
    name: str
    max_gb: float
    checksum: str | None = None
    headers: Mapping[str, str] = {}
    """Sent with the request, e.g. to authorise it."""
    size: int = 0
    """In bytes, where its publisher has told; 0 is unknown."""


class Stopped(DownloadFailed):
    """Another file's failure, or the user, has ended this one; what came is kept."""


class Publisher:
    """The connections to a server, at most `at_once`, kept open between files; for several threads."""

    def __init__(self, at_once: int = 1) -> None:
        limits = httpx.Limits(max_connections=at_once, max_keepalive_connections=at_once)
        # Who waits for a connection waits for another file, which may be large
        timeout = httpx.Timeout(60.0, pool=None)
        self.client = httpx.Client(follow_redirects=True, timeout=timeout, limits=limits)
        self._open_from = 0.0
        self._stopped = threading.Event()

    def __enter__(self) -> Publisher:
        return self

    def __exit__(self, *error: object) -> None:
        self.client.close()

    def pause(self, seconds: float) -> None:
        """Nobody asks for anything before that."""
        self._open_from = max(self._open_from, time.monotonic() + seconds)

    def wait(self) -> None:
        """Until the server may be asked.

        Raises:
            Stopped: `stop` was called.
        """
        while (left := self._open_from - time.monotonic()) > 0:
            self.sleep(left)
        self.go_on()

    def sleep(self, seconds: float) -> None:
        """Wait, but for `stop`.

        Raises:
            Stopped: see `wait`.
        """
        self._stopped.wait(seconds)
        self.go_on()

    def stop(self) -> None:
        """End what is being fetched."""
        self._stopped.set()

    def go_on(self) -> None:
        """Raise `Stopped` if that was asked for."""
        if self._stopped.is_set():
            raise Stopped("stopped; what came is kept: run the same command again to go on")


def fetch_parts(
    folder: Path,
    parts: Mapping[str, Sequence[RemoteFile]],
    wanted: Sequence[str] | None,
    on_bytes: OnBytes | None = None,
) -> None:
    """Fetch all files of the wanted parts and unpack their archives, each once.

    An archive is deleted when it is unpacked; `.fetched/NAME` says that it was.

    Raises:
        UnknownPart: a part is not there; nothing was fetched.
        DownloadFailed: see `fetch`.
        BadArchive: see `unpack`.
    """
    if unknown := [name for name in wanted or () if name not in parts]:
        raise UnknownPart(f"no part {unknown[0]!r}; there are {', '.join(parts) or 'none'}")
    for part in wanted or parts:
        for file in parts[part]:
            done = folder / ".fetched" / file.name
            if done.exists():
                continue
            path = fetch(file, folder, on_bytes)
            if file.name.endswith((".tar.gz", ".tgz", ".zip")):
                unpack(path, folder)
                write_text(done, json.dumps({"url": file.url, "checksum": file.checksum}) + "\n")
                path.unlink()


def fetch(
    file: RemoteFile,
    folder: Path,
    on_bytes: OnBytes | None = None,
    *,
    wait_s: float = _FIRST_WAIT_S,
    publisher: Publisher | None = None,
) -> Path:
    """Fetch one file into `folder`, unless it is there; returns its path.

    Args:
        file: what to fetch.
        folder: where to; made if missing.
        on_bytes: told how far it is.
        wait_s: before the second attempt; doubled with every further one that brings nothing.
        publisher: open connections; by default one for this file.

    Raises:
        DownloadFailed: the server refuses or keeps failing, the file is too large for its bound or the disk,
            is a web page instead, or has another checksum; naming the address and the next step.
    """
    if publisher is None:
        with Publisher() as own:
            return fetch(file, folder, on_bytes, wait_s=wait_s, publisher=own)
    path = folder / file.name
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    with part.open("ab") as output:
        try:
            fcntl.flock(output, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DownloadFailed(f"{path}: another process is fetching it; wait for that one") from None
        _fill(file, part, output, publisher, on_bytes, wait_s)
        output.flush()
        os.fsync(output.fileno())
        _check(file, part)
        part.rename(path)
    _state_of(part).unlink(missing_ok=True)
    return path


def _fill(
    file: RemoteFile,
    part: Path,
    output: IO[bytes],
    publisher: Publisher,
    on_bytes: OnBytes | None,
    wait_s: float,
) -> None:
    """Ask until the part is whole."""
    failures = 0
    while True:
        before, asked_s = output.tell(), 0.0
        publisher.wait()
        try:
            if _attempt(file, part, output, publisher, on_bytes):
                return
            problem = f"the connection closed after {output.tell()} bytes"
        except httpx.HTTPStatusError as error:
            problem, asked_s = str(error), _retry_after_s(error.response)
        except httpx.HTTPError as error:
            problem = f"{type(error).__name__}: {error}"
        failures = 0 if output.tell() > before else failures + 1
        if failures >= _ATTEMPTS:
            raise DownloadFailed(
                f"{file.url}: {problem}; gave up after {failures} attempts. What came is kept: run the same "
                f"command again to go on, or fetch it by other means and put it at {part.parent / file.name}"
            )
        publisher.pause(asked_s)
        publisher.sleep(wait_s * 2 ** max(0, failures - 1))


def _retry_after_s(response: httpx.Response) -> float:
    """For how long a server that is busy wants to be left alone; 0 if it does not say, in seconds."""
    said = response.headers.get("Retry-After", "")
    return min(float(said), _LONGEST_WAIT_S) if said.isascii() and said.isdigit() else 0.0


def _attempt(
    file: RemoteFile, part: Path, output: IO[bytes], publisher: Publisher, on_bytes: OnBytes | None
) -> bool:
    """One request; whether the part is whole now."""
    headers = {"Accept-Encoding": "identity", **file.headers, **_resuming(file, part, output)}
    with publisher.client.stream("GET", file.url, headers=headers) as response:
        if response.status_code in (408, 429) or response.status_code >= 500:
            response.raise_for_status()
        if (
            response.status_code == 416
            and response.headers.get("Content-Range") == f"bytes */{output.tell()}"
        ):
            return True
        total = _begin(file, part, output, response)
        for chunk in response.iter_raw():  # as it comes: what is gathered is lost when the line breaks
            publisher.go_on()
            output.write(chunk)
            if output.tell() > file.max_gb * 1e9:
                raise DownloadFailed(
                    f"{file.url}: is larger than the {file.max_gb:g} GB expected; look at it"
                )
            if on_bytes:
                on_bytes(file.name, output.tell(), total)
    return not total or output.tell() >= total


def _resuming(file: RemoteFile, part: Path, output: IO[bytes]) -> dict[str, str]:
    """Headers that ask for what is missing; what is there is dropped if it cannot be trusted."""
    state = _state_of(part)
    known: dict[str, Any] = json.loads(state.read_text()) if state.exists() else {}
    at = output.seek(0, 2)
    if not at:
        return {}
    validator = known.get("validator") if known.get("url") == file.url else None
    if not validator and not (file.checksum and known.get("url") == file.url):
        output.truncate(0)
        output.seek(0)
        return {}
    return {"Range": f"bytes={at}-", **({"If-Range": validator} if validator else {})}


def _begin(file: RemoteFile, part: Path, output: IO[bytes], response: httpx.Response) -> int:
    """Look at the head of a response; the whole file's length, 0 if the server does not say."""
    status, at = response.status_code, output.tell()
    found = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
    if status == 206 and found and int(found[1]) == at:
        total = int(found[3]) if found[3] != "*" else 0
    elif status == 200:
        output.truncate(0)
        output.seek(0)
        at, total = 0, int(response.headers.get("Content-Length") or 0)
    elif status in (206, 416):  # not what was asked for, or the file has become shorter
        output.truncate(0)
        output.seek(0)
        raise httpx.RemoteProtocolError("the server does not continue the file; starting again")
    else:
        raise DownloadFailed(
            f"{file.url}: the server answers {status} {response.reason_phrase}; look at the corpus' home "
            f"page, or fetch it by other means and put it at {part.parent / file.name}"
        )
    kind = response.headers.get("Content-Type", "")
    if kind.startswith("text/html") and not file.name.endswith((".html", ".htm")):
        raise DownloadFailed(f"{file.url}: is a web page, not {file.name}; open it in a browser")
    _check_room(file, part.parent, total, total - at)
    etag = response.headers.get("ETag", "")
    validator = etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified")
    write_text(_state_of(part), json.dumps({"url": file.url, "validator": validator}))
    return total


def _check_room(file: RemoteFile, folder: Path, total: int, missing: int) -> None:
    if total > file.max_gb * 1e9:
        raise DownloadFailed(
            f"{file.url}: has {total / 1e9:.1f} GB, more than the {file.max_gb:g} expected; look at it"
        )
    free = shutil.disk_usage(folder).free
    if missing > free:
        raise DownloadFailed(
            f"{file.name} needs {missing / 1e9:.1f} GB more, {folder} has {free / 1e9:.1f}; make room or "
            "name another folder"
        )


def _check(file: RemoteFile, part: Path) -> None:
    """Refuse, and drop, what has another checksum than its publisher says."""
    if file.checksum is None:
        return
    algorithm, _, wanted = file.checksum.partition(":")
    with part.open("rb") as content:
        found = hashlib.file_digest(content, algorithm).hexdigest()
    if found != wanted:
        part.unlink()
        _state_of(part).unlink(missing_ok=True)
        raise DownloadFailed(
            f"{file.url}: {algorithm} is {found}, its publisher says {wanted}; it was damaged or replaced. "
            "Fetch it again; if that does not help, look at the corpus' home page"
        )


def _state_of(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")

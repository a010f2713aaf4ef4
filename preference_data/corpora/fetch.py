"""Fetch files over HTTP: streamed, resumed where they stopped, checked, and in place only when whole.

A file grows in `.NAME.part` and gets its name once its length and checksum are right. A part is
continued (RFC 9110, Range) only if the server says that the file is still the same, or a checksum will.
A server that asks to wait (Retry-After) is left alone for as long.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple
from urllib.parse import urlsplit

import httpx

from preference_data.corpora.unpack import unpack
from preference_data.store import write_text

OnBytes = Callable[[str, int, int], object]
"""Called with a file's name, how many of its bytes are there, and how many there will be (0: unknown)."""

_ATTEMPTS = 6  # in a row that bring nothing new
_FIRST_WAIT_S = 1.0  # doubled with every attempt
_LONGEST_WAIT_S = 600.0  # that a server may ask for
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


class DownloadFailed(RuntimeError):
    """A file could not be fetched, or what came, or was there before, is not the file."""


class RemoteFile(NamedTuple):
    """A file at its publisher. `max_gb` bounds what is accepted; `checksum` is "md5:…" or "sha256:…"."""

    url: str
    max_gb: float
    checksum: str | None = None

    @property
    def name(self) -> str:
        """Under which it is kept."""
        return PurePosixPath(urlsplit(self.url).path).name


def fetch_part(files: Sequence[RemoteFile], folder: Path, on_bytes: OnBytes | None = None) -> None:
    """Fetch files and unpack their archives, each once.

    An archive is deleted when it is unpacked; `.fetched/NAME` says that it was.

    Raises:
        DownloadFailed: see `fetch`.
        BadArchive: see `unpack`.
    """
    for file in files:
        done = folder / ".fetched" / file.name
        if done.exists():
            continue
        path = fetch(file, folder, on_bytes)
        if file.name.endswith((".tar.gz", ".tgz", ".zip")):
            unpack(path, folder)
            write_text(done, json.dumps({"url": file.url, "checksum": file.checksum}) + "\n")
            path.unlink()


def fetch(
    file: RemoteFile, folder: Path, on_bytes: OnBytes | None = None, *, wait_s: float = _FIRST_WAIT_S
) -> Path:
    """Fetch a file into `folder`, unless it is there; returns its path.

    Args:
        file: what to fetch.
        folder: where to; made if missing.
        on_bytes: reports progress.
        wait_s: before the second attempt; doubled with every further one that brings nothing.

    Raises:
        DownloadFailed: the server refuses or keeps failing, the file is too large for its bound or the disk,
            is a web page instead, or it, or what is there in its place, has another checksum; naming the
            address and the next step.
    """
    path = folder / file.name
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    while not path.exists():
        with part.open("ab") as output:
            try:
                fcntl.flock(output, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DownloadFailed(f"{path}: another process is fetching it; wait for that one") from None
            # Between opening and locking another process may have finished: what was opened is `path` by now
            if not _is_open_as(output, part):
                continue
            if path.exists():
                part.unlink()
                continue
            _fill(file, part, output, on_bytes, wait_s)
            output.flush()
            os.fsync(output.fileno())
            _check(file, part)
            part.rename(path)
        _state_of(part).unlink(missing_ok=True)
        return path
    if file.checksum and (problem := other_checksum(file.checksum, path)):
        raise DownloadFailed(
            f"{path}: is there, but {problem}; it is damaged or another version. Remove it and run the same "
            "command again"
        )
    return path


def _is_open_as(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _fill(file: RemoteFile, part: Path, output: IO[bytes], on_bytes: OnBytes | None, wait_s: float) -> None:
    """Ask until the part is whole."""
    failures = 0
    with httpx.Client(follow_redirects=True, timeout=60.0) as client:
        while True:
            before, rest_s = output.tell(), 0.0
            try:
                if _attempt(client, file, part, output, on_bytes):
                    return
                problem = f"the connection closed after {output.tell()} bytes"
            except httpx.HTTPStatusError as error:
                problem, rest_s = str(error), _retry_after_s(error.response)
            except httpx.HTTPError as error:
                problem = f"{type(error).__name__}: {error}"
            failures = 0 if output.tell() > before else failures + 1
            if failures >= _ATTEMPTS:
                raise DownloadFailed(
                    f"{file.url}: {problem}; gave up after {failures} attempts. What came is kept: run the "
                    "same command again to go on, or fetch it by other means and put it at "
                    f"{part.parent / file.name}"
                )
            time.sleep(max(rest_s, wait_s * 2 ** max(0, failures - 1)))


def _retry_after_s(response: httpx.Response) -> float:
    """For how long a server that is busy wants to be left alone; 0 if it does not say, in seconds."""
    wait = response.headers.get("Retry-After", "")
    return min(float(wait), _LONGEST_WAIT_S) if wait.isascii() and wait.isdigit() else 0.0


def _attempt(
    client: httpx.Client, file: RemoteFile, part: Path, output: IO[bytes], on_bytes: OnBytes | None
) -> bool:
    """Make a request; whether the part is whole now."""
    headers = {"Accept-Encoding": "identity", **_resuming(file, part, output)}
    with client.stream("GET", file.url, headers=headers) as response:
        if response.status_code in (408, 429) or response.status_code >= 500:
            response.raise_for_status()
        if (
            response.status_code == 416
            and response.headers.get("Content-Range") == f"bytes */{output.tell()}"
        ):
            return True
        total = _begin(file, part, output, response)
        for chunk in response.iter_raw():  # as it comes: what is gathered is lost when the line breaks
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
    span = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
    if status == 206 and span and int(span[1]) == at:
        total = int(span[3]) if span[3] != "*" else 0
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
    if file.checksum and (problem := other_checksum(file.checksum, part)):
        part.unlink()
        _state_of(part).unlink(missing_ok=True)
        raise DownloadFailed(
            f"{file.url}: {problem}; it was damaged or replaced. Fetch it again; if that does not help, look "
            "at the corpus' home page"
        )


def other_checksum(checksum: str, path: Path) -> str:
    """How a file differs from its publisher's checksum; empty if it does not."""
    algorithm, _, expected = checksum.partition(":")
    with path.open("rb") as content:
        actual = hashlib.file_digest(content, algorithm).hexdigest()
    return "" if actual == expected else f"its {algorithm} is {actual}, its publisher says {expected}"


def _state_of(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")

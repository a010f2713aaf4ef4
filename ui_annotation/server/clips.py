"""Clips as files: stored under the sha256 of what they contain, sent whole or in part."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

import anyio
import soundfile
from anyio.to_thread import run_sync

MAX_BYTES = 200_000_000
TOO_LARGE = f"A clip may have {MAX_BYTES:,} bytes, this one has more. Shorten or compress it."
TYPES = {"wav": "audio/wav", "flac": "audio/flac", "mp3": "audio/mpeg", "ogg": "audio/ogg"}
_CHUNK = 64 * 1024
_MOST_FRAMES = 2**40
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


class TooLarge(Exception):
    """The body is longer than `MAX_BYTES`."""


class WrongDigest(Exception):
    """The body is not what its name says."""


class Unsatisfiable(Exception):
    """The range asked for begins behind the end of the file."""


class Span(NamedTuple):
    """Bytes `start` to `stop` (exclusive) of a file of `size` bytes."""

    start: int
    stop: int
    size: int


def span(header: str | None, size: int) -> Span | None:
    """What a Range header asks for; None is the whole file.

    A malformed header and several ranges at once also give the whole file, as RFC 9110 (14.2) allows.

    Raises:
        Unsatisfiable: Nothing of the range lies within the file.
    """
    match = _RANGE.fullmatch((header or "").strip())
    if not match or match.group(1, 2) == ("", ""):
        return None
    first, last = match.groups()
    if not first:
        start, stop = max(0, size - int(last)), size
    else:
        start, stop = int(first), min(int(last) + 1, size) if last else size
        if last and int(last) < start:
            return None
    if start >= size:
        raise Unsatisfiable(f"bytes */{size}")
    return Span(start, stop, size)


@functools.lru_cache(10_000)
def duration_s(file: Path) -> float | None:
    """How long a clip lasts; None if it is no audio, or does not say."""
    try:
        info = soundfile.info(file)
    except soundfile.LibsndfileError:
        return None
    return info.frames / info.samplerate if 0 < info.frames < _MOST_FRAMES else None


async def read(file: Path, part: Span) -> AsyncIterator[bytes]:
    """The bytes of a file in chunks."""
    async with await anyio.open_file(file, "rb") as handle:
        await handle.seek(part.start)
        left = part.stop - part.start
        while left and (chunk := await handle.read(min(_CHUNK, left))):
            left -= len(chunk)
            yield chunk


async def store(file: Path, body: AsyncIterator[bytes]) -> bool:
    """Write `body` to `file`, whose stem is its sha256. Appears whole or not at all.

    Returns:
        Whether the file is new. One that was there already is left alone.

    Raises:
        TooLarge: The body exceeds `MAX_BYTES`.
        WrongDigest: The body's sha256 is another one.
    """
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp()  # readable by us only; in the home's scratch, which a start empties
    os.close(handle)
    incoming = Path(name)
    try:
        digest = await _write(incoming, body)
        if digest != file.stem:
            raise WrongDigest(f"the body's sha256 is {digest}, the address says {file.stem}")
        if file.exists():
            return False
        incoming.rename(file)
        return True
    finally:
        incoming.unlink(missing_ok=True)


async def _write(file: Path, body: AsyncIterator[bytes]) -> str:
    digest, size = hashlib.sha256(), 0
    async with await anyio.open_file(file, "wb") as handle:
        async for chunk in body:
            size += len(chunk)
            if size > MAX_BYTES:
                raise TooLarge(TOO_LARGE)
            digest.update(chunk)
            await handle.write(chunk)
        await handle.flush()
        await run_sync(os.fsync, handle.wrapped.fileno())
    return digest.hexdigest()

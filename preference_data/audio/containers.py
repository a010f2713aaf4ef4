"""What a file's own structure says of its length, for libsndfile takes half a file for a whole one.

WAV, RF64, W64, AIFF, CAF: every chunk is as long as its header says, and nothing else lies behind them. AU:
the same of its only one. Ogg: the checksum and the number of every page, the mark of the last (RFC 3533).
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from io import FileIO
from typing import NamedTuple

from preference_data.audio.clip_files import BadContent

_MAX_CHUNKS = 1000
_UNKNOWN = (2**32 - 1, 2**64 - 1)  # lengths that say: until the end
_NEARLY_4_GB = 0x7FFF_0000
"""Lengths from here on are what recorders write before they know better, where the file is shorter."""
_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
_TAGS = (b"ID3", b"TAG", b"APETAGEX")


class _Layout(NamedTuple):
    """Where the chunks of a container begin, how each names itself and its length, and which is the sound."""

    start: int
    header: struct.Struct
    own: int
    """Bytes of a chunk's header that its length counts."""
    align: int
    sound: bytes


_LAYOUTS = {
    b"RIFF": _Layout(12, struct.Struct("<4sI"), 0, 2, b"data"),
    b"RIFX": _Layout(12, struct.Struct(">4sI"), 0, 2, b"data"),
    b"RF64": _Layout(12, struct.Struct("<4sI"), 0, 2, b"data"),
    b"riff": _Layout(40, struct.Struct("<16sQ"), 24, 8, b"data"),  # W64: names are GUIDs
    b"FORM": _Layout(12, struct.Struct(">4sI"), 0, 2, b"SSND"),
    b"caff": _Layout(8, struct.Struct(">4sQ"), 0, 1, b"data"),
}


def check_length(file: FileIO) -> bool:
    """Refuse a file of these formats that is shorter or longer than its structure says.

    Returns:
        Whether it is of one of these formats.

    Raises:
        BadContent: it is cut off (`truncated`), its length is unknown, or it holds what is no part of it.
    """
    mark, size = os.pread(file.fileno(), 4, 0), os.fstat(file.fileno()).st_size
    if mark in _LAYOUTS:
        _check_chunks(file, size, _LAYOUTS[mark])
    elif mark in (b".snd", b"dns."):
        order = ">" if mark == b".snd" else "<"
        start, length = struct.unpack(f"{order}II", os.pread(file.fileno(), 8, 4).ljust(8, b"\0"))
        _check_sound(length, size - start)
        _check_rest(file, start + length, size)
    elif mark == b"OggS":
        _check_pages(file, size)
    else:
        return False
    return True


# -------------------------------------------------------------------------- chunks


def _check_chunks(file: FileIO, size: int, layout: _Layout) -> None:
    has_sound, end = False, layout.start
    for name, start, length in _chunks(file, layout):
        if name == layout.sound:
            has_sound = True
            _check_sound(length, size - start)
            if name == b"SSND" and any(os.pread(file.fileno(), 4, start)):
                raise BadContent("corrupt", "its header says that sound begins later than it does")
            if not length:  # refused as empty, whatever lies behind it
                return
        elif start + length > size and not has_sound:
            raise BadContent("truncated", f"chunk {name!r} promises {length} bytes, there are {size - start}")
        elif start + length > size or (has_sound and name in _LAYOUTS):
            break
        end = start + length
    if not has_sound:
        raise BadContent("unreadable", f"no {layout.sound.decode()} in its first {_MAX_CHUNKS} chunks")
    _check_rest(file, end, size)


def _chunks(file: FileIO, layout: _Layout) -> Iterator[tuple[bytes, int, int]]:
    """Name, start and length of the chunks, up to what is none."""
    at, long = layout.start, 2**64 - 1
    for _ in range(_MAX_CHUNKS):
        header = os.pread(file.fileno(), layout.header.size, at)
        if len(header) < layout.header.size or not header[:4].isascii():
            return
        name, length = layout.header.unpack(header)
        start = at + len(header)
        length -= layout.own
        if name == b"ds64":  # of RF64: lengths of more than 32 bits
            long = struct.unpack("<Q", os.pread(file.fileno(), 8, start + 8).ljust(8, b"\0"))[0]
        elif name == b"data" and length == 2**32 - 1:
            length = long
        yield name[:4], start, length
        at = start + length
        padding = os.pread(file.fileno(), -at % layout.align, at)
        at += len(padding) if not padding.strip(b"\0") else 0  # some writers leave it out


def _check_sound(promised: int, there: int) -> None:
    if promised in _UNKNOWN or promised >= _NEARLY_4_GB > there:
        raise BadContent("unknown_length", "its header says no length")
    if promised > there:
        raise BadContent("truncated", f"promises {promised} bytes of sound, has {max(0, there)}")


def _check_rest(file: FileIO, end: int, size: int) -> None:
    """Refuse what lies behind the last chunk, unless it is a tag or zeros: it may be sound."""
    rest = os.pread(file.fileno(), 1 << 16, end)
    if rest.strip(b"\0") and not rest.startswith(_TAGS):
        raise BadContent("corrupt", f"{size - end} bytes lie behind what its header counts")


# -------------------------------------------------------------------------- Ogg


def _check_pages(file: FileIO, size: int) -> None:
    numbers: dict[bytes, int] = {}
    ended: set[bytes] = set()
    at = 0
    while (header := os.pread(file.fileno(), 27 + 255, at)).startswith(b"OggS") and len(header) >= 27:
        table = header[27 : 27 + header[26]]
        page = os.pread(file.fileno(), 27 + header[26] + sum(table), at)
        if len(page) < 27 + header[26] + sum(table):
            raise BadContent("truncated", f"its {size} bytes stop before the stream ends")
        stream, number = page[14:18], int.from_bytes(page[18:22], "little")
        if _page_checksum(page) != int.from_bytes(page[22:26], "little"):
            raise BadContent("corrupt", f"the page at byte {at} is damaged")
        if page[5] & 2 and len(ended) == len(numbers) > 0:
            raise BadContent("corrupt", f"another stream begins at byte {at}")
        if number != numbers.get(stream, number - 1) + 1 & 2**32 - 1:
            raise BadContent("corrupt", f"a page is missing at byte {at}")
        numbers[stream] = number
        ended |= {stream} if page[5] & 4 else set()
        at += len(page)
    if b"OggS" in os.pread(file.fileno(), size - at, at):
        raise BadContent("corrupt", f"what is at byte {at} is not a page")
    if ended != set(numbers):
        raise BadContent("truncated", f"its {size} bytes stop before the stream ends")


def _page_checksum(page: bytes) -> int:
    """CRC-32 as Ogg has it, most significant bit first: zlib's on reversed bits."""
    blank = page[:22] + bytes(4) + page[26:]
    reflected = zlib.crc32(blank.translate(_REVERSED), 2**32 - 1) ^ 2**32 - 1
    return int(f"{reflected:032b}"[::-1], 2)

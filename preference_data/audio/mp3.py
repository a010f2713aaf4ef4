"""MP3 files: their frames are counted, for the header that says how many there are is often wrong.

libsndfile believes the header of Xing or, without it, guesses from the first frame's bit rate, and reads no
further. Encoders that write to a pipe leave the header out or at 0, and files that were put one behind the
other keep the first one's. With the right header put before their frames, they are read whole.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from io import FileIO
from typing import NamedTuple

from preference_data.audio.clip_files import BadContent, Reason

_RATES_HZ = (44_100, 48_000, 32_000)  # MPEG-1; MPEG-2 has half of it, MPEG-2.5 a quarter
_KBITS_1 = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)  # 0 is the free format
_KBITS_2 = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
_ROOMY = 9  # index of a bit rate whose frames hold the header at every sample rate
_LARGEST_FRAME = 1441  # bytes
_HAS_COUNT, _FIELDS = 1, ((1, 4), (2, 4), (4, 100), (8, 4))  # of Xing's header: flag, bytes of its field
_LAME = 36  # bytes of what LAME adds to it


class Frames(NamedTuple):
    """The frames of a file: `n` of sound in `runs` (start and end of each), all like `head`.

    `is_plain`: libsndfile counts them right. `lame` says how much silence is before and behind the sound.
    """

    n: int
    runs: tuple[tuple[int, int], ...]
    head: bytes
    lame: bytes
    is_plain: bool

    def whole(self, file: FileIO) -> bytes:
        """The same frames without tags, behind a header that says how many there are."""
        sound = b"".join(_at(file, start, end - start) for start, end in self.runs)
        return _header(self.head, self.n, self.lame) + sound


class _Info(NamedTuple):
    """A first frame that has no sound but says there are `n_frames` others; `is_seen`: by libsndfile, too."""

    n_frames: int | None
    lame: bytes
    is_seen: bool


def read_frames(file: FileIO) -> Frames:
    """Count the layer III frames of a file, all of one kind, with tags before, between or behind them.

    Raises:
        BadContent: something else is between them, they are fewer than their header says (`truncated`), or
            they do not say how long they are (`unknown_length`).
    """
    size = os.fstat(file.fileno()).st_size
    first = 0
    while tag := _tag_bytes(_at(file, first, 32)):
        first += tag
    head = _at(file, first, 4)
    first_frame = _at(file, first, _frame_bytes(head))
    if not first_frame:
        raise BadContent("unknown_length", "no layer III frame of a known length begins it")
    if len(first_frame) < _frame_bytes(head):
        raise BadContent("truncated", "stops in the middle of its first frame")
    runs, n = _runs(file, first, size)
    info = _info(first_frame)
    if info:
        n, runs[0] = n - 1, (first + len(first_frame), runs[0][1])
    _check_rest(file, runs[-1][1], size, n, info.n_frames if info else None)
    is_plain = bool(info and info.is_seen and info.n_frames == n and len(runs) == 1)
    return Frames(n, tuple(runs), head, info.lame if info else b"", is_plain)


def _check_rest(file: FileIO, end: int, size: int, n: int, count: int | None) -> None:
    """Refuse if frames are missing: fewer than the header counts, or more behind what is no frame."""
    rest = _at(file, end, size - end)
    if count is not None and count > n + 1:  # some count the header's own frame, too
        code: Reason = "truncated" if len(rest) < _LARGEST_FRAME else "corrupt"
        raise BadContent(code, f"its header counts {count} frames, there are {n}")
    is_padding = len(rest) < _LARGEST_FRAME and not rest.strip(b"\0")
    if count != n and rest and not is_padding:
        if _frame_bytes(rest[:4]) > len(rest):
            raise BadContent("truncated", "stops in the middle of a frame")
        raise BadContent("corrupt", f"what is at byte {end} is not a frame")
    if any(_is_frame(rest, at) for at in _candidates(rest)):
        raise BadContent("corrupt", f"what is at byte {end} is not a frame, and more frames follow")


def _candidates(content: bytes) -> Iterator[int]:
    """Where a frame may begin."""
    at = content.find(0xFF)
    while at >= 0:
        yield at
        at = content.find(0xFF, at + 1)


def _is_frame(content: bytes, at: int) -> bool:
    """Whether a frame begins here, and behind it another one of its kind, or nothing."""
    head = content[at : at + 4]
    end = at + _frame_bytes(head)
    return end > at and (end == len(content) or _alike(content[end : end + 4], head))


def _runs(file: FileIO, at: int, size: int) -> tuple[list[tuple[int, int]], int]:
    """Stretches of whole frames of the first one's kind, up to what is no frame or tag; their number."""
    kind = _at(file, at, 4)
    runs, n, start = [], 0, at
    while at < size:
        head = _at(file, at, 4)
        length = _frame_bytes(head) if _alike(head, kind) else 0
        if length and at + length <= size:
            n, at = n + 1, at + length
        elif skipped := _tag_bytes(_at(file, at, 32)):
            runs += [(start, at)] if at > start else []
            at = start = at + skipped
        else:
            break
    return [*runs, (start, min(at, size))], n


def _alike(head: bytes, kind: bytes) -> bool:
    """Whether two frames have the same MPEG version, layer and sample rate, and both one channel or two."""
    same = len(head) == 4 and head[0] == kind[0] and not (head[1] ^ kind[1]) & 0xFE
    return same and not (head[2] ^ kind[2]) & 0b1100 and (head[3] >> 6 == 3) == (kind[3] >> 6 == 3)


def _at(file: FileIO, at: int, n: int) -> bytes:
    return os.pread(file.fileno(), n, at)


def _tag_bytes(start: bytes) -> int:
    """Bytes of the tag that begins so (32 bytes are enough to know); 0 if it is none."""
    if start.startswith(b"ID3") and len(start) >= 10:
        footer = 10 if start[5] & 0x10 else 0
        return 10 + footer + sum(byte << 7 * n for n, byte in enumerate(start[9:5:-1]))
    if start.startswith(b"APETAGEX"):
        return 32 + int.from_bytes(start[12:16], "little")
    return 128 if start.startswith(b"TAG") else 0


def _frame_bytes(head: bytes) -> int:
    """Bytes of the frame that these 4 bytes begin, 0 if they begin none or do not say."""
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE6 != 0xE2:  # synchronisation, layer III
        return 0
    version, kbits, rate = head[1] >> 3 & 3, head[2] >> 4, head[2] >> 2 & 3
    if version == 1 or rate == 3 or kbits == 15:  # reserved
        return 0
    per_bit, table, shift = (144, _KBITS_1, 0) if version == 3 else (72, _KBITS_2, 1 if version == 2 else 2)
    size = per_bit * 1000 * table[kbits] // (_RATES_HZ[rate] >> shift)
    return size + (head[2] >> 1 & 1) if kbits else 0


def _side_information(head: bytes) -> int:
    is_first, is_mono = head[1] >> 3 & 3 == 3, head[3] >> 6 == 3
    return (17 if is_mono else 32) if is_first else (9 if is_mono else 17)


def _info(frame: bytes) -> _Info | None:
    """What a first frame says of the others, if it holds a header of Xing's or Fraunhofer's encoder."""
    at = 4 + _side_information(frame)
    if frame[at : at + 4] in (b"Xing", b"Info"):
        flags = int.from_bytes(frame[at + 4 : at + 8], "big")
        end = at + 8 + sum(size for flag, size in _FIELDS if flags & flag)
        count = int.from_bytes(frame[at + 8 : at + 12], "big") if flags & _HAS_COUNT else None
        return _Info(count, frame[end : end + _LAME], not any(frame[4:at]))
    if frame[36:40] == b"VBRI":
        return _Info(int.from_bytes(frame[50:54], "big"), b"", False)
    return None


def _header(head: bytes, frames: int, lame: bytes) -> bytes:
    """A silent first frame that holds Xing's count of the frames after it, and LAME's part."""
    bits = bytes((head[0], head[1] | 1, head[2] & 0b1100 | _ROOMY << 4, head[3]))  # no checksum, no padding
    count = b"Xing" + _HAS_COUNT.to_bytes(4, "big") + frames.to_bytes(4, "big") + lame
    return (bits + bytes(_side_information(head)) + count).ljust(_frame_bytes(bits), b"\0")

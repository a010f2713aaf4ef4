"""MP3 files without a header that says how long they are: their frames are counted.

libsndfile guesses a length from the first frame's bit rate and reads no further than it guessed, so that it
drops half of the sound where bit rates vary. An encoder that writes to a pipe makes such files, for it cannot
go back to its header. With the missing header put before them, they are read whole.
"""

from __future__ import annotations

from collections.abc import Iterator

_RATES_HZ = (44_100, 48_000, 32_000)  # MPEG-1; MPEG-2 has half of it, MPEG-2.5 a quarter
_KBITS_1 = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)  # 0 is the free format
_KBITS_2 = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
_ROOMY = 9  # index of a bit rate whose frames hold the header at every sample rate


def skip_tag(start: bytes) -> int:
    """Where the first frame of a file with these first 10 bytes stands: 0, or behind an ID3v2 tag."""
    size = sum(byte << 7 * n for n, byte in enumerate(start[9:5:-1]))
    return 10 + size if start.startswith(b"ID3") else 0


def with_header(content: bytes) -> bytes | None:
    """The same frames behind a header that says how many there are.

    None unless whole layer III frames of one kind fill the file, but for an ID3 or APE tag around them: then
    its length is unknown (the free format), or it is cut off or damaged.
    """
    first = skip_tag(content[:10])
    ends = list(_frame_ends(content, first))
    rest = content[ends[-1] if ends else first :]
    if not ends or rest.strip(b"\0") and not rest.startswith((b"TAG", b"APETAGEX")):
        return None
    return _header(content[first : first + 4], len(ends)) + content[first : ends[-1]]


def _frame_ends(content: bytes, at: int) -> Iterator[int]:
    """Where each whole frame ends, one behind the other, while they are of the first one's kind."""
    kind = content[at : at + 2], content[at + 2 : at + 3]
    while (size := _frame_bytes(content[at : at + 4])) and at + size <= len(content):
        if content[at : at + 2] != kind[0] or (content[at + 2] ^ kind[1][0]) & 0b1100:
            return
        at += size
        yield at


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


def _header(head: bytes, frames: int) -> bytes:
    """A silent first frame that holds Xing's count of the frames after it."""
    bits = bytes((head[0], head[1] | 1, head[2] & 0b1100 | _ROOMY << 4, head[3]))  # no checksum, no padding
    is_first, is_mono = head[1] >> 3 & 3 == 3, head[3] >> 6 == 3
    side_information = (17 if is_mono else 32) if is_first else (9 if is_mono else 17)
    count = b"Xing" + (1).to_bytes(4, "big") + frames.to_bytes(4, "big")
    return (bits + bytes(side_information) + count).ljust(_frame_bytes(bits), b"\0")

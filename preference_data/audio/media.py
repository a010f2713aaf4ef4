"""Formats that libsndfile does not read, decoded by FFmpeg: M4A, AAC, WebM, WMA, AMR and their kin.

Optional: `pip install 'audio-align[media]'` brings PyAV. Why not torchcodec: it imports torch, and wants an
FFmpeg on the machine. Why not the `ffmpeg` program: versions differ, and it hides gaps. PyAV's wheels carry
an FFmpeg of their own, pinned with all other versions, and give frames with their times.

FFmpeg is told the format, found by the file's first bytes. It must not guess: playlists and the like would
make it open other files and addresses.
"""

from __future__ import annotations

import os
from io import FileIO
from typing import Any, NamedTuple

import numpy as np

from preference_data.audio.clip_files import BadContent

_MAX_CHANNELS = 8
_LONGEST_GAP_S = 0.1
"""Browsers and phones time their frames to the millisecond, and encoders fill up the last frame."""
_UNPLAYED = 3  # frames; encoders begin with silence, which is not played
_KINDS = (  # offset and bytes of a file's start, FFmpeg's name of the format, ours
    (4, b"ftyp", "mov", "M4A/MP4"),
    (4, b"moov", "mov", "QuickTime"),
    (4, b"mdat", "mov", "QuickTime"),
    (0, b"\x1a\x45\xdf\xa3", "matroska", "WebM/Matroska"),
    (0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "asf", "WMA"),
    (0, b"#!AMR", "amr", "AMR"),
    (28, b"aac ", "caf", "CAF/AAC"),
    (28, b"opus", "caf", "CAF/Opus"),
    (0, b"wvpk", "wv", "WavPack"),
    (0, b"MAC ", "ape", "Monkey's Audio"),
    (0, b"FLV\x01", "flv", "Flash video"),
)
_MATROSKA_PARENTS = (b"\x18\x53\x80\x67", b"\x1f\x43\xb6\x75")  # Segment, Cluster
_AMR_BYTES = {  # of a frame by its type (RFC 4867), behind the byte that says it
    b"#!AMR\n": (12, 13, 15, 17, 19, 20, 26, 31, 5, 6, 5, 5, 0, 0, 0, 0),
    b"#!AMR-WB\n": (17, 23, 32, 36, 40, 46, 50, 58, 60, 5, 5, 0, 0, 0, 0, 0),
}


class Kind(NamedTuple):
    """A format: FFmpeg's name of it, and one for people."""

    demuxer: str
    name: str


class _Seekable:
    """A file that FFmpeg reads; places before its beginning, which damaged files name, are its beginning."""

    def __init__(self, file: FileIO) -> None:
        self.read, self.tell, self._file = file.read, file.tell, file
        file.seek(0)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        size = os.fstat(self._file.fileno()).st_size
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self.tell(), os.SEEK_END: size}[whence]
        return self._file.seek(max(0, start + offset))


class Sound(NamedTuple):
    """Decoded samples, float32 (frames, channels), their rate in Hz, and container and coding."""

    samples: np.ndarray
    rate: int
    format: str


def kind_of(start: bytes) -> Kind | None:
    """The format of a file with these first 64 bytes, if FFmpeg is to read it."""
    if len(start) > 1 and start[0] == 0xFF and start[1] & 0xF6 == 0xF0:  # AAC's frames, of no layer
        return Kind("aac", "AAC")
    return next((Kind(*names) for at, mark, *names in _KINDS if start[at:].startswith(mark)), None)


def read(file: FileIO, kind: Kind, *, max_duration_s: float) -> Sound:
    """Decode the first sound of a file, no more than `max_duration_s` of it.

    Raises:
        BadContent: `unsupported_format` without PyAV; as `decode.load`.
    """
    try:
        import av
    except ImportError as error:
        how = f"is {kind.name}, which `pip install 'audio-align[media]'` reads"
        raise BadContent("unsupported_format", how) from error
    _check_structure(file, kind)
    try:
        with av.open(_Seekable(file), format=kind.demuxer, metadata_errors="ignore") as container:
            if (stream := container.streams.best("audio")) is None:
                raise BadContent("unreadable", "holds no sound")
            stream.thread_type = "NONE"
            seconds = float((container.duration or 0) / av.time_base)
            if stream.duration is not None:
                seconds = float(stream.duration * stream.time_base)
            if seconds > max_duration_s + _LONGEST_GAP_S:
                raise BadContent("too_long", f"{seconds:.1f} s, the limit is {max_duration_s:g} s")
            blocks, rate = _decoded(container, stream, max_duration_s)
            is_pcm = stream.codec_context.name.startswith("pcm_")  # whose samples are counted, not its frames
            missing = stream.frames - (sum(block.shape[1] for block in blocks) if is_pcm else len(blocks))
            if missing > _UNPLAYED:  # MP4 only: an edit list leaves them out, or its times are damaged
                raise BadContent("corrupt", f"{missing} of its {stream.frames} frames are not played")
            coding = f"{kind.demuxer}/{stream.codec_context.name}".upper()
    except av.FFmpegError as error:
        raise BadContent("corrupt", f"cut off or damaged ({error.strerror})") from error
    samples = np.concatenate(blocks, axis=1).T if blocks else np.zeros((0, 1), np.float32)
    if len(samples) / rate < seconds - _LONGEST_GAP_S:
        raise BadContent("truncated", f"promises {seconds:.2f} s, has {len(samples) / rate:.2f}")
    return Sound(np.ascontiguousarray(samples), rate, coding)


def _decoded(container: Any, stream: Any, max_duration_s: float) -> tuple[list[np.ndarray], int]:
    """Samples (channels, n) frame by frame, channels as they are, and their rate in Hz; no gap in time."""
    import av

    blocks: list[np.ndarray] = []
    n, following_s, form = 0, None, None
    to_float = av.AudioResampler("fltp")
    for frame in container.decode(stream):
        form = form or (frame.sample_rate, frame.layout.name)
        if (frame.sample_rate, frame.layout.name) != form:
            raise BadContent("corrupt", "its sample rate or its channels change")
        if frame.layout.nb_channels > _MAX_CHANNELS:
            raise BadContent("too_many_channels", f"{frame.layout.nb_channels}, the limit is {_MAX_CHANNELS}")
        if following_s is not None and frame.time is not None:
            if abs(frame.time - following_s) > _LONGEST_GAP_S:
                raise BadContent(
                    "corrupt", f"between {following_s:.2f} and {frame.time:.2f} s sound is missing"
                )
        n += frame.samples
        following_s = (frame.time or 0.0) + frame.samples / frame.sample_rate
        if n > (max_duration_s + _LONGEST_GAP_S) * frame.sample_rate:
            raise BadContent("too_long", f"more than {max_duration_s:g} s")
        frame.pts = None
        blocks += [part.to_ndarray() for part in to_float.resample(frame)]
    return blocks, form[0] if form else 1


# -------------------------------------------------------------------------- wholeness, which FFmpeg ignores


def _check_structure(file: FileIO, kind: Kind) -> None:
    ends = {"mov": _end_of_mov, "matroska": _end_of_matroska, "amr": _end_of_amr, "aac": _end_of_aac}
    size = os.fstat(file.fileno()).st_size
    if kind.demuxer in ends and (end := ends[kind.demuxer](file, size)) != size:
        if end > size:
            raise BadContent("truncated", f"has {size} bytes, its structure is longer")
        raise BadContent("corrupt", f"what is at byte {end} is no part of it")


def _end_of_mov(file: FileIO, size: int) -> int:
    """Where the last box ends, or another file begins (ISO/IEC 14496-12, section 4.2)."""
    at = 0
    while len(header := os.pread(file.fileno(), 16, at)) >= 8 and (at == 0 or header[4:8] != b"ftyp"):
        length = int.from_bytes(header[:4], "big")
        at = size if not length else at + (int.from_bytes(header[8:], "big") if length == 1 else length)
    return at


def _end_of_matroska(file: FileIO, size: int) -> int:
    """Where the last element ends, or what is none stands (RFC 8794); segments and clusters are entered."""
    at, latest = 0, 0
    while at < size:
        header = os.pread(file.fileno(), 12, at)
        width = 9 - header[0].bit_length()
        length_at = header[width:]
        length_width = 9 - length_at[0].bit_length() if length_at else 9
        if width > 4 or length_width > 8:
            return at
        length = int.from_bytes(length_at[:length_width], "big") & (1 << 7 * length_width) - 1
        is_unknown = length == (1 << 7 * length_width) - 1
        at += width + length_width
        if not is_unknown:
            latest = max(latest, at + length)
        if header[:width] not in _MATROSKA_PARENTS:
            if is_unknown:
                return at
            at += length
    return max(at, latest)


def _end_of_amr(file: FileIO, size: int) -> int:
    content = os.pread(file.fileno(), size, 0)
    for mark, sizes in _AMR_BYTES.items():
        if content.startswith(mark):
            at = len(mark)
            while at < size and not content[at] & 0b1000_0011:
                at += 1 + sizes[content[at] >> 3 & 15]
            return at
    return 0


def _end_of_aac(file: FileIO, size: int) -> int:
    """Where the last frame ends; a tag of ID3 may follow (ISO/IEC 13818-7, section 6.2)."""
    at = 0
    while at < size:
        header = os.pread(file.fileno(), 7, at)
        if header.startswith(b"TAG") and at + 128 == size:
            return size
        if header[0] != 0xFF or len(header) > 1 and header[1] & 0xF6 != 0xF0:
            return at
        header = header.ljust(7, b"\0")
        at += max(7, (header[3] & 3) << 11 | header[4] << 3 | header[5] >> 5)
    return at

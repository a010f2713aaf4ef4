"""Any audio file -> 16 kHz mono float32, or a reason why not.

Files are untrusted: headers are bounded before a sample is decoded, samples are checked, and `audit`
decodes a whole corpus in processes that may crash or hang without harm.

The decoder is always libsndfile: another one changes the samples (FFmpeg mixes stereo 1.41 times
louder). It takes half a WAV, Ogg or MP3 for a whole file, so what their headers say of their length is
checked.
"""

from __future__ import annotations

import hashlib
import os
import struct
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from io import BytesIO, FileIO
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import soundfile
import soxr

from preference_data.audio import mp3
from preference_data.audio.clip_files import BadAudio, ClipFile, Reason
from preference_data.audio.isolation import Died, in_order
from preference_data.audio.tar_shards import BadShard

SAMPLE_RATE = 16_000  # Hz, of everything `load` returns

Depth = Literal["header", "samples"]
"""How far a file is looked at. By its header alone is about ten times faster, and takes half a FLAC for a
whole file; by its samples, nothing that a training run cannot read gets through."""

_FORMATS = ("WAV", "WAVEX", "FLAC", "OGG", "MP3")
_LOWEST_HZ, _HIGHEST_HZ, _MAX_CHANNELS = 4_000, 192_000, 8
_MAX_PEAK = 100.0  # full scale is 1; floating-point files may exceed it, but not by that much
_MAX_CHUNKS = 1000  # before a WAV's sound
_MAX_COUNTED_BYTES = 100_000_000  # of an MP3 whose frames are counted in memory: 40 minutes at 320 kbit/s
_OGG_PAGE = 27 + 255 + 255 * 255  # bytes of the largest one
_UNKNOWN_FRAMES, _UNKNOWN_BYTES = 2**63 - 1, 2**32 - 1  # by libsndfile; by a WAV written to a pipe
_TELLTALES = (  # offset, bytes and meaning of files that often stand where audio should
    (0, b"version https://git-lfs", "is a git-lfs pointer; run `git lfs pull`"),
    (0, b"<", "is a web page, so the download failed; fetch the file again"),
    (0, b"#EXTM3U", "is a playlist; fetch the audio that it lists"),
    (4, b"ftyp", "is MP4/M4A; convert it to WAV or FLAC, e.g. with ffmpeg"),
    (0, b"\x1a\x45\xdf\xa3", "is Matroska/WebM; convert it to WAV or FLAC, e.g. with ffmpeg"),
)


class AudioInfo(NamedTuple):
    """A file's header: `frames` are samples per channel, `sha256` is of its bytes.

    `format` is container and coding by the bytes, not by the name, e.g. "WAV/PCM_16".
    """

    duration_s: float
    sample_rate_hz: int
    channels: int
    frames: int
    format: str
    sha256: str


class Quarantined(NamedTuple):
    """A record whose audio was refused."""

    id: str
    path: str
    code: Reason
    detail: str


def inspect(clip: ClipFile, *, max_duration_s: float) -> AudioInfo:
    """Check a file by its header, without decoding it, and hash it.

    Raises:
        BadAudio: the file is missing, unreadable, cut off, or outside the bounds.
    """
    with _opened(clip, max_duration_s) as (file, sound):
        return _describe(file, sound)


def load(clip: ClipFile, *, max_duration_s: float) -> np.ndarray:
    """Decode a file to 16 kHz mono: channels averaged, rate converted by soxr HQ (as `transformers` does).

    Returns:
        float32 samples, shape (n,), n >= 1; full scale is [-1, 1].

    Raises:
        BadAudio: as `inspect`, and for samples that are damaged, too few, not finite or far too loud.
    """
    with _opened(clip, max_duration_s) as (_, sound):
        return soxr.resample(_decode(clip, sound).mean(axis=1), sound.samplerate, SAMPLE_RATE, quality="HQ")


def audit(
    find: Callable[[str], ClipFile],
    clips: Iterable[tuple[str, str]],
    *,
    max_duration_s: float,
    file_timeout_s: float = 20.0,
    on_progress: Callable[[int], None] | None = None,
) -> tuple[dict[str, AudioInfo], list[Quarantined]]:
    """Decode every clip once, in worker processes, and tell good ones from bad ones.

    Args:
        find: Where the clip of a path is, e.g. `Dataset(folder).find`; used in worker processes.
        clips: (record id, path) pairs; ids are distinct.
        max_duration_s: Longest clip, in seconds.
        file_timeout_s: Longest time a file may take, in seconds; a file that takes longer is refused.
        on_progress: Called with the number of clips checked so far.

    Returns:
        The good clips by record id and the refused ones, both in the order of `clips`.

    Raises:
        ValueError: a record id comes twice.
        RuntimeError: no process starts; the calling script must guard its `__main__`.
    """
    clips = list(clips)
    if twice := [record for record, n in Counter(record for record, _ in clips).items() if n > 1]:
        raise ValueError(f"record id {twice[0]!r} comes more than once; audit each clip once")
    outcomes = examine(
        find,
        (path for _, path in clips),
        by="samples",
        max_duration_s=max_duration_s,
        file_timeout_s=file_timeout_s,
    )
    good: dict[str, AudioInfo] = {}
    refused: list[Quarantined] = []
    for number, (clip, outcome) in enumerate(zip(clips, outcomes, strict=True), start=1):
        if isinstance(outcome, BadAudio):
            refused.append(Quarantined(*clip, outcome.code, outcome.detail))
        else:
            good[clip[0]] = outcome
        if on_progress is not None:
            on_progress(number)
    return good, refused


def examine(
    find: Callable[[str], ClipFile],
    paths: Iterable[str],
    *,
    by: Depth,
    max_duration_s: float,
    file_timeout_s: float = 20.0,
) -> Iterator[AudioInfo | BadAudio]:
    """Describe each file, or why it is refused, in the order of `paths`; in worker processes.

    `paths` is read as files are finished, so it may be longer than memory; the rest is as in `audit`.

    Raises:
        RuntimeError: no process starts; the calling script must guard its `__main__`.
    """
    verify = partial(_verify, find=find, max_duration_s=max_duration_s, by=by)
    for path, outcome in in_order(verify, paths, file_timeout_s):
        yield _blame(path, outcome) if isinstance(outcome, Died) else outcome


def _verify(
    path: str, find: Callable[[str], ClipFile], max_duration_s: float, by: Depth
) -> AudioInfo | BadAudio:
    """Check a file, in a worker."""
    try:
        clip = find(path)
        with _opened(clip, max_duration_s) as (file, sound):
            if by == "samples":
                _decode(clip, sound)
            return _describe(file, sound)
    except BadAudio as error:
        return error


@contextmanager
def _opened(clip: ClipFile, max_duration_s: float) -> Iterator[tuple[FileIO, soundfile.SoundFile]]:
    """Open a clip, once for its hash, header and samples, and refuse it if it is outside the bounds."""
    try:
        with _file(clip) as file, _sound(clip, file) as sound:
            _check_end(clip, file, sound)
            _check_bounds(clip, sound, max_duration_s)
            yield file, sound
    except FileNotFoundError:
        raise BadAudio(clip, "missing", "does not exist; check the manifest and the root") from None
    except OSError as error:
        raise BadAudio(clip, "unreadable", f"{error.strerror}; check its rights and the disk") from error


def _file(clip: ClipFile) -> FileIO:
    """A clip's bytes as a file; those of a shard's member as a file in memory: all go the same way."""
    if isinstance(clip, Path):
        if clip.exists() and not clip.is_file():  # opening a pipe would wait for its writer
            raise BadAudio(clip, "not_a_file", "is a folder or a device; name an audio file")
        return clip.open("rb", buffering=0)
    try:
        data = clip.read()
    except BadShard as error:
        raise BadAudio(clip, "truncated", str(error)) from error
    on_disk = tempfile.TemporaryFile(buffering=0) if not hasattr(os, "memfd_create") else None
    file = on_disk or FileIO(os.memfd_create("clip"), "r+b")
    file.write(data)
    file.seek(0)
    return file


def _sound(path: ClipFile, file: FileIO) -> soundfile.SoundFile:
    if not os.pread(file.fileno(), 1, 0):
        raise BadAudio(path, "empty_file", "has 0 bytes; fetch it again")
    try:  # by descriptor: given a name, libsndfile would take any bytes called *.vox for audio
        sound = soundfile.SoundFile(file.fileno(), closefd=False)
    except soundfile.LibsndfileError as error:
        start = os.pread(file.fileno(), 64, 0)
        known = [meaning for offset, mark, meaning in _TELLTALES if start[offset:].startswith(mark)]
        problem = (known or ["is not audio, or its header is damaged; fetch it again"])[0]
        raise BadAudio(path, "unreadable", f"{problem} ({error.error_string})") from error
    is_guess = sound.format == "MP3" and not _has_xing_header(file)
    return _counted(path, file) if is_guess else sound


def _counted(path: ClipFile, file: FileIO) -> soundfile.SoundFile:
    """An MP3 that does not say its length, with the header that does put before it."""
    whole = None
    if os.fstat(file.fileno()).st_size <= _MAX_COUNTED_BYTES:
        file.seek(0)
        whole = mp3.with_header(file.readall())
    if whole is None:
        detail = "says no length, and whole frames do not fill it; fetch it again, or convert it to a file"
        raise BadAudio(path, "unknown_length", detail)
    return soundfile.SoundFile(BytesIO(whole))


def _check_bounds(path: ClipFile, sound: soundfile.SoundFile, max_duration_s: float) -> None:
    """Refuse by the header, before memory for the samples is taken."""
    refuse = partial(BadAudio, path)
    rate, frames = sound.samplerate, sound.frames
    if sound.format not in _FORMATS:
        raise refuse("unsupported_format", f"{sound.format} is not one of {_FORMATS}; convert it to FLAC")
    if not _LOWEST_HZ <= rate <= _HIGHEST_HZ:
        raise refuse("bad_sample_rate", f"{rate} Hz is not in {_LOWEST_HZ}..{_HIGHEST_HZ}; resample it")
    if sound.channels > _MAX_CHANNELS:
        raise refuse("too_many_channels", f"{sound.channels}, the limit is {_MAX_CHANNELS}; mix it down")
    if round(frames * SAMPLE_RATE / rate) < 1:
        raise refuse("empty_audio", f"{frames} samples at {rate} Hz; cut or record it again")
    if frames > max_duration_s * rate:
        raise refuse("too_long", f"{frames / rate:.1f} s, the limit is {max_duration_s:g} s; cut it")


def _check_end(path: ClipFile, file: FileIO, sound: soundfile.SoundFile) -> None:
    """Refuse files of unknown length and cut-off WAV and Ogg files; libsndfile would take them."""
    refuse, size = partial(BadAudio, path), os.fstat(file.fileno()).st_size
    promised, there = _wav_bytes(path, file, size) if sound.format in ("WAV", "WAVEX") else (0, 0)
    if sound.frames == _UNKNOWN_FRAMES or promised == _UNKNOWN_BYTES:
        raise refuse(
            "unknown_length", "its header says no length; convert it again, to a file and not to a pipe"
        )
    if promised > there:
        raise refuse("truncated", f"promises {promised} bytes of sound, has {there}; fetch it again")
    if sound.format == "OGG" and not _ends_ogg_stream(file, size):
        raise refuse("truncated", f"its {size} bytes stop before the stream ends; fetch it again")


def _wav_bytes(path: ClipFile, file: FileIO, size: int) -> tuple[int, int]:
    """How many bytes of sound the header of a WAV file promises, and how many there are."""
    order = {b"RIFF": "<", b"RIFX": ">"}.get(os.pread(file.fileno(), 4, 0))
    at = 12
    for _ in range(_MAX_CHUNKS if order else 0):
        header = os.pread(file.fileno(), 8, at)
        if len(header) < 8:
            break
        name, length = struct.unpack(f"{order}4sI", header)
        if name == b"data":
            return length, size - at - 8
        at += 8 + length + length % 2
    raise BadAudio(path, "unreadable", f"no data in its first {_MAX_CHUNKS} RIFF chunks; write it again")


def _ends_ogg_stream(file: FileIO, size: int) -> bool:
    """Whether the last page of an Ogg file is whole and marked as the last (RFC 3533, section 6)."""
    tail = os.pread(file.fileno(), _OGG_PAGE, max(0, size - _OGG_PAGE))
    page = tail[max(0, tail.rfind(b"OggS")) :].ljust(27, b"\0")
    lengths_end = 27 + page[26]
    return bool(page[5] & 4) and len(page) >= lengths_end + sum(page[27:lengths_end])


def _has_xing_header(file: FileIO) -> bool:
    """Whether an MP3 says its length; else libsndfile guesses it, and may drop half of the sound."""
    start = os.pread(file.fileno(), 4096, mp3.skip_tag(os.pread(file.fileno(), 10, 0)))
    return b"Xing" in start or b"Info" in start


def _describe(file: FileIO, sound: soundfile.SoundFile) -> AudioInfo:
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    rate, frames = sound.samplerate, sound.frames
    return AudioInfo(frames / rate, rate, sound.channels, frames, f"{sound.format}/{sound.subtype}", digest)


def _decode(path: ClipFile, sound: soundfile.SoundFile) -> np.ndarray:
    """All samples, float32, shape (frames, channels): as many as promised, finite, of sane level."""
    refuse = partial(BadAudio, path)
    try:
        samples: np.ndarray = sound.read(sound.frames, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise refuse("corrupt", f"cut off or damaged ({error.error_string}); fetch it again") from error
    except MemoryError as error:
        raise refuse("too_large", f"{sound.frames} samples do not fit into memory; cut it") from error
    if len(samples) != sound.frames:
        raise refuse("truncated", f"promises {sound.frames} samples, has {len(samples)}; fetch it again")
    peak = float(max(samples.max(), -samples.min()))  # NaN if any sample is
    if not np.isfinite(peak):
        bad = int(np.count_nonzero(~np.isfinite(samples)))
        raise refuse("non_finite", f"{bad} of {samples.size} samples are NaN or infinite; make it again")
    if peak > _MAX_PEAK:
        raise refuse("bad_level", f"peak {peak:g}, the limit is {_MAX_PEAK:g}; scale it to [-1, 1]")
    return samples


def _blame(path: str, death: Died) -> BadAudio:
    if death.of_timeout:
        return BadAudio(path, "decoder_hung", "took too long to decode; leave it out or convert it")
    return BadAudio(path, "decoder_crashed", f"killed two decoders (exit {death.exit_code}); leave it out")

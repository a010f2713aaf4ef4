"""Any audio file -> 16 kHz mono float32, or a reason why not.

Files are untrusted: headers are bounded before a sample is decoded, samples are checked, and `audit`
decodes a whole corpus in processes that may crash or hang without harm.

libsndfile decodes what it can: another one changes the samples (FFmpeg mixes stereo 1.41 times louder). It
takes half a file for a whole one, so what `containers` and `mp3` read of a file's length is checked. What it
cannot decode, FFmpeg may, see `media`.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shlex
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from io import BytesIO, FileIO
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

import numpy as np
import soundfile
import soxr

from preference_data.audio import containers, media, mp3
from preference_data.audio.clip_files import BadAudio, BadContent, ClipFile, Reason, missing
from preference_data.audio.isolation import Died, WorkerPool, in_order
from preference_data.audio.tar_shards import BadShard

log = logging.getLogger(__name__)
SAMPLE_RATE = 16_000  # Hz, of everything `load` returns

Depth = Literal["header", "samples"]
"""How far a file is looked at. By its header alone is about ten times faster, and takes half a FLAC for a
whole file; by its samples, nothing that a training run cannot read gets through."""

_WITH_STRUCTURE = ("WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "CAF", "OGG")
_FORMATS = (*_WITH_STRUCTURE, "FLAC", "MP3")
_LOWEST_HZ, _HIGHEST_HZ, _MAX_CHANNELS = 4_000, 192_000, 8
_MAX_PEAK = 100.0  # full scale is 1; floating-point files may exceed it, but not by that much
_LISTED = 3  # odd clips in the log
_SILENT = 2.0**-16  # peak; half of a 16-bit step
_CANCELLED = 1e-4  # power of the mix to that of the channels, -40 dB
_MAX_COUNTED_BYTES = 100_000_000  # of an MP3 that gets another header in memory: 40 minutes at 320 kbit/s
_UNKNOWN_FRAMES = 2**63 - 1  # by libsndfile
_TELLTALES = (  # the start of files that often stand where audio should
    (b"version https://git-lfs", "is a git-lfs pointer: run `git lfs pull`"),
    (b"<", "is a web page, so the download failed"),
    (b"{", "is JSON, so the download failed"),
    (b"#EXTM3U", "is a playlist: fetch the audio that it lists"),
    (b"\x1f\x8b", "is compressed: unpack it"),
    (b"PK\x03\x04", "is a zip archive: unpack it"),
)


WARNINGS = {
    "silent": "is digital silence; listen to it, and leave it out",
    "antiphase": "its channels cancel each other, so that the mix is silent; keep one of them, by "
    "`ffmpeg -i FILE -af 'pan=mono|c0=c0' OUT.flac`",
}
"""What is odd about a clip that can be read all the same, by code."""


class AudioInfo(NamedTuple):
    """A file's header: `frames` are samples per channel, `sha256` is of its bytes.

    `format` is container and coding by the bytes, not by the name, e.g. "WAV/PCM_16". `warnings` are keys of
    `WARNINGS`, found in the samples where they were looked at.
    """

    duration_s: float
    sample_rate_hz: int
    channels: int
    frames: int
    format: str
    sha256: str
    warnings: tuple[str, ...] = ()


class Quarantined(NamedTuple):
    """A record whose audio was refused, or, with a key of `WARNINGS`, is odd."""

    id: str
    path: str
    code: str
    detail: str


def beyond(duration_s: float, limit_s: float) -> str:
    """A length and the limit that it exceeds, with as many digits as show that it does."""
    digits = next((n for n in range(1, 9) if round(duration_s, n) > limit_s), 9)
    return f"{duration_s:.{digits}f} s, the limit is {limit_s:.10g} s"


def advice_on_length(refused: Iterable[Quarantined]) -> str:
    """Which keys of a recipe let longer clips in; empty where none of the refused ones is too long."""
    if all(item.code != "too_long" for item in refused):
        return ""
    return (
        ". Or let clips be longer: raise the corpus' max_duration_s, and with it clip_s of a model that "
        "starts from random weights (Qwen2-Audio hears 30 s)"
    )


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


class DecoderPool:
    """`load` in processes that stay, for clips of strangers that come one at a time, from several threads.

    Args:
        workers: processes; they end with `close`, or with this process.
        max_duration_s: longest clip, in seconds.
        file_timeout_s: longest time a clip may take, in seconds.
    """

    def __init__(self, workers: int, *, max_duration_s: float, file_timeout_s: float = 20.0) -> None:
        work = partial(_load, max_duration_s=max_duration_s)
        self._pool = WorkerPool(work, file_timeout_s, workers)

    def load(self, clip: ClipFile) -> np.ndarray:
        """As `load`.

        Raises:
            BadAudio: as `load`; `decoder_hung` or `decoder_crashed`.
        """
        result = self._pool.run(clip)
        if isinstance(result, Died) and not result.of_timeout:  # perhaps for another's sake: memory ran out
            result = self._pool.run(clip)
        if isinstance(result, Died):
            raise _blame(str(clip), result)
        if isinstance(result, BadAudio):
            raise result
        return result

    def close(self) -> None:
        """End the processes; no clip may be with them."""
        self._pool.close()


def _load(clip: ClipFile, max_duration_s: float) -> np.ndarray | BadAudio:
    """Decode a clip, in a worker."""
    try:
        return load(clip, max_duration_s=max_duration_s)
    except BadAudio as error:
        return error


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
    if strange := odd(good, dict(clips)):
        listed = ", ".join(f"{item.path}: {item.code}" for item in strange[:_LISTED])
        log.warning("%d of %d clips are odd: %s", len(strange), len(clips), listed)
    return good, refused


def odd(good: Mapping[str, AudioInfo], paths: Mapping[str, str]) -> list[Quarantined]:
    """The warnings about good clips; `paths` are by record id, as `good` is."""
    return [
        Quarantined(record, paths[record], code, WARNINGS[code])
        for record, info in good.items()
        for code in info.warnings
    ]


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
            warnings = _warnings(_decode(clip, sound)) if by == "samples" else ()
            return _describe(file, sound)._replace(warnings=warnings)
    except BadAudio as error:
        return error


class _Sound(NamedTuple):
    """An opened file: its header, and all its samples when they are wanted, shape (frames, channels)."""

    samplerate: int
    channels: int
    frames: int
    format: str
    read: Callable[[], np.ndarray]


@contextmanager
def _opened(clip: ClipFile, max_duration_s: float) -> Iterator[tuple[FileIO, _Sound]]:
    """Open a clip, once for its hash, header and samples, and refuse it if it is outside the bounds."""
    try:
        with _file(clip) as file, _sound(file, max_duration_s) as sound:
            _check_bounds(clip, sound, max_duration_s)
            yield file, sound
    except BadContent as error:
        raise BadAudio(clip, error.code, f"{error}; {_next_step(clip, error.code)}") from error
    except FileNotFoundError:
        raise missing(clip) from None
    except OSError as error:
        raise BadAudio(clip, "unreadable", f"{error.strerror}; check its rights and the disk") from error


def _next_step(clip: ClipFile, code: Reason) -> str:
    """What to do about a file whose content is refused."""
    name = PurePosixPath(clip.name)
    converted = f"{name.stem}-whole.flac" if name.suffix == ".flac" else f"{name.stem}.flac"
    command = f"ffmpeg -i {_quoted(name.name)} {_quoted(converted)}"
    match code:
        case "unsupported_format":
            return f"or convert it: {command}"
        case "unknown_length":
            return f"convert it, to a file and not to a pipe: {command}"
        case "unreadable":
            return f"fetch it again, or, if it plays elsewhere, convert it: {command}"
        case "corrupt":
            return f"fetch it again, or keep what can be decoded: {command}"
        case "too_long":
            return "cut it"
        case _:
            return "fetch it again"


def _quoted(name: str) -> str:
    """A file's name for a shell, and not an option."""
    return shlex.quote(f"./{name}" if name.startswith("-") else name)


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


@contextmanager
def _sound(file: FileIO, max_duration_s: float) -> Iterator[_Sound]:
    start = os.pread(file.fileno(), 64, 0)
    kind = media.kind_of(start)
    if not start:
        raise BadContent("empty_file", "has 0 bytes")
    if kind:
        samples, rate, coding = media.read(file, kind, max_duration_s=max_duration_s)
        yield _Sound(rate, samples.shape[1], len(samples), coding, lambda: samples)
        return
    is_checked = containers.check_length(file)
    try:  # by descriptor: given a name, libsndfile would take any bytes called *.vox for audio
        sound = soundfile.SoundFile(file.fileno(), closefd=False)
    except soundfile.LibsndfileError as error:
        known = [meaning for mark, meaning in _TELLTALES if start.lstrip().startswith(mark)]
        problem = (known or ["is not audio, or its header is damaged"])[0]
        raise BadContent("unreadable", f"{problem} ({error.error_string})") from error
    with sound if sound.format != "MP3" else _counted(file, sound) as sound:
        read = partial(_read_flac, file, sound) if sound.format == "FLAC" else partial(_read, sound)
        coding = f"{sound.format}/{sound.subtype}"
        if sound.format not in _FORMATS:
            raise BadContent("unsupported_format", f"{sound.format} is not one of {', '.join(_FORMATS)}")
        if sound.format in _WITH_STRUCTURE and not is_checked:
            raise BadContent("unreadable", "something stands before its header")
        if sound.frames == _UNKNOWN_FRAMES:
            raise BadContent("unknown_length", "its header says no length")
        yield _Sound(sound.samplerate, sound.channels, sound.frames, coding, read)


def _read(sound: soundfile.SoundFile) -> np.ndarray:
    samples: np.ndarray = sound.read(sound.frames, dtype="float32", always_2d=True)
    return samples


def _read_flac(file: FileIO, sound: soundfile.SoundFile) -> np.ndarray:
    """Samples of a FLAC, which must have the MD5 that its header says (RFC 9639, section 8.2)."""
    samples, content = _read(sound), os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0)
    if (second := content.find(b"fLaC\0\0\0\x22", 8)) > 0:
        raise BadContent("corrupt", f"another file begins at byte {second}")
    width, md5 = {"PCM_S8": 1, "PCM_16": 2, "PCM_24": 3}[sound.subtype], content[26:42]
    integers = (samples * 2.0 ** (8 * width - 1)).astype("<i4").reshape(-1, 1).view(np.uint8)
    actual = hashlib.md5(integers[:, :width].tobytes(), usedforsecurity=False).digest()
    if content.startswith(b"fLaC") and any(md5) and md5 != actual:
        raise BadContent("corrupt", "its sound is not what its header signs (MD5)")
    return samples


def _counted(file: FileIO, sound: soundfile.SoundFile) -> soundfile.SoundFile:
    """An MP3 as libsndfile counts it, or, if it miscounts, with another header put before its frames."""
    frames = mp3.read_frames(file)
    if frames.is_plain:
        return sound
    if os.fstat(file.fileno()).st_size > _MAX_COUNTED_BYTES:
        raise BadContent("unknown_length", "its header does not say how many frames there are")
    sound.close()
    return soundfile.SoundFile(BytesIO(frames.whole(file)))


def _check_bounds(path: ClipFile, sound: _Sound, max_duration_s: float) -> None:
    """Refuse by the header, before memory for the samples is taken."""
    refuse = partial(BadAudio, path)
    rate, frames = sound.samplerate, sound.frames
    if not _LOWEST_HZ <= rate <= _HIGHEST_HZ:
        raise refuse("bad_sample_rate", f"{rate} Hz is not in {_LOWEST_HZ}..{_HIGHEST_HZ}; resample it")
    if sound.channels > _MAX_CHANNELS:
        raise refuse("too_many_channels", f"{sound.channels}, the limit is {_MAX_CHANNELS}; mix it down")
    if round(frames * SAMPLE_RATE / rate) < 1:
        raise refuse("empty_audio", f"{frames} samples at {rate} Hz; cut or record it again")
    if frames > max_duration_s * rate:
        raise refuse("too_long", f"{beyond(frames / rate, max_duration_s)}; cut it")


def _describe(file: FileIO, sound: _Sound) -> AudioInfo:
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    rate, frames = sound.samplerate, sound.frames
    return AudioInfo(frames / rate, rate, sound.channels, frames, sound.format, digest)


def _decode(path: ClipFile, sound: _Sound) -> np.ndarray:
    """All samples, float32, shape (frames, channels): as many as promised, finite, of sane level."""
    refuse = partial(BadAudio, path)
    try:
        samples = sound.read()
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


def _warnings(samples: np.ndarray) -> tuple[str, ...]:
    """What is odd about samples, shape (frames, channels)."""
    if float(np.abs(samples).max()) < _SILENT:
        return ("silent",)
    mixed, apart = np.mean(samples.mean(axis=1) ** 2), np.mean(samples**2)
    return ("antiphase",) if mixed < _CANCELLED * apart else ()


def _blame(path: str, death: Died) -> BadAudio:
    if death.of_timeout:
        return BadAudio(path, "decoder_hung", "took too long to decode; leave it out or convert it")
    return BadAudio(path, "decoder_crashed", f"killed two decoders (exit {death.exit_code}); leave it out")

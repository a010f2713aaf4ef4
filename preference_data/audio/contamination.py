"""Was the benchmark heard in training? Clips that are the same audio on both sides.

Two files are the same audio when their bytes are, or when both decode to the same 16 kHz mono samples:
that catches copies under another name and lossless conversions (WAV to FLAC, PCM to float). It does not
catch lossy conversions, cuts, or another gain.

Clips of a dataset bear their sha256 and length, so only those as long as a clip of the benchmark are read.
Files are decoded in worker processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from typing import Literal, NamedTuple

import numpy as np

from preference_data.audio import decode
from preference_data.audio.clip_files import BadAudio, ClipFile
from preference_data.audio.isolation import Died, in_order

_MAX_DURATION_S = 24 * 3600.0
"""In effect no limit: clips longer than the benchmark's are not decoded, and workers bound the memory."""
_TIMEOUT_S = 60.0


class Clip(NamedTuple):
    """A clip to compare: its file, and what its record says of it, if it has one."""

    file: ClipFile
    sha256: str | None = None
    duration_s: float | None = None


class Overlap(NamedTuple):
    """A clip of the benchmark and one of the training sets that are the same audio, and how that shows."""

    benchmark: str
    trained: str
    by: Literal["bytes", "samples"]


class Contamination(NamedTuple):
    """The overlaps among `n_benchmark` and `n_trained` clips; `unreadable` ones could not be compared."""

    overlaps: tuple[Overlap, ...]
    n_benchmark: int
    n_trained: int
    unreadable: tuple[str, ...]

    @property
    def heard(self) -> int:
        """How many clips of the benchmark were heard in training."""
        return len({overlap.benchmark for overlap in self.overlaps})


class _Sound(NamedTuple):
    """The contents of a file: `samples` is a hash, `length` counts samples at 16 kHz."""

    sha256: str
    samples: str
    length: int


def find(
    benchmark: Mapping[str, Clip],
    trained: Mapping[str, Clip],
    *,
    on_progress: Callable[[int], None] | None = None,
) -> Contamination:
    """Compare every clip of the benchmark with every clip trained on.

    Args:
        benchmark: clips by a name that findings bear.
        trained: clips of all training and preference sets, likewise.
        on_progress: called with the number of clips compared so far.
    """
    unreadable: list[str] = []
    done = count(1)

    def report() -> None:
        if on_progress is not None:
            on_progress(next(done))

    def sounds(clips: Mapping[str, Clip]) -> Iterator[tuple[str, _Sound]]:
        """The contents of the files that can be read, in the order of `clips`."""
        outcomes = in_order(_sound, (clip.file for clip in clips.values()), _TIMEOUT_S)
        for name, (_, outcome) in zip(clips, outcomes, strict=True):
            if isinstance(outcome, _Sound):
                yield name, outcome
            else:
                unreadable.append(f"{name}: {'decoder_crashed' if isinstance(outcome, Died) else outcome}")
            report()

    by_bytes: dict[str, str] = {}
    by_samples: dict[str, str] = {}
    lengths: set[int] = set()
    for name, sound in sounds(benchmark):
        by_bytes.setdefault(sound.sha256, name)
        by_samples.setdefault(sound.samples, name)
        lengths |= {sound.length - 1, sound.length, sound.length + 1}  # lengths in records are rounded
    overlaps: dict[str, Overlap] = {}
    unclear: dict[str, Clip] = {}
    for name, clip in trained.items():
        if clip.sha256 in by_bytes:
            overlaps[name] = Overlap(by_bytes[str(clip.sha256)], name, "bytes")
        elif clip.duration_s is None or round(clip.duration_s * decode.SAMPLE_RATE) in lengths:
            unclear[name] = clip
            continue
        report()
    for name, sound in sounds(unclear):
        if sound.sha256 in by_bytes:
            overlaps[name] = Overlap(by_bytes[sound.sha256], name, "bytes")
        elif sound.samples in by_samples:
            overlaps[name] = Overlap(by_samples[sound.samples], name, "samples")
    in_turn = tuple(overlaps[name] for name in trained if name in overlaps)
    return Contamination(in_turn, len(benchmark), len(trained), tuple(unreadable))


def _sound(file: ClipFile) -> _Sound | str:
    """Read a file, in a worker; samples are compared as 16 bit: lossless conversions round them."""
    try:
        info = decode.inspect(file, max_duration_s=_MAX_DURATION_S)
        samples = decode.load(file, max_duration_s=_MAX_DURATION_S)
    except BadAudio as error:
        return error.code
    quantised = np.clip(np.round(samples * 32768.0), -32768, 32767).astype("<i2")
    length = round(info.frames * decode.SAMPLE_RATE / info.sample_rate_hz)
    return _Sound(info.sha256, hashlib.sha256(quantised.tobytes()).hexdigest(), length)

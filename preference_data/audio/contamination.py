"""Was the benchmark heard in training? Clips that are the same audio on both sides.

Two files are the same audio when their bytes are, or when both decode to the same 16 kHz mono samples:
that catches copies under another name and lossless conversions (WAV to FLAC, PCM to float). It does not
catch lossy conversions, cuts, or another gain.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import numpy as np

from preference_data.audio import decode
from preference_data.audio.clip_paths import ClipFile

_MAX_DURATION_S = 24 * 3600.0
"""Only clips as long as one of the benchmark's are decoded, so this bounds no memory."""


class Overlap(NamedTuple):
    """A clip of the benchmark and one of the training sets that are the same audio, and how one knows."""

    benchmark: str
    trained: str
    by: Literal["bytes", "samples"]


class Contamination(NamedTuple):
    """What was found among `n_benchmark` and `n_trained` clips; `unreadable` ones could not be compared."""

    overlaps: tuple[Overlap, ...]
    n_benchmark: int
    n_trained: int
    unreadable: tuple[str, ...]

    @property
    def heard(self) -> int:
        """How many clips of the benchmark were heard in training."""
        return len({one.benchmark for one in self.overlaps})


def find(
    benchmark: Mapping[str, ClipFile],
    trained: Mapping[str, ClipFile],
    *,
    on_progress: Callable[[int], None] | None = None,
) -> Contamination:
    """Compare every clip of the benchmark with every clip trained on.

    Args:
        benchmark: audio files by a name that is told in findings.
        trained: audio files of all training and preference sets, likewise.
        on_progress: called with the number of clips looked at so far.
    """
    unreadable: list[str] = []
    seen = 0

    def looked_at(name: str, error: decode.BadAudio | None = None) -> None:
        nonlocal seen
        seen += 1
        if error is not None:
            unreadable.append(f"{name}: {error.code}")
        if on_progress is not None:
            on_progress(seen)

    by_bytes: dict[str, str] = {}
    by_samples: dict[str, str] = {}
    lengths: set[int] = set()
    for name, path in benchmark.items():
        try:
            info = decode.inspect(path, max_duration_s=_MAX_DURATION_S)
            by_bytes.setdefault(info.sha256, name)
            by_samples.setdefault(_sound(path), name)
            lengths.add(_length(info))
            looked_at(name)
        except decode.BadAudio as error:
            looked_at(name, error)
    overlaps: list[Overlap] = []
    for name, path in trained.items():
        try:
            info = decode.inspect(path, max_duration_s=_MAX_DURATION_S)
            if info.sha256 in by_bytes:
                overlaps.append(Overlap(by_bytes[info.sha256], name, "bytes"))
            elif _length(info) in lengths and (same := by_samples.get(_sound(path))):
                overlaps.append(Overlap(same, name, "samples"))
            looked_at(name)
        except decode.BadAudio as error:
            looked_at(name, error)
    return Contamination(tuple(overlaps), len(benchmark), len(trained), tuple(unreadable))


def _length(info: decode.AudioInfo) -> int:
    """Samples at 16 kHz; a lossless conversion keeps rate and frames, so this is equal for equal sounds."""
    return round(info.frames * decode.SAMPLE_RATE / info.sample_rate_hz)


def _sound(path: ClipFile) -> str:
    """Hex sha256 of the decoded samples, as 16 bit: what a lossless conversion rounds is not told apart."""
    samples = decode.load(path, max_duration_s=_MAX_DURATION_S)
    quantised = np.clip(np.round(samples * 32768.0), -32768, 32767).astype("<i2")
    return hashlib.sha256(quantised.tobytes()).hexdigest()

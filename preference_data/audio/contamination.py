"""Was the benchmark heard in training? Clips that are the same audio on both sides.

Two files are the same audio when their bytes are, when both decode to the same 16 kHz mono samples (copies
under another name, WAV to FLAC, PCM to float), or when they sound the same (see `acoustic`: lossy coding,
another rate or gain, silence before it, cut ends). The first two are certain.

Clips of a dataset bear their sha256 and length: what is the same by bytes is not read, nor what is much
longer or shorter than every clip of the benchmark. Of the benchmark 2 kB a clip stay in memory, of the
training sets nothing. Files are decoded in worker processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import count
from typing import Literal, NamedTuple

import numpy as np

from preference_data.audio import acoustic, decode
from preference_data.audio.clip_files import BadAudio, ClipFile
from preference_data.audio.isolation import Died, in_order

_MAX_DURATION_S = 24 * 3600.0
"""In effect no limit: much longer clips than the benchmark's are not decoded; workers bound the memory."""
_SHORTEST, _LONGEST, _MORE_S = 0.5, 1.5, 3.0
"""A copy is at least this share as long as its clip, at most that share and so many seconds of silence."""
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
    by: Literal["bytes", "samples", "sound"]


class Contamination(NamedTuple):
    """The overlaps among `n_benchmark` and `n_trained` clips; `unreadable` ones could not be compared."""

    overlaps: tuple[Overlap, ...]
    n_benchmark: int
    n_trained: int
    unreadable: tuple[str, ...]

    @property
    def heard(self) -> int:
        """How many clips of the benchmark were heard in training, byte by byte or sample by sample."""
        return len(self._exact)

    @property
    def alike(self) -> int:
        """How many others only sound like a clip trained on."""
        return len({overlap.benchmark for overlap in self.overlaps} - self._exact)

    @property
    def _exact(self) -> set[str]:
        return {overlap.benchmark for overlap in self.overlaps if overlap.by != "sound"}


class _Sound(NamedTuple):
    """The contents of a file: `samples` is a hash, `length` counts samples at 16 kHz."""

    sha256: str
    samples: str
    length: int
    sketch: acoustic.Floats


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

    known = dict(sounds(benchmark))
    by_bytes = {sound.sha256: name for name, sound in reversed(known.items())}
    by_samples = {sound.samples: name for name, sound in reversed(known.items())}
    overlaps: dict[str, Overlap] = {}
    unclear: dict[str, Clip] = {}
    may_be_a_copy = _lengths(known)
    for name, clip in trained.items():
        if clip.sha256 in by_bytes:
            overlaps[name] = Overlap(by_bytes[str(clip.sha256)], name, "bytes")
        elif clip.duration_s is None or may_be_a_copy(clip.duration_s):
            unclear[name] = clip
            continue
        report()

    names = list(known)
    sketches = np.array([sound.sketch for sound in known.values()]).reshape(-1, acoustic.DIMENSIONS)
    candidates: list[tuple[str, str]] = []
    for name, sound in sounds(unclear):
        if sound.sha256 in by_bytes:
            overlaps[name] = Overlap(by_bytes[sound.sha256], name, "bytes")
        elif sound.samples in by_samples:
            overlaps[name] = Overlap(by_samples[sound.samples], name, "samples")
        else:
            near = np.flatnonzero(sketches @ sound.sketch >= acoustic.MAY_BE_ALIKE)
            candidates += [(names[i], name) for i in near]
    overlaps |= _alike(candidates, benchmark, trained)
    in_turn = tuple(overlaps[name] for name in trained if name in overlaps)
    return Contamination(in_turn, len(benchmark), len(trained), tuple(unreadable))


def _alike(
    candidates: list[tuple[str, str]], benchmark: Mapping[str, Clip], trained: Mapping[str, Clip]
) -> dict[str, Overlap]:
    """Of pairs of a clip of the benchmark and one trained on, those that sound the same; the best of each."""
    files = ((benchmark[ours].file, trained[theirs].file) for ours, theirs in candidates)
    outcomes = [outcome for _, outcome in in_order(_likeness, files, _TIMEOUT_S)]
    best: dict[str, tuple[float, str]] = {}
    for (ours, theirs), likeness in zip(candidates, outcomes, strict=True):
        if not isinstance(likeness, Died) and likeness >= acoustic.ALIKE:
            best[theirs] = max(best.get(theirs, (0.0, "")), (likeness, ours))
    return {theirs: Overlap(ours, theirs, "sound") for theirs, (_, ours) in best.items()}


def _lengths(known: Mapping[str, _Sound]) -> Callable[[float], bool]:
    """Whether a clip of so many seconds may be a copy of one of these."""
    seconds = [sound.length / decode.SAMPLE_RATE for sound in known.values()]
    shortest, longest = min(seconds, default=np.inf), max(seconds, default=0.0)
    return lambda duration_s: _SHORTEST * shortest <= duration_s <= _LONGEST * longest + _MORE_S


def _sound(file: ClipFile) -> _Sound | str:
    """Read a file, in a worker; samples are compared as 16 bit: lossless conversions round them."""
    try:
        info = decode.inspect(file, max_duration_s=_MAX_DURATION_S)
        samples = decode.load(file, max_duration_s=_MAX_DURATION_S)
    except BadAudio as error:
        return error.code
    quantised = np.clip(np.round(samples * 32768.0), -32768, 32767).astype("<i2")
    length = round(info.frames * decode.SAMPLE_RATE / info.sample_rate_hz)
    digest = hashlib.sha256(quantised.tobytes()).hexdigest()
    return _Sound(info.sha256, digest, length, acoustic.sketch(samples))


def _likeness(files: tuple[ClipFile, ClipFile]) -> float:
    """How alike two files sound, in a worker; both were read before."""
    load = partial(decode.load, max_duration_s=_MAX_DURATION_S)
    return acoustic.likeness(load(files[0]), load(files[1]))

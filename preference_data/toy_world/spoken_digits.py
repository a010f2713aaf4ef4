"""Strings of one to three spoken digits, from the recordings of the Free Spoken Digit Dataset.

3,000 recordings by 6 people, 8 kHz, `{digit}_{speaker}_{index}.wav`, CC BY-SA 4.0:
https://github.com/Jakobovski/free-spoken-digit-dataset. Training clips are strings of one speaker's
recordings, varied in speed, pitch, level and noise. The benchmark's speakers are in no training clip;
theirs are every recording on its own (source "recording") and strings (source "sequence").
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from scipy.signal import lfilter

from preference_data.audio import decode
from preference_data.audio.clip_files import BadAudio, list_files
from preference_data.audio.decode import SAMPLE_RATE, Quarantined
from preference_data.dataset.splits import SPLITS, HeldOut
from preference_data.schema import AudioClip, Facts, Split
from preference_data.toy_world.clip_files import ClipWriter, PreparedClips
from preference_data.toy_world.phrasebook import Phrasebook
from preference_data.toy_world.sounds import Samples, add

URL = "https://github.com/Jakobovski/free-spoken-digit-dataset/archive/refs/tags/v1.0.10.tar.gz"
CLIP_S = 3.0
"""The longest clip."""
_TAIL_S = 0.1
"""Silence after the last digit of a clip that is not padded."""
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_PLACES = ("first", "second", "third")
_LENGTHS = {1: 0.25, 2: 0.35, 3: 0.40}
"""How often a clip has so many digits."""
_FIRST_TRAINING_TAKE = 5
"""The dataset declares recordings 0..4 of everyone its test set."""
_LONGEST_DIGIT_S = 0.95
_NAME = re.compile(r"(?P<digit>[0-9])_(?P<speaker>[A-Za-z0-9-]+)_(?P<take>[0-9]+)\.(?i:wav)")


class Recording(NamedTuple):
    """A person saying a digit, silence cut off, peak 1."""

    name: str
    digit: int
    speaker: str
    take: int
    samples: Samples


Voices = dict[str, dict[int, list[Recording]]]
"""Speaker -> digit -> recordings."""


def prepare(
    out: Path,
    phrasebook: Phrasebook,
    recordings: Path,
    *,
    counts: Mapping[str, int],
    held_out: HeldOut | None = None,
    pad_to_s: float = CLIP_S,
    seed: int = 0,
    on_progress: Callable[[int], object] | None = None,
) -> PreparedClips:
    """Compose the clips of each split; the same recordings and seed give the same bytes.

    Args:
        out: where the audio goes.
        phrasebook: the corpus' own.
        recordings: their folder, or the folder above it.
        counts: composed clips per split; the benchmark's single recordings come on top.
        held_out: speakers of dev and of test.
        pad_to_s: seconds that a clip lasts at least; 0 ends each 0.1 s after its last digit. The samples
            before that are the same.
        seed: draws everything. A clip depends on it, its speakers and its own number only.
        on_progress: called with the number of clips composed so far.

    Raises:
        ValueError: no recordings, none left for a split, or a speaker that is not there.
    """
    good, bad = _read(_recordings_folder(recordings))
    if not good:
        raise ValueError(f"none of the {len(bad)} recordings in {recordings} can be used, e.g. {bad[0]}")
    by_split = _divide(good, counts, held_out or {}, recordings)
    writer = ClipWriter(out, phrasebook, "spoken_digits")
    n_padded = int(pad_to_s * SAMPLE_RATE)
    clips: list[AudioClip] = []
    composed = 0
    for number, split in enumerate(SPLITS):
        if split in ("dev", "test"):
            clips += [_single(writer, split, recording, n_padded, seed) for recording in by_split[split]]
        voices = _voices(by_split[split])
        for i in range(counts.get(split, 0)):
            rng = np.random.default_rng([seed, number, i])
            clips.append(_sequence(writer, split, i, voices, n_padded, rng))
            composed += 1
            if on_progress:
                on_progress(composed)
    return PreparedClips(clips, bad)


# ---------------------------------------------------------------- recordings


def _recordings_folder(folder: Path) -> Path:
    """Where the WAV files are."""
    for inner in (folder / "recordings", folder):
        if inner.is_dir() and _files(inner):
            return inner
    advice = f"fetch {URL} and unpack it (tar xzf FILE)"
    if folder.is_file():
        advice = f"it is a file: unpack it (tar xzf {folder.name}) and name the folder"
    raise ValueError(f"no recordings ({{digit}}_{{speaker}}_{{index}}.wav) in {folder}: {advice}")


def _files(folder: Path) -> list[Path]:
    return list_files(folder, endings={".wav"})


def _read(folder: Path) -> tuple[list[Recording], list[Quarantined]]:
    """Every recording that can be used, by name, and those that cannot."""
    good: list[Recording] = []
    bad: list[Quarantined] = []
    for path in _files(folder):
        try:
            good.append(_recording(path))
        except BadAudio as error:
            bad.append(Quarantined(path.stem, path.name, error.code, error.detail))
    return good, bad


def _recording(path: Path) -> Recording:
    named = _NAME.fullmatch(path.name)
    if named is None:
        raise BadAudio(path, "bad_path", "is not named {digit}_{speaker}_{index}.wav; rename or remove it")
    samples = trimmed(decode.load(path, max_duration_s=CLIP_S))
    if samples is None:
        raise BadAudio(path, "bad_level", "is silent; record it again")
    return Recording(path.stem, int(named["digit"]), named["speaker"], int(named["take"]), samples)


def trimmed(samples: Samples) -> Samples | None:
    """The audible part, at most 0.95 s, scaled to a peak of 1; None for silence."""
    block = SAMPLE_RATE // 100
    whole = samples[: len(samples) // block * block]
    power = np.mean(whole.reshape(-1, block) ** 2, axis=1)
    if not power.size or power.max() < 1e-8:
        return None
    audible = np.flatnonzero(power > power.max() * 10 ** (-32 / 10))
    start, end = max(0, (audible[0] - 2) * block), (audible[-1] + 4) * block
    kept = samples[start:end][: int(_LONGEST_DIGIT_S * SAMPLE_RATE)]
    return kept / np.abs(kept).max()


def _divide(
    recordings: Sequence[Recording], counts: Mapping[str, int], held_out: HeldOut, folder: Path
) -> dict[Split, list[Recording]]:
    """The recordings each split may use."""
    speakers = sorted({recording.speaker for recording in recordings})
    named = list(chain.from_iterable(held_out.values()))
    for speaker in named:
        if speaker not in speakers or named.count(speaker) > 1:
            raise ValueError(
                f"held_out: {speaker!r} must be named once and be one of the speakers in {folder} that have "
                f"usable recordings: {', '.join(speakers) or 'nobody'}"
            )
    training = [r for r in recordings if r.speaker not in named and r.take >= _FIRST_TRAINING_TAKE]
    of: dict[Split, list[Recording]] = {"train": training, "preference": training}
    of["dev"] = [r for r in recordings if r.speaker in held_out.get("dev", ())]
    of["test"] = [r for r in recordings if r.speaker in held_out.get("test", ())]
    for split, usable in of.items():
        if counts.get(split) and not usable:
            raise ValueError(
                f"{folder} leaves no usable recording for {split}: {len(recordings)} by "
                f"{', '.join(speakers) or 'nobody'}, held out {dict(held_out)}; dev and test need a speaker "
                f"of their own, train and preference recordings from index {_FIRST_TRAINING_TAKE} on"
            )
    return of


def _voices(recordings: Sequence[Recording]) -> Voices:
    voices: Voices = {}
    for recording in recordings:
        voices.setdefault(recording.speaker, {}).setdefault(recording.digit, []).append(recording)
    return voices


# --------------------------------------------------------------------- clips


def facts_of(digits: Sequence[int]) -> Facts:
    """The facts of a clip in which these digits are spoken."""
    words = [WORDS[digit] for digit in digits]
    return {
        **dict(zip(_PLACES, words, strict=False)),
        "last": words[-1],
        "count": WORDS[len(words)],
        "digits": " ".join(words),
        "said": list(dict.fromkeys(words)),
    }


def _single(writer: ClipWriter, split: Split, recording: Recording, n_padded: int, seed: int) -> AudioClip:
    """A recording as it is."""
    rng = np.random.default_rng([seed, len(SPLITS), recording.digit, recording.take])
    return writer.write(
        f"spoken_digits-{split}-{recording.name}",
        split,
        _clean([recording.samples], n_padded, rng),
        facts_of([recording.digit]),
        speaker=recording.speaker,
        source="recording",
    )


def _sequence(
    writer: ClipWriter, split: Split, number: int, voices: Voices, n_padded: int, rng: Generator
) -> AudioClip:
    """A string of a speaker's digits."""
    drawn = _draw(voices, rng)
    render = _clean if split in ("dev", "test") else _varied
    return writer.write(
        f"spoken_digits-{split}-{number:05d}",
        split,
        render([recording.samples for recording in drawn], n_padded, rng),
        facts_of([recording.digit for recording in drawn]),
        speaker=drawn[0].speaker,
        source="sequence",
    )


def _draw(voices: Voices, rng: Generator) -> list[Recording]:
    """Speakers and digits each equally often, lengths as `_LENGTHS` says."""
    takes_of = voices[str(rng.choice(list(voices)))]
    length = int(rng.choice(list(_LENGTHS), p=list(_LENGTHS.values())))
    takes = [takes_of[int(digit)] for digit in rng.choice(list(takes_of), length)]
    return [of_digit[int(rng.integers(len(of_digit)))] for of_digit in takes]


def _clean(spoken: Sequence[Samples], n_padded: int, rng: Generator) -> Samples:
    """The recordings as they are, one after the other."""
    buffer, end = laid_out(spoken, rng)
    return (0.5 * buffer + _hiss(rng))[: max(end, n_padded)]


def _varied(spoken: Sequence[Samples], n_padded: int, rng: Generator) -> Samples:
    """The same person on another day: other speed and pitch, level, and in 60 % of cases noise."""
    pace = 1 + rng.uniform(-0.12, 0.12)
    changed = [
        _faster(samples, pace * (1 + rng.uniform(-0.05, 0.05))) * 10 ** (rng.uniform(-4, 4) / 20)
        for samples in spoken
    ]
    buffer, end = laid_out(changed, rng)
    if rng.random() < 0.6:
        speech_rms = np.sqrt(np.mean(np.concatenate(changed) ** 2))
        buffer += speech_rms * 10 ** (-rng.uniform(8, 40) / 20) * _noise(len(buffer), rng)
    return (rng.uniform(0.1, 0.9) * buffer + _hiss(rng))[: max(end, n_padded)]


def _faster(samples: Samples, factor: float) -> Samples:
    """Resampled, so that speed and pitch change together."""
    return np.interp(np.arange(0, len(samples) - 1, factor), np.arange(len(samples)), samples)


def laid_out(spoken: Sequence[Samples], rng: Generator) -> tuple[Samples, int]:
    """One after the other with gaps of 0.1 to 0.3 s in a clip of 3 s; faster, if they would not fit.

    Returns the clip's samples and how many of them there are up to 0.1 s after the last digit.
    """
    buffer = np.zeros(int(CLIP_S * SAMPLE_RATE))
    gaps_s = rng.uniform(0.10, 0.30, len(spoken) - 1)
    speech_s = sum(map(len, spoken)) / SAMPLE_RATE
    if speech_s + gaps_s.sum() > CLIP_S - 0.05:
        gaps_s[:] = 0.05
        room_s = CLIP_S - 0.05 - gaps_s.sum()
        if speech_s > room_s:
            spoken, speech_s = [_faster(samples, speech_s / room_s) for samples in spoken], room_s
    at_s = rng.uniform(0, min(0.5, CLIP_S - 0.03 - speech_s - gaps_s.sum()))
    for samples, gap_s in zip(spoken, [*gaps_s, 0.0], strict=True):
        add(buffer, samples, at_s)
        at_s += len(samples) / SAMPLE_RATE + gap_s
    return buffer, min(len(buffer), round((at_s + _TAIL_S) * SAMPLE_RATE))


def _noise(n: int, rng: Generator) -> Samples:
    """White, or low-passed between 200 and 2000 Hz; rms 1."""
    noise = rng.standard_normal(n)
    if rng.random() < 0.5:
        keep = np.exp(-2 * np.pi * rng.uniform(200, 2000) / SAMPLE_RATE)
        noise = lfilter([1 - keep], [1, -keep], noise)
    return noise / noise.std()


def _hiss(rng: Generator) -> Samples:
    """The noise floor of a sound card."""
    return rng.uniform(0.0003, 0.001) * rng.standard_normal(int(CLIP_S * SAMPLE_RATE), dtype=np.float32)

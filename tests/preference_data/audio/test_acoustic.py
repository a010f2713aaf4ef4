"""Copies are found whatever was done to the file; other recordings of the same things are not."""

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr

from preference_data.audio import acoustic, contamination
from preference_data.audio.acoustic import ALIKE, MAY_BE_ALIKE, likeness, sketch
from preference_data.audio.contamination import Clip
from preference_data.audio.decode import SAMPLE_RATE
from preference_data.toy_world import espeak, sounds

WORDS = ("seven", "tiger", "window", "garden", "yellow", "nine")
DIGITS = "free-spoken-digit-dataset.tar.gz"


def made(seed):
    """Speech of six words, events and melodies, as in the toy world: 0.5 to 2.5 s, with hiss."""
    rng = np.random.default_rng(seed)
    voices = ("m3", "f2", "Mike", "f4", "Andrea", "paul", "m7", "m1")
    voice = f"en-us+{voices[seed % len(voices)]}"
    spoken = [
        espeak.Utterance(word, voice, rate=int(rng.integers(140, 200)), pitch=int(rng.integers(35, 65)))
        for word in WORDS
    ]
    clips = [0.6 * samples / np.abs(samples).max() for samples in espeak.say_all(spoken)]
    for event in (sounds.bell, sounds.whistle, sounds.clap):
        buffer = np.zeros(2 * SAMPLE_RATE)
        for at_s in np.cumsum(rng.uniform(0.4, 0.6, 3)) - 0.3:
            sounds.add(buffer, event(rng), at_s)
        clips.append(buffer)
    for instrument in sounds.INSTRUMENTS:
        direction, tempo = rng.choice(["rising", "falling"]), rng.choice(["fast", "slow"])
        clips.append(sounds.melody(2.5, instrument, str(direction), str(tempo), rng))
    return [
        np.clip(clip * rng.uniform(0.5, 1) + 0.001 * rng.standard_normal(len(clip)), -1, 1).astype(np.float32)
        for clip in clips
    ]


@pytest.fixture(scope="module")
def clips():
    return made(0)


def coded(samples, form, coding, rate=SAMPLE_RATE, **options):
    """Samples after a file: resampled, coded, decoded, resampled back."""
    file = io.BytesIO()
    resampled = samples if rate == SAMPLE_RATE else soxr.resample(samples, SAMPLE_RATE, rate)
    soundfile.write(file, resampled, rate, format=form, subtype=coding, **options)
    file.seek(0)
    back, rate = soundfile.read(file, dtype="float32")
    return back if rate == SAMPLE_RATE else soxr.resample(back, rate, SAMPLE_RATE)


def mp3(samples, rate=SAMPLE_RATE, level=0.5):
    return coded(samples, "MP3", "MPEG_LAYER_III", rate, compression_level=level)


def vorbis(samples, level=0.5):
    return coded(samples, "OGG", "VORBIS", compression_level=level)


def pcm(samples, rate=SAMPLE_RATE):
    return coded(np.clip(samples, -1, 1), "WAV", "PCM_16", rate)


def delayed(samples, seconds):
    return np.pad(samples, (int(seconds * SAMPLE_RATE), 0))


def one_off(samples):
    """A sample less, and one of the others a step louder."""
    return samples[1:] + (np.arange(len(samples) - 1) == 700) / np.float32(32768)


COPIES = {  # least share that is found
    "MP3": (mp3, 1.0),
    "MP3, lowest bit rate": (lambda x: mp3(x, level=0.99), 1.0),
    "MP3 at 8 kHz": (lambda x: mp3(x, 8000), 1.0),
    "Ogg": (vorbis, 1.0),
    "Ogg, lowest bit rate": (lambda x: vorbis(x, 0.99), 0.9),
    "mu-law at 8 kHz": (lambda x: coded(x, "WAV", "ULAW", 8000), 1.0),
    "44.1 kHz": (lambda x: pcm(x, 44_100), 1.0),
    "8 kHz": (lambda x: pcm(x, 8000), 1.0),
    "0.1 s of silence before": (lambda x: delayed(x, 0.1), 1.0),
    "0.737 s of silence before": (lambda x: delayed(x, 0.737), 1.0),
    "2 s of silence before and one after": (lambda x: np.pad(delayed(x, 2), (0, SAMPLE_RATE)), 1.0),
    "a tenth cut off at the start": (lambda x: x[len(x) // 10 :], 0.8),
    "a tenth cut off at the end": (lambda x: x[: -len(x) // 10], 0.8),
    "gain 0.3": (lambda x: pcm(0.3 * x), 1.0),
    "gain 0.99": (lambda x: pcm(0.99 * x), 1.0),
    "gain 3, clipped": (lambda x: pcm(3 * x), 0.9),
    "other polarity": (lambda x: -x, 1.0),
    "one sample and one step": (one_off, 1.0),
    "MP3 at 44.1 kHz, half as loud, 0.3 s later": (lambda x: mp3(delayed(x / 2, 0.3), 44_100), 1.0),
}


def is_found(first, second):
    return bool(sketch(first) @ sketch(second) >= MAY_BE_ALIKE and likeness(first, second) >= ALIKE)


@pytest.mark.parametrize("name", COPIES)
def test_copies_are_found(clips, name):
    change, least = COPIES[name]
    missed = [i for i, clip in enumerate(clips) if not is_found(clip, change(clip).astype(np.float32))]
    assert 1 - len(missed) / len(clips) >= least, missed


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("another speed", lambda x: soxr.resample(x, SAMPLE_RATE, 1.06 * SAMPLE_RATE)),
        ("a third of it", lambda x: x[: len(x) // 3]),
    ],
)
def test_what_cannot_be_found_is_said(clips, name, change):
    speech = clips[: len(WORDS)]
    assert sum(is_found(clip, change(clip).astype(np.float32)) for clip in speech) < len(speech)
    assert "speed" in acoustic.CANNOT_FIND
    assert "piece" in acoustic.CANNOT_FIND


def test_other_renderings_of_the_same_words_and_melodies_are_not_alike(clips):
    others = [clip for seed in (1, 2) for clip in made(seed)]
    assert not [(i, j) for i, a in enumerate(clips) for j, b in enumerate(others) if is_found(a, b)]


def test_silence_and_the_shortest_clips_are_like_nothing():
    for clip in (np.zeros(SAMPLE_RATE, np.float32), np.ones(3, np.float32), np.zeros(0, np.float32)):
        assert not sketch(clip).any()


def digits():
    """The recordings' archive, where somebody has it."""
    beside = Path(__file__).resolve().parents[3] / "shared" / "data" / DIGITS
    path = Path(os.environ.get("ALIGN_SPOKEN_DIGITS", beside))
    return path if path.exists() else None


@pytest.mark.slow
@pytest.mark.skipif(digits() is None, reason=f"ALIGN_SPOKEN_DIGITS does not name {DIGITS}")
def test_recorded_digits_of_others_and_of_the_same_speaker_are_not_alike():
    with tarfile.open(digits()) as archive:
        members = [member for member in archive if member.name.endswith(".wav")][::8]
        clips = [
            soxr.resample(soundfile.read(archive.extractfile(member), dtype="float32")[0], 8000, SAMPLE_RATE)
            for member in members
        ]
    sketches = np.array([sketch(clip) for clip in clips])
    near = np.argwhere(np.triu(sketches @ sketches.T, 1) >= MAY_BE_ALIKE)
    assert len(near) < 1e-4 * len(clips) ** 2  # pairs that have to be aligned
    assert not [(members[i].name, members[j].name) for i, j in near if likeness(clips[i], clips[j]) >= ALIKE]
    for change in (mp3, lambda x: delayed(pcm(x, 44_100), 1), lambda x: pcm(0.3 * x)):
        assert all(is_found(clip, change(clip).astype(np.float32)) for clip in clips[::15])


def test_copies_in_files_are_told_from_exact_ones_and_long_recordings_are_not_read(clips, tmp_path):
    benchmark, trained = {}, {}
    for i, clip in enumerate(clips[:4]):
        soundfile.write(tmp_path / f"{i}.wav", clip, SAMPLE_RATE)
        benchmark[f"{i}"] = Clip(tmp_path / f"{i}.wav")
    soundfile.write(tmp_path / "a.mp3", clips[0], SAMPLE_RATE, format="MP3", subtype="MPEG_LAYER_III")
    soundfile.write(tmp_path / "b.wav", soxr.resample(clips[1] / 2, SAMPLE_RATE, 44_100), 44_100)
    soundfile.write(tmp_path / "c.flac", *soundfile.read(tmp_path / "2.wav", dtype="float32"))
    soundfile.write(tmp_path / "d.wav", made(1)[3], SAMPLE_RATE)
    for path in sorted(tmp_path.glob("[a-d].*")):
        trained[path.name] = Clip(path, "0" * 64, soundfile.info(path).duration)
    trained["hour"] = Clip(tmp_path / "gone.wav", "0" * 64, 3600.0)
    found = contamination.find(benchmark, trained)
    assert found.overlaps == (("0", "a.mp3", "sound"), ("1", "b.wav", "sound"), ("2", "c.flac", "samples"))
    assert (found.heard, found.alike, found.unreadable) == (1, 2, ())

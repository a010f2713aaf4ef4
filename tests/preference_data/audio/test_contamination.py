"""What records say of their clips is used: only files that may be the same audio are read, in workers."""

import hashlib

import numpy as np
import soundfile

from preference_data.audio import contamination
from preference_data.audio.contamination import Clip


def tone(path, hz, seconds=0.5, rate=16_000):
    samples = 0.3 * np.sin(2 * np.pi * hz * np.arange(int(seconds * rate)) / rate)
    soundfile.write(path, samples.astype(np.float32), rate)
    return path


def recorded(path, seconds):
    return Clip(path, hashlib.sha256(path.read_bytes()).hexdigest(), seconds)


def test_only_clips_that_may_be_the_same_are_read(tmp_path):
    benchmark = {"b": Clip(tone(tmp_path / "b.wav", 440))}
    copy = recorded(tmp_path / "b.wav", 0.5)._replace(file=tmp_path / "gone.wav")
    flac = tmp_path / "b.flac"
    soundfile.write(flac, *soundfile.read(tmp_path / "b.wav", dtype="float32"), subtype="PCM_16")
    long = recorded(tone(tmp_path / "long.wav", 440, seconds=4), 4.0)._replace(file=tmp_path / "gone.wav")
    gone = Clip(tmp_path / "gone.wav", "0" * 64, 0.5)
    trained = {
        "copy": copy,
        "flac": recorded(flac, 0.5),
        "long": long,
        "gone": gone,
        "other": recorded(tone(tmp_path / "other.wav", 450), 0.5),
    }
    reports = []
    found = contamination.find(benchmark, trained, on_progress=reports.append)
    assert [(overlap.trained, overlap.by) for overlap in found.overlaps] == [
        ("copy", "bytes"),
        ("flac", "samples"),
    ]
    assert found.unreadable == ("gone: missing",)  # of the others nothing had to be read, or it was
    assert (found.heard, found.n_benchmark, found.n_trained) == (1, 1, 5)
    assert reports == list(range(1, 7))


def test_what_is_not_a_file_is_unreadable(tmp_path):
    (tmp_path / "folder").mkdir()
    found = contamination.find({"b": Clip(tone(tmp_path / "b.wav", 440))}, {"t": Clip(tmp_path / "folder")})
    assert found.unreadable == ("t: not_a_file",)

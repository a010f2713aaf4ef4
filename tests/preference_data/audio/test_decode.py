import fcntl
import hashlib
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
import soundfile
import soxr

from preference_data.audio import decode, isolation
from preference_data.audio.clip_files import BadAudio, ClipBytes, resolve_inside
from preference_data.dataset.dataset import Dataset

SILENCE = np.zeros(16_000, "float32")


def tone(seconds: float, rate: int, channels: int = 1) -> np.ndarray:
    """A 440 Hz tone in noise, each channel at its own level, shape (frames, channels)."""
    t = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(0).normal(scale=0.02, size=(t.size, channels))
    return (noise + np.sin(2 * np.pi * 440 * t)[:, None] * 0.4 / np.arange(1, channels + 1)).astype("float32")


def encoded(folder: Path, suffix: str, seconds: float = 2) -> bytes:
    """The bytes of a tone in noise at 16 kHz."""
    path = folder / f"whole{suffix}"
    coding = {"format": "OGG", "subtype": "OPUS"} if suffix == ".opus" else {}
    soundfile.write(path, tone(seconds, 16_000), 16_000, **coding)
    return path.read_bytes()


def with_flac_length(flac: bytes, frames: int) -> bytes:
    """Overwrite the 36-bit sample count in a FLAC header."""
    packed = int.from_bytes(flac[18:26], "big") >> 36 << 36 | frames
    return flac[:18] + packed.to_bytes(8, "big") + flac[26:]


def with_wav_length(wav: bytes, n_bytes: int) -> bytes:
    """Overwrite the byte count of the data chunk of a canonical 44-byte-header WAV."""
    assert wav[36:40] == b"data"
    return wav[:40] + struct.pack("<I", n_bytes) + wav[44:]


def with_au_length(au: bytes, n_bytes: int) -> bytes:
    return au[:8] + struct.pack(">I", n_bytes) + au[12:]


def two_hours_of_silence(path: Path) -> None:
    with soundfile.SoundFile(path, "w", 8_000, 1, "PCM_16") as file:
        minute = np.zeros(8_000 * 60, "int16")
        for _ in range(120):
            file.write(minute)


def refusal(path: Path) -> BadAudio:
    """Why `load` refuses a file."""
    with pytest.raises(BadAudio) as caught:
        decode.load(path, max_duration_s=30)
    return caught.value


# Each writes one bad file; the name is the file's.
REFUSED_BY_HEADER: dict[str, tuple[str, Callable[[Path], object]]] = {
    "none.wav": ("missing", lambda path: None),
    "folder.wav": ("not_a_file", lambda path: path.mkdir()),
    "pipe.wav": ("not_a_file", os.mkfifo),
    "zero_bytes.wav": ("empty_file", lambda path: path.touch()),
    "page.wav": ("unreadable", lambda path: path.write_text("<!DOCTYPE html><title>404</title>" * 99)),
    "pointer.wav": (
        "unreadable",
        lambda path: path.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\n"),
    ),
    "random.wav": ("unreadable", lambda path: path.write_bytes(np.random.default_rng(0).bytes(9_999))),
    "random.raw": ("unreadable", lambda path: path.write_bytes(np.random.default_rng(0).bytes(9_999))),
    "random.vox": ("unreadable", lambda path: path.write_bytes(np.random.default_rng(0).bytes(9_999))),
    "header_cut.wav": ("truncated", lambda path: path.write_bytes(encoded(path.parent, ".wav")[:30])),
    "no_riff.wav": (
        "unreadable",
        lambda path: path.write_bytes(b"ID3\3\0\0\0\0\0\x0a" + bytes(10) + encoded(path.parent, ".wav")),
    ),
    "other.voc": ("unsupported_format", lambda path: soundfile.write(path, SILENCE, 16_000)),
    "slow.wav": ("bad_sample_rate", lambda path: soundfile.write(path, SILENCE, 3_999)),
    "fast.wav": ("bad_sample_rate", lambda path: soundfile.write(path, SILENCE, 192_001)),
    "wide.wav": (
        "too_many_channels",
        lambda path: soundfile.write(path, np.zeros((46, 1024), "int16"), 16_000),
    ),
    "no_samples.wav": ("empty_audio", lambda path: soundfile.write(path, SILENCE[:0], 16_000)),
    "one_sample.wav": ("empty_audio", lambda path: soundfile.write(path, SILENCE[:1], 48_000)),
    "length_zero.wav": (
        "empty_audio",
        lambda path: path.write_bytes(with_wav_length(encoded(path.parent, ".wav"), 0)),
    ),
    "streamed.wav": (
        "unknown_length",
        lambda path: path.write_bytes(with_wav_length(encoded(path.parent, ".wav"), 2**32 - 1)),
    ),
    "streamed.flac": (
        "unknown_length",
        lambda path: path.write_bytes(with_flac_length(encoded(path.parent, ".flac"), 0)),
    ),
    "streamed.au": (
        "unknown_length",
        lambda path: path.write_bytes(with_au_length(encoded(path.parent, ".au"), 2**32 - 1)),
    ),
    "31_s.wav": ("too_long", lambda path: soundfile.write(path, np.tile(SILENCE, 31), 16_000)),
    "two_hours.flac": ("too_long", two_hours_of_silence),
    "huge_claim.flac": (
        "too_long",
        lambda path: path.write_bytes(with_flac_length(encoded(path.parent, ".flac"), 2**36 - 1)),
    ),
    "half.wav": ("truncated", lambda path: path.write_bytes(encoded(path.parent, ".wav")[:32_000])),
    "last_sample_cut.wav": ("truncated", lambda path: path.write_bytes(encoded(path.parent, ".wav")[:-2])),
    "half.ogg": ("truncated", lambda path: path.write_bytes(halved(encoded(path.parent, ".ogg")))),
    "last_page_cut.ogg": (
        "truncated",
        lambda path: path.write_bytes(without_last_page(encoded(path.parent, ".ogg", seconds=8))),
    ),
    **{
        f"half{suffix}": (
            "truncated",
            lambda path, suffix=suffix: path.write_bytes(halved(encoded(path.parent, suffix))),
        )
        for suffix in (".rf64", ".w64", ".aiff", ".au", ".caf", ".mp3")
    },
    "headerless_cut.mp3": (
        "truncated",
        lambda path: path.write_bytes(without_xing_frame(encoded(path.parent, ".mp3"))[:-10]),
    ),
    "frames_lost.mp3": (
        "truncated",
        lambda path: path.write_bytes(without_last_frames(encoded(path.parent, ".mp3"))),
    ),
    "hole.mp3": ("corrupt", lambda path: path.write_bytes(with_hole(encoded(path.parent, ".mp3")))),
    "hole.ogg": ("corrupt", lambda path: path.write_bytes(flipped(encoded(path.parent, ".ogg")))),
    "hole.opus": ("corrupt", lambda path: path.write_bytes(flipped(encoded(path.parent, ".opus")))),
    "page_lost.ogg": ("corrupt", lambda path: path.write_bytes(without_a_page(encoded(path.parent, ".ogg")))),
    "two.ogg": ("corrupt", lambda path: path.write_bytes(encoded(path.parent, ".ogg") * 2)),
    "two.wav": ("corrupt", lambda path: path.write_bytes(encoded(path.parent, ".wav") * 2)),
    "two.aiff": ("corrupt", lambda path: path.write_bytes(encoded(path.parent, ".aiff") * 2)),
    "length_halved.wav": (
        "corrupt",
        lambda path: path.write_bytes(with_wav_length(encoded(path.parent, ".wav"), 32_000)),
    ),
    "last_byte_cut.ogg": ("truncated", lambda path: path.write_bytes(encoded(path.parent, ".ogg")[:-1])),
}
REFUSED_BY_SAMPLES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "half.flac": ("corrupt", lambda path: path.write_bytes(halved(encoded(path.parent, ".flac")))),
    "flipped.flac": ("corrupt", lambda path: path.write_bytes(flipped(encoded(path.parent, ".flac")))),
    "two.flac": ("corrupt", lambda path: path.write_bytes(encoded(path.parent, ".flac") * 2)),
    "length_halved.flac": (
        "corrupt",
        lambda path: path.write_bytes(with_flac_length(encoded(path.parent, ".flac"), 16_000)),
    ),
    "nan.wav": ("non_finite", lambda path: soundfile.write(path, spoilt(np.nan), 16_000, "FLOAT")),
    "inf.wav": ("non_finite", lambda path: soundfile.write(path, spoilt(-np.inf), 16_000, "FLOAT")),
    "double.wav": ("non_finite", lambda path: soundfile.write(path, spoilt(1e300), 16_000, "DOUBLE")),
    "loud.wav": ("bad_level", lambda path: soundfile.write(path, spoilt(-32_768), 16_000, "FLOAT")),
}
REFUSED = REFUSED_BY_HEADER | REFUSED_BY_SAMPLES


def halved(content: bytes) -> bytes:
    return content[: len(content) // 2]


def without_xing_frame(mp3: bytes) -> bytes:
    """What is left are 2 s in frames of several bit rates; libsndfile takes them for 1.07 s."""
    second = mp3.index(mp3[:2], 4)
    assert b"Info" in mp3[:second] or b"Xing" in mp3[:second]
    return mp3[second:]


def without_last_frames(mp3: bytes) -> bytes:
    """Cut where a frame begins; the header counts on."""
    return mp3[: mp3.rindex(mp3[:2], 0, len(mp3) * 3 // 4)]


def with_hole(mp3: bytes) -> bytes:
    """60 zeros where a frame in the middle begins."""
    at = mp3.index(mp3[:2], len(mp3) // 2)
    return mp3[:at] + bytes(60) + mp3[at + 60 :]


def without_a_page(ogg: bytes) -> bytes:
    last = ogg.rindex(b"OggS")
    return ogg[: ogg.rindex(b"OggS", 0, last)] + ogg[last:]


def without_last_page(ogg: bytes) -> bytes:
    return ogg[: ogg.rindex(b"OggS")]


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return (
        content[:middle]
        + bytes(255 - byte for byte in content[middle : middle + 40])
        + content[middle + 40 :]
    )


def spoilt(value: float) -> np.ndarray:
    """A tone of two channels, one sample of which is `value`."""
    samples = tone(1, 16_000, channels=2).astype("float64")
    samples[1_234, 1] = value
    return samples


@pytest.mark.parametrize("name", REFUSED)
def test_bad_file_is_refused_with_its_reason(tmp_path: Path, name: str) -> None:
    code, write = REFUSED[name]
    write(tmp_path / name)
    error = refusal(tmp_path / name)
    assert error.code == code
    assert str(error).startswith(f"{str(tmp_path / name)!r}: {code}: ")
    assert ";" in error.detail  # what is wrong; what to do


@pytest.mark.parametrize("name", REFUSED_BY_HEADER)
def test_header_is_enough_to_refuse(tmp_path: Path, name: str) -> None:
    code, write = REFUSED_BY_HEADER[name]
    write(tmp_path / name)
    with pytest.raises(BadAudio) as caught:
        decode.inspect(tmp_path / name, max_duration_s=30)
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("page.wav", "web page"),
        ("pointer.wav", "git lfs pull"),
        ("other.voc", "ffmpeg -i other.voc other.flac"),
        ("streamed.wav", "ffmpeg -i streamed.wav streamed.flac"),
        ("hole.mp3", "ffmpeg -i hole.mp3 hole.flac"),
        ("half.wav", "promises 64000 bytes of sound, has 31956"),
        ("slow.wav", "3999 Hz is not in 4000..192000"),
        ("two_hours.flac", "7200.0 s, the limit is 30 s"),
        ("nan.wav", "1 of 32000 samples"),
        ("loud.wav", "peak 32768, the limit is 100"),
    ],
)
def test_refusal_gives_numbers_and_next_step(tmp_path: Path, name: str, hint: str) -> None:
    REFUSED[name][1](tmp_path / name)
    assert hint in refusal(tmp_path / name).detail


def test_unreadable_by_rights_or_by_disk(tmp_path: Path) -> None:
    loop = tmp_path / "loop.wav"
    loop.symlink_to(loop)
    with pytest.raises(BadAudio) as caught:
        decode.inspect(loop, max_duration_s=30)
    assert caught.value.code == "unreadable"


def test_terminal_codes_in_a_name_are_shown_not_sent(tmp_path: Path) -> None:
    assert "\x1b" not in str(refusal(tmp_path / "\x1b[2Jclip.wav"))


@pytest.mark.parametrize("name", ["two_hours.flac", "huge_claim.flac"])
def test_bomb_is_refused_without_memory_or_time(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    REFUSED[name][1](path)
    script = (
        "import resource, sys, time, pathlib\n"
        "from preference_data.audio import decode as audio\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "start = time.perf_counter()\n"
        "try: audio.load(pathlib.Path(sys.argv[1]), max_duration_s=30)\n"
        "except audio.BadAudio as error: assert error.code == 'too_long'\n"
        "grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before\n"
        "print(grown * (1 if sys.platform == 'darwin' else 1024), time.perf_counter() - start)\n"
    )
    run = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, check=True)
    grown_bytes, seconds = map(float, run.stdout.split())
    assert grown_bytes < 10e6  # decoding the two hours would take 230 MB
    assert seconds < 1


VALID = [
    ("pcm16.wav", 16_000, 1, {"subtype": "PCM_16"}),
    ("pcm24.wav", 44_100, 2, {"subtype": "PCM_24"}),
    ("float.wav", 48_000, 1, {"subtype": "FLOAT"}),
    ("ulaw.wav", 8_000, 1, {"subtype": "ULAW"}),
    ("adpcm.wav", 8_000, 1, {"subtype": "MS_ADPCM"}),
    ("gsm.wav", 8_000, 1, {"subtype": "GSM610"}),
    ("extensible.wav", 44_100, 6, {"format": "WAVEX", "subtype": "PCM_16"}),
    ("big_endian.wav", 16_000, 1, {"endian": "BIG"}),
    ("lowest.wav", 4_000, 8, {}),
    ("highest.wav", 192_000, 1, {}),
    ("mono.flac", 16_000, 1, {}),
    ("stereo.flac", 44_100, 2, {"subtype": "PCM_24"}),
    ("vorbis.ogg", 48_000, 2, {}),
    ("opus.ogg", 48_000, 1, {"subtype": "OPUS"}),
    ("stereo.mp3", 44_100, 2, {}),
    ("variable.mp3", 16_000, 1, {"bitrate_mode": "VARIABLE"}),
    ("a.rf64", 16_000, 1, {"subtype": "PCM_24"}),
    ("stereo.w64", 44_100, 2, {}),
    ("a.aiff", 22_050, 1, {}),
    ("mulaw.aifc", 8_000, 2, {"format": "AIFF", "subtype": "ULAW"}),
    ("a.au", 8_000, 1, {"subtype": "ULAW"}),
    ("little.au", 16_000, 2, {"subtype": "FLOAT", "endian": "LITTLE"}),
    ("a.caf", 44_100, 1, {"subtype": "PCM_24"}),
    ("alac.caf", 16_000, 2, {"subtype": "ALAC_16"}),
    ("flac_in_disguise.wav", 16_000, 1, {"format": "FLAC"}),
]


@pytest.mark.parametrize(("name", "rate", "channels", "options"), VALID, ids=[row[0] for row in VALID])
def test_valid_file_loads_as_soxr_reference(
    tmp_path: Path, name: str, rate: int, channels: int, options: dict[str, str]
) -> None:
    path = tmp_path / name
    soundfile.write(path, tone(1.5, rate, channels), rate, **options)
    with soundfile.SoundFile(path) as sound:
        decoded = sound.read(sound.frames, dtype="float32", always_2d=True)
    expected = soxr.resample(decoded.mean(axis=1), rate, 16_000, quality="HQ")

    samples = decode.load(path, max_duration_s=1.6)
    assert samples.dtype == np.float32
    assert samples.ndim == 1
    assert 0 <= len(samples) - 24_000 <= 1_000  # block codecs fill their last block
    np.testing.assert_allclose(samples, expected, atol=1e-6)

    info = decode.inspect(path, max_duration_s=1.6)
    assert (info.sample_rate_hz, info.channels) == (rate, channels)
    assert info.frames == len(decoded)
    assert info.duration_s == pytest.approx(len(samples) / 16_000, abs=1e-3)
    assert info.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_channels_are_averaged_and_16_khz_is_left_alone(tmp_path: Path) -> None:
    left, right = np.float32([0.5, -0.25, 1]), np.float32([0.25, 0.25, -1])
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], axis=1), 16_000, "FLOAT")
    assert decode.load(tmp_path / "a.wav", max_duration_s=1).tolist() == [0.375, 0.0, 0.0]


def odd(level: float) -> np.ndarray:
    """A tone in two channels, the second one turned round and `level` times as loud."""
    left = tone(1, 16_000)
    return np.concatenate([left, -level * left], axis=1)


@pytest.mark.parametrize(
    ("name", "samples", "warnings"),
    [
        ("silence.wav", np.zeros((16_000, 1)), ("silent",)),
        ("silence.flac", np.zeros((16_000, 2)), ("silent",)),
        ("dither.wav", np.full((16_000, 1), 1e-6), ("silent",)),
        ("antiphase.wav", odd(1.0), ("antiphase",)),
        ("antiphase.flac", odd(0.99), ("antiphase",)),
        ("antiphase.mp3", odd(1.0), ("antiphase",)),
        ("wide.wav", odd(0.5), ()),
        ("left_only.wav", odd(0.0), ()),
        ("quiet.wav", tone(1, 16_000) * 0.001, ()),
    ],
)
def test_odd_clip_is_read_with_a_warning(
    tmp_path: Path,
    name: str,
    samples: np.ndarray,
    warnings: tuple[str, ...],
    caplog: pytest.LogCaptureFixture,
) -> None:
    soundfile.write(tmp_path / name, samples, 16_000)
    good, refused = decode.audit(Dataset(tmp_path).find, [("r", name)], max_duration_s=2)
    assert refused == []
    assert good["r"].warnings == warnings
    assert [(row.id, row.path, row.code) for row in decode.odd(good, {"r": name})] == [
        ("r", name, code) for code in warnings
    ]
    assert [f"{name}: {code}" in caplog.text for code in warnings] == [True] * len(warnings)


def test_format_is_what_the_bytes_say(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", SILENCE, 16_000, format="FLAC")
    assert decode.inspect(tmp_path / "a.wav", max_duration_s=1).format == "FLAC/PCM_16"


def test_chunks_around_the_sound_are_skipped(tmp_path: Path) -> None:
    wav = encoded(tmp_path, ".wav")
    odd_chunk = b"LIST" + struct.pack("<I", 5) + b"INFOx\0"
    (tmp_path / "a.wav").write_bytes(wav[:36] + odd_chunk + wav[36:] + odd_chunk)
    assert decode.inspect(tmp_path / "a.wav", max_duration_s=3).frames == 32_000


def test_mp3_behind_a_large_tag_is_read(tmp_path: Path) -> None:
    picture = bytes(20_000)
    size = bytes([0, 20_000 >> 14, 20_000 >> 7 & 127, 20_000 & 127])
    (tmp_path / "a.mp3").write_bytes(b"ID3\4\0\0" + size + picture + encoded(tmp_path, ".mp3"))
    assert decode.inspect(tmp_path / "a.mp3", max_duration_s=3).frames == 32_000


def test_limit_is_inclusive(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", SILENCE, 16_000)
    assert decode.inspect(tmp_path / "a.wav", max_duration_s=1).duration_s == 1


@pytest.mark.parametrize(
    ("relative", "code"),
    [
        ("/etc/passwd", "outside_root"),
        ("../secret.wav", "outside_root"),
        ("clips/../../secret.wav", "outside_root"),
        ("clips/..", "outside_root"),
        ("link_to_file.wav", "outside_root"),
        ("link_to_folder/secret.wav", "outside_root"),
        ("http://169.254.169.254/latest/meta-data", "bad_path"),
        ("file:///etc/passwd", "bad_path"),
        ("", "bad_path"),
        (".", "bad_path"),
        ("clips/a.wav\0.png", "bad_path"),
        ("clips/\ud800.wav", "bad_path"),
        ("a" * 300 + ".wav", "bad_path"),
        ("clips/" * 300 + "a.wav", "bad_path"),
        ("loop.wav", "bad_path"),
    ],
)
def test_path_that_leaves_the_root_is_refused(tmp_path: Path, relative: str, code: str) -> None:
    root = tmp_path / "corpus"
    (root / "clips").mkdir(parents=True)
    soundfile.write(tmp_path / "secret.wav", SILENCE, 16_000)
    (root / "link_to_file.wav").symlink_to(tmp_path / "secret.wav")
    (root / "link_to_folder").symlink_to(tmp_path)
    (root / "loop.wav").symlink_to(root / "loop.wav")
    with pytest.raises(BadAudio) as caught:
        resolve_inside(root, relative)
    assert caught.value.code == code
    assert ";" in caught.value.detail
    assert len(str(caught.value)) < 600

    good, refused = decode.audit(Dataset(root).find, [("r1", relative)], max_duration_s=1)
    assert good == {}
    assert [(one.id, one.path, one.code) for one in refused] == [("r1", relative, code)]


def test_links_and_odd_names_inside_the_root_are_followed(tmp_path: Path) -> None:
    root = tmp_path / "link_to_root"
    (tmp_path / "corpus").mkdir()
    root.symlink_to(tmp_path / "corpus")
    name = "Straße 12:30 ..wav"
    soundfile.write(root / name, SILENCE, 16_000)
    (root / "link.wav").symlink_to(root / name)
    expected = (tmp_path / "corpus" / name).resolve()
    assert resolve_inside(root, name) == resolve_inside(root, "./link.wav") == expected


def test_audit_names_the_records_and_keeps_the_order(tmp_path: Path) -> None:
    clips = []
    for name, (_, write) in REFUSED.items():
        soundfile.write(tmp_path / f"good_{name}.wav", tone(0.5, 8_000), 8_000)
        write(tmp_path / name)
        clips += [(f"good {name}", f"good_{name}.wav"), (f"bad {name}", name)]
    clips.append(("outside", "../x.wav"))
    progress: list[int] = []

    good, refused = decode.audit(
        Dataset(tmp_path).find, clips, max_duration_s=30, on_progress=progress.append
    )

    assert list(good) == [f"good {name}" for name in REFUSED]
    assert {info.duration_s for info in good.values()} == {0.5}
    expected = [(f"bad {name}", name, code) for name, (code, _) in REFUSED.items()]
    assert [one[:3] for one in refused] == [*expected, ("outside", "../x.wav", "outside_root")]
    assert progress == list(range(1, len(clips) + 1))


def test_audit_of_nothing(tmp_path: Path) -> None:
    assert decode.audit(Dataset(tmp_path).find, [], max_duration_s=1) == ({}, [])


def test_audit_refuses_an_id_that_comes_twice(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="record id 'a' comes more than once"):
        decode.audit(
            Dataset(tmp_path).find, [("a", "1.wav"), ("b", "2.wav"), ("a", "3.wav")], max_duration_s=1
        )


def decoders() -> list[psutil.Process]:
    """The worker processes of an audit that runs in this process."""
    children = psutil.Process().children()
    return [child for child in children if "spawn_main" in " ".join(child.cmdline())]


def test_item_of_a_worker_killed_by_somebody_else_gets_another() -> None:
    items = ["__import__('os').getpid()"] * 40
    found: dict[int, int | isolation.Died] = {}
    for index, worker in isolation.in_workers(eval, items, timeout_s=20):
        if not found:
            os.kill(worker, signal.SIGKILL)  # it already holds its next item
            killed = worker
        found[index] = worker
    assert sorted(found) == list(range(40))
    assert list(found.values()).count(killed) <= 2  # the second if it was faster than the signal
    assert not any(isinstance(worker, isolation.Died) for worker in found.values())
    assert decoders() == []


def test_audit_leaves_no_process_when_it_is_stopped(tmp_path: Path) -> None:
    clips = [(f"r{n}", f"{n}.wav") for n in range(10)]

    def stop(checked: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        decode.audit(Dataset(tmp_path).find, clips, max_duration_s=1, on_progress=stop)
    assert decoders() == []


class Lease:
    """Makes every open() of a file by others wait (for 45 s at most), as a dead network disk would."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("r+b")
        fcntl.fcntl(self.file, fcntl.F_SETLEASE, fcntl.F_WRLCK)

    def renew(self) -> None:
        fcntl.fcntl(self.file, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        while True:
            try:
                fcntl.fcntl(self.file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
                return
            except BlockingIOError:  # a process that was just killed still holds the file
                time.sleep(0.001)

    def is_waited_for(self) -> bool:
        inode = f":{os.fstat(self.file.fileno()).st_ino} "
        locks = Path("/proc/locks").read_text().splitlines()
        return any("LEASE" in lock and "BREAKING" in lock and inode in lock for lock in locks)


@pytest.fixture
def lease() -> Iterator[Callable[[Path], Lease]]:
    if sys.platform != "linux":
        pytest.skip("file leases are Linux's")
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)  # says that somebody waits for the file
    taken: list[Lease] = []

    def take(path: Path) -> Lease:
        try:
            taken.append(Lease(path))
        except OSError as error:
            pytest.skip(f"{path} is on a file system without leases: {error}")
        return taken[-1]

    yield take
    for one in taken:
        one.file.close()
    signal.signal(signal.SIGIO, before)


def test_file_that_hangs_its_decoder_is_given_up(tmp_path: Path, lease: Callable[[Path], Lease]) -> None:
    clips = [(f"r{n}", f"{n}.wav") for n in range(8)]
    for _, path in clips:
        soundfile.write(tmp_path / path, SILENCE, 16_000)
    lease(tmp_path / "3.wav")
    good, refused = decode.audit(Dataset(tmp_path).find, clips, max_duration_s=1, file_timeout_s=0.5)
    assert [(one.id, one.path, one.code) for one in refused] == [("r3", "3.wav", "decoder_hung")]
    assert len(good) == 7


def test_file_that_kills_two_decoders_is_given_up(tmp_path: Path, lease: Callable[[Path], Lease]) -> None:
    soundfile.write(tmp_path / "a.wav", SILENCE, 16_000)
    held = lease(tmp_path / "a.wav")
    killed: list[int] = []
    done = threading.Event()

    def kill_decoders_that_open_the_file() -> None:
        while not done.wait(0.01):
            if held.is_waited_for():
                killed.extend(decoder.pid for decoder in decoders())
                os.kill(killed[-1], signal.SIGKILL)
                held.renew()

    killer = threading.Thread(target=kill_decoders_that_open_the_file)
    killer.start()
    good, refused = decode.audit(Dataset(tmp_path).find, [("r", "a.wav")], max_duration_s=1)
    done.set()
    killer.join()
    assert [(one.id, one.code) for one in refused] == [("r", "decoder_crashed")]
    assert "exit -9" in refused[0].detail
    assert good == {}
    assert len(killed) == 2


def test_worker_is_blamed_by_how_it_died() -> None:
    items = ["1 + 1", "__import__('os').abort()", "__import__('time').sleep(60)", "2 + 2"]
    started = time.monotonic()
    found = dict(isolation.in_workers(eval, items, timeout_s=0.5))
    assert [found[0], found[3]] == [2, 4]
    assert found[1].exit_code == -signal.SIGABRT
    assert found[2].exit_code == -signal.SIGALRM
    assert found[2].of_timeout
    assert time.monotonic() - started < 30


def test_pool_replaces_workers_that_died_and_serves_several_threads() -> None:
    pool: isolation.WorkerPool[str, int] = isolation.WorkerPool(eval, timeout_s=0.5, workers=2)
    items = ["1 + 1", "__import__('os').abort()", "__import__('time').sleep(60)", "2 + 2"] * 2
    try:
        with ThreadPoolExecutor(4) as threads:
            found = list(threads.map(pool.run, items))
        assert [found[i] for i in (0, 3, 4, 7)] == [2, 4, 2, 4]
        assert [found[i] for i in (1, 5)] == [isolation.Died(-signal.SIGABRT)] * 2
        assert [found[i] for i in (2, 6)] == [isolation.Died(-signal.SIGALRM)] * 2
        assert len(decoders()) == 2
    finally:
        pool.close()
    assert decoders() == []


def test_decoder_pool_loads_bytes_as_files_are_loaded(tmp_path: Path) -> None:
    pool = decode.DecoderPool(1, max_duration_s=10)
    try:
        received = ClipBytes("messages[0]", encoded(tmp_path, ".flac"))
        whole = decode.load(tmp_path / "whole.flac", max_duration_s=10)
        np.testing.assert_array_equal(pool.load(received), whole)
        with pytest.raises(BadAudio, match=r"messages\[0\].*empty_file"):
            pool.load(ClipBytes("messages[0]", b""))
    finally:
        pool.close()


def test_workers_have_little_memory_and_no_torch() -> None:
    map_memory = "len(__import__('mmap').mmap(-1, {} << 30))"
    items = ["'torch' in __import__('sys').modules", map_memory.format(1), map_memory.format(3)]
    found = dict(isolation.in_workers(eval, items, timeout_s=20))
    assert found[0] is False
    assert found[1] == 1 << 30
    if sys.platform == "linux":
        assert found[2] == isolation.Died(exit_code=1)


def test_file_too_large_for_a_worker_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "a.flac"
    path.write_bytes(with_flac_length(encoded(tmp_path, ".flac"), 2**30))
    _, refused = decode.audit(Dataset(tmp_path).find, [("r", "a.flac")], max_duration_s=1e9)
    assert [(one.id, one.code) for one in refused] == [("r", "too_large")]

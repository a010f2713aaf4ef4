"""MP3s whose header does not say how many frames there are, or says it wrong, are read whole."""

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from preference_data.audio import decode
from preference_data.audio.clip_files import BadAudio

SECONDS = 3


def written(path: Path, rate: int, mode: str = "VARIABLE", channels: int = 1) -> bytes:
    """An MP3 as LAME writes it: silence, then a tone, so that its frames have several bit rates."""
    n = SECONDS * rate
    noise = 0.001 * np.random.default_rng(0).standard_normal(n)
    samples = 0.2 * np.sin(np.arange(n) * 0.05) * (np.arange(n) > n // 2) + noise
    options = {"format": "MP3", "bitrate_mode": mode, "compression_level": 0.5}
    soundfile.write(path, np.tile(samples[:, None], channels), rate, **options)
    return path.read_bytes()


def without_header(mp3: bytes) -> bytes:
    """As an encoder writes it to a pipe."""
    return mp3[mp3.index(mp3[:2], 4) :]


def with_count(mp3: bytes, frames: int) -> bytes:
    at = mp3.index(b"Xing") + 8
    return mp3[:at] + struct.pack(">I", frames) + mp3[at + 4 :]


def without_count(mp3: bytes) -> bytes:
    """Xing's header without its first field."""
    at = mp3.index(b"Xing") + 4
    flags = struct.unpack(">I", mp3[at : at + 4])[0]
    shorter = mp3[:at] + struct.pack(">I", flags & ~1) + mp3[at + 8 :]
    second = mp3.index(mp3[:2], 4)
    return shorter[: second - 4] + bytes(4) + shorter[second - 4 :]


def with_vbri(mp3: bytes) -> bytes:
    """The header of Fraunhofer's encoder in place of LAME's."""
    second = mp3.index(mp3[:2], 4)
    count = mp3[mp3.index(b"Xing") + 8 :][:4]
    header = mp3[:4] + bytes(32) + b"VBRI" + struct.pack(">HHHI", 1, 0, 75, len(mp3)) + count
    return header.ljust(second, b"\0") + mp3[second:]


ID3V2 = b"ID3\4\0\0\0\0\0\x0a" + bytes(10)
ID3V1 = b"TAG" + b"x" * 125
APE = b"APETAGEX" + struct.pack("<IIII", 2000, 32 + 20, 1, 0) + bytes(8) + b"x" * 20 + bytes(32)
CHANGES: dict[str, tuple[int, Callable[[bytes], bytes]]] = {  # how often the sound is in it
    "no header": (1, without_header),
    "no header, tags": (1, lambda mp3: ID3V2 + without_header(mp3) + APE + ID3V1),
    "counts 0": (1, lambda mp3: with_count(mp3, 0)),
    "counts 10": (1, lambda mp3: with_count(mp3, 10)),
    "counts itself": (
        1,
        lambda mp3: with_count(mp3, int.from_bytes(mp3[mp3.index(b"Xing") + 8 :][:4], "big") + 1),
    ),
    "counts nothing": (1, without_count),
    "VBRI": (1, with_vbri),
    "two": (2, lambda mp3: mp3 + mp3),
    "three, tags": (3, lambda mp3: (ID3V2 + mp3 + ID3V1) * 3),
    "two without header": (2, lambda mp3: without_header(mp3) * 2 + APE),
    "two in cases": (2, lambda mp3: with_vbri(mp3) + ID3V2 + without_header(mp3)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_miscounted_file_is_read_whole(tmp_path: Path, change: str, rate: int) -> None:
    times, changed = CHANGES[change]
    path = tmp_path / "a.mp3"
    path.write_bytes(changed(written(path, rate)))
    info = decode.inspect(path, max_duration_s=60)
    samples = decode.load(path, max_duration_s=60)
    frame_s = 1152 / rate
    assert 0 <= info.duration_s - times * SECONDS <= times * 3 * frame_s
    assert len(samples) == pytest.approx(info.duration_s * 16_000, abs=1)
    thirds = np.abs(samples[: times * SECONDS * 16_000]).reshape(times * 2, -1).mean(axis=1)
    assert (thirds[::2] < 0.02).all()  # silence, tone, silence, tone ...
    assert (thirds[1::2] > 0.1).all()


@pytest.mark.parametrize("mode", ["CONSTANT", "AVERAGE", "VARIABLE"])
@pytest.mark.parametrize(
    ("rate", "channels"),
    [(8_000, 1), (11_025, 2), (12_000, 1), (22_050, 2), (24_000, 1), (32_000, 2), (48_000, 1)],
)
def test_sound_without_header_is_the_same(tmp_path: Path, rate: int, channels: int, mode: str) -> None:
    whole, bare = tmp_path / "whole.mp3", tmp_path / "bare.mp3"
    bare.write_bytes(without_header(written(whole, rate, mode, channels)))
    expected, _ = soundfile.read(whole, always_2d=True, dtype="float32")
    with decode._opened(bare, 60) as (_, sound):
        samples = decode._decode(bare, sound)
    middle = len(expected) // 2
    delays = [  # of the encoder, which the header would say
        delay
        for delay in range(1_200)
        if np.abs(samples[delay + middle :][:800] - expected[middle:][:800]).max() < 1e-5
    ]
    assert len(delays) == 1
    np.testing.assert_allclose(
        samples[delays[0] :][3_000 : len(expected) - 1],
        expected[3_000:-1][: len(samples) - delays[0] - 3_000],
        atol=1e-5,
    )


@pytest.mark.parametrize(
    ("first", "second"), [((16_000, 1), (44_100, 1)), ((16_000, 1), (16_000, 2)), ((32_000, 2), (48_000, 2))]
)
def test_files_of_two_kinds_behind_each_other_are_refused(
    tmp_path: Path, first: tuple[int, int], second: tuple[int, int]
) -> None:
    path = tmp_path / "a.mp3"
    content = b"".join(written(path, rate, channels=channels) for rate, channels in (first, second))
    path.write_bytes(content)
    with pytest.raises(BadAudio, match="corrupt: .* is not a frame, and more frames follow"):
        decode.inspect(path, max_duration_s=60)

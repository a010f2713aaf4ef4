"""What phones, browsers and old programs record: decoded by FFmpeg, or refused with a ready command."""

import sys
from pathlib import Path

import numpy as np
import pytest

from preference_data.audio import decode
from preference_data.audio.clip_files import BadAudio
from tests.preference_data.audio.media_files import CODECS, needs_media, write

RATE = 16_000
TONE = (0.3 * np.sin(2 * np.pi * 440 * np.arange(3 * RATE) / RATE)).astype("float32")
STARTS = {
    "memo 1.m4a": b"\0\0\0\x20ftypM4A ",
    "it's.webm": b"\x1a\x45\xdf\xa3\x9f\x42\x86\x81",
    "-old.wma": b"\x30\x26\xb2\x75\x8e\x66\xcf\x11\xa6\xd9",
    "call.amr": b"#!AMR\n\x3c",
    "radio.aac": b"\xff\xf1\x50\x80",
    "wrong.flac": b"\0\0\0\x20ftypisom",
}


def refusal(path: Path) -> BadAudio:
    with pytest.raises(BadAudio) as caught:
        decode.inspect(path, max_duration_s=30)
    return caught.value


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("memo 1.m4a", "ffmpeg -i 'memo 1.m4a' 'memo 1.flac'"),
        ("it's.webm", """ffmpeg -i 'it'"'"'s.webm' 'it'"'"'s.flac'"""),
        ("-old.wma", "ffmpeg -i ./-old.wma ./-old.flac"),
        ("call.amr", "ffmpeg -i call.amr call.flac"),
        ("radio.aac", "ffmpeg -i radio.aac radio.flac"),
        ("wrong.flac", "ffmpeg -i wrong.flac wrong-whole.flac"),
    ],
)
def test_without_the_extra_a_ready_command_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, command: str
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / name).write_bytes(STARTS[name] + bytes(999))
    error = refusal(tmp_path / name)
    assert error.code == "unsupported_format"
    assert "audio-align[media]" in error.detail
    assert error.detail.endswith(f"convert it: {command}")


@needs_media
@pytest.mark.parametrize("suffix", CODECS)
def test_file_is_decoded_whole(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"memo 1{suffix}", TONE, RATE)
    samples = decode.load(path, max_duration_s=30)
    assert -0.05 <= len(samples) / RATE - 3 <= 0.1  # encoders add silence, WMA leaves out a frame
    spectrum = np.abs(np.fft.rfft(samples[RATE : 2 * RATE]))
    assert spectrum.argmax() == 440
    assert samples[RATE : 2 * RATE].std() == pytest.approx(TONE.std(), rel=0.3)
    info = decode.inspect(path, max_duration_s=30)
    assert info.duration_s == pytest.approx(len(samples) / RATE, abs=1e-3)


@needs_media
@pytest.mark.parametrize("suffix", [".m4a", ".mov", ".webm", ".wma"])
def test_channels_are_averaged(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"stereo{suffix}", np.stack([TONE, TONE * 0]), RATE)
    assert decode.inspect(path, max_duration_s=30).channels == 2
    assert decode.load(path, max_duration_s=30)[RATE:-RATE].std() == pytest.approx(TONE.std() / 2, rel=0.1)


@needs_media
@pytest.mark.parametrize("suffix", CODECS)
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_cut_off_file_is_refused(tmp_path: Path, suffix: str, share: float) -> None:
    content = write(tmp_path / f"a{suffix}", TONE, RATE).read_bytes()
    (tmp_path / f"cut{suffix}").write_bytes(content[: int(len(content) * share)])
    assert refusal(tmp_path / f"cut{suffix}").code in ("truncated", "corrupt")


@needs_media
@pytest.mark.parametrize("live", ["0", "1"])
def test_recording_of_a_browser_says_no_length(tmp_path: Path, live: str) -> None:
    content = write(tmp_path / "a.webm", TONE, RATE, live=live).read_bytes()
    assert decode.inspect(tmp_path / "a.webm", max_duration_s=30).duration_s == pytest.approx(3, abs=0.05)
    (tmp_path / "cut.webm").write_bytes(content[:-30])
    assert refusal(tmp_path / "cut.webm").code == "truncated"


@needs_media
@pytest.mark.parametrize("suffix", [".m4a", ".webm", ".amr"])
def test_too_long_file_is_refused(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"a{suffix}", TONE, RATE)
    with pytest.raises(BadAudio, match="too_long"):
        decode.load(path, max_duration_s=2)


@needs_media
@pytest.mark.parametrize("name", ["list.m4a", "list.mp4"])
def test_file_that_lists_others_opens_none(tmp_path: Path, name: str) -> None:
    secret = write(tmp_path / "secret.m4a", TONE, RATE)
    for content in (f"#EXTM3U\n#EXTINF:3,\n{secret}\n", f"ffconcat version 1.0\nfile '{secret}'\n"):
        (tmp_path / name).write_text(content)
        assert refusal(tmp_path / name).code == "unreadable"


@needs_media
@pytest.mark.parametrize("suffix", [".m4a", ".mp4", ".wma"])
def test_file_without_sound_is_refused(tmp_path: Path, suffix: str) -> None:
    content = write(tmp_path / f"a{suffix}", TONE, RATE).read_bytes()
    (tmp_path / f"b{suffix}").write_bytes(content[:24] + bytes(999))
    assert refusal(tmp_path / f"b{suffix}").code in ("unreadable", "corrupt", "truncated")

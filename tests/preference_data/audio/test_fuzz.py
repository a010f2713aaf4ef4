"""Files that were damaged at random: none ends in a traceback, hangs, or passes with sound missing.

`make test` tries 130, `make test-slow` 2,000.
"""

from collections import Counter
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import soundfile
from numpy.random import Generator

from preference_data.audio import decode
from preference_data.audio.clip_files import BadAudio
from tests.preference_data.audio import media_files

RATE, SECONDS = 16_000, 1.5
BYTES = {"PCM_16": 2, "PCM_24": 3, "PCM_32": 4, "FLOAT": 4, "DOUBLE": 8}
FRAME = {"mp3": 1152, "ogg": 1024, "opus": 960, "m4a": 1024, "webm": 960}
"""Samples that a codec's frame has, by a file's ending; others lose none."""


class Mutation(NamedTuple):
    kind: str
    content: bytes
    files: int = 1
    """How many whole files are in it."""


def span(rng: Generator, content: bytes) -> tuple[int, int]:
    start = int(rng.integers(len(content)))
    return start, min(len(content), start + int(rng.integers(1, 400)))


def flip(rng: Generator, content: bytes) -> Mutation:
    changed = bytearray(content)
    for at in rng.integers(len(content), size=rng.integers(1, 9)):
        changed[at] ^= 1 << int(rng.integers(8))
    return Mutation("flip", bytes(changed))


def header(rng: Generator, content: bytes) -> Mutation:
    at, n = int(rng.integers(4, 64)), int(rng.integers(1, 5))
    value = [bytes(n), b"\xff" * n, rng.bytes(n)][int(rng.integers(3))]
    return Mutation("header", content[:at] + value + content[at + n :])


def cut(rng: Generator, content: bytes) -> Mutation:
    return Mutation("cut", content[: int(rng.integers(len(content)))])


def zeros(rng: Generator, content: bytes) -> Mutation:
    start, end = span(rng, content)
    return Mutation("zeros", content[:start] + bytes(end - start) + content[end:])


def twice(rng: Generator, content: bytes) -> Mutation:
    start, end = span(rng, content)
    return Mutation("twice", content[:end] + content[start:])


def left_out(rng: Generator, content: bytes) -> Mutation:
    start, end = span(rng, content)
    return Mutation("left_out", content[:start] + content[end:])


def concatenated(rng: Generator, content: bytes) -> Mutation:
    n = int(rng.integers(2, 4))
    return Mutation("concatenated", content * n, n)


MUTATIONS: list[Callable[[Generator, bytes], Mutation]] = [
    flip,
    header,
    cut,
    zeros,
    twice,
    left_out,
    concatenated,
]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A file of each format, by its name."""
    rng = np.random.default_rng(0)
    t = np.arange(int(RATE * SECONDS)) / RATE
    sound = (0.3 * np.sin(2 * np.pi * 440 * t) + 0.02 * rng.standard_normal(t.size)).astype("float32")
    written = {}
    for name, kind, coding in [
        ("a.wav", "WAV", "PCM_16"),
        ("float.wav", "WAV", "FLOAT"),
        ("a.rf64", "RF64", "PCM_24"),
        ("a.w64", "W64", "PCM_16"),
        ("a.aiff", "AIFF", "PCM_16"),
        ("a.au", "AU", "PCM_16"),
        ("a.caf", "CAF", "PCM_16"),
        ("a.flac", "FLAC", "PCM_16"),
        ("a.mp3", "MP3", "MPEG_LAYER_III"),
        ("a.ogg", "OGG", "VORBIS"),
        ("a.opus", "OGG", "OPUS"),
    ]:
        file = BytesIO()
        soundfile.write(file, sound, RATE, format=kind, subtype=coding)
        written[name] = file.getvalue()
    if media_files.AVAILABLE:
        folder = tmp_path_factory.mktemp("media")
        for name in ("a.m4a", "a.webm"):
            written[name] = media_files.write(folder / name, sound, RATE).read_bytes()
    return written


def is_whole(name: str, mutation: Mutation, info: decode.AudioInfo, length: int) -> bool:
    """Whether all sound that was in the originals is in a file, within a frame of its codec a file."""
    container, _, coding = info.format.partition("/")
    if coding in BYTES and container != "FLAC":  # whatever its header says of rate, width and channels
        return info.frames * info.channels * BYTES[coding] >= length * mutation.files - 8
    missing = SECONDS * RATE * mutation.files - info.frames * RATE / info.sample_rate_hz
    return missing <= FRAME.get(name.rpartition(".")[2], 0) * mutation.files


def short_ones(tmp_path: Path, originals: dict[str, bytes], n: int, seed: int = 0) -> list[str]:
    """Damages `n` files and reads them; says which passed with sound missing, hung or crashed."""
    mutations: dict[str, tuple[str, Mutation]] = {}
    for number in range(n):
        rng = np.random.default_rng([seed, number])
        name = list(originals)[number % len(originals)]
        mutation = MUTATIONS[int(rng.integers(len(MUTATIONS)))](rng, originals[name])
        path = f"{number}-{name}"
        (tmp_path / path).write_bytes(mutation.content)
        mutations[path] = name, mutation
    find = tmp_path.joinpath
    outcomes = decode.examine(find, mutations, by="samples", max_duration_s=60, file_timeout_s=20)
    wrong, codes = [], Counter[str]()
    for (path, (name, mutation)), outcome in zip(mutations.items(), outcomes, strict=True):
        if isinstance(outcome, BadAudio):
            codes[outcome.code] += 1
            if outcome.code in ("decoder_hung", "decoder_crashed"):
                wrong.append(f"{path} {mutation.kind}: {outcome}")
        else:
            codes["read"] += 1
            if not is_whole(name, mutation, outcome, payload_of(name)):
                wrong.append(f"{path} {mutation.kind}: {outcome}")
    assert codes["read"] > n / 20
    assert codes.total() - codes["read"] > n / 4
    print(codes, *wrong, sep="\n")
    return wrong


def payload_of(name: str) -> int:
    """Bytes of sound in a file that is not compressed."""
    width = {"float.wav": 4, "a.rf64": 3}.get(name, 2)
    return int(RATE * SECONDS) * width


def test_damaged_file_is_read_whole_or_named(tmp_path: Path, originals: dict[str, bytes]) -> None:
    assert short_ones(tmp_path, originals, 130) == []


@pytest.mark.slow
def test_two_thousand_damaged_files(tmp_path: Path, originals: dict[str, bytes]) -> None:
    assert short_ones(tmp_path, originals, 2_000) == []

"""Shared fixtures: a Qwen2-Audio of a few thousand parameters and a folder of short tones."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import soundfile

from tests import forked

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

TEXTS = [
    "system\nYou are a helpful assistant.\n",
    "user\nAudio 1: \nAudio 2: \n",
    "assistant\n",
    "Is the tone high or low?",
    "The tone is high.",
    "The tone is low.",
    "Generate the caption in English: A low tone.",
]


class Tiny(NamedTuple):
    """A saved policy and a folder with four clips, `0.wav` to `3.wav` (0.3 to 0.9 s)."""

    policy: Path
    audio: Path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Tiny:
    from align.models.qwen2_audio import model as qwen2_audio

    root = tmp_path_factory.mktemp("tiny")
    processor = qwen2_audio.build_processor(TEXTS * 20, vocab_size=400, mel_bins=32, hop_length=320, clip_s=1)
    model = qwen2_audio.build_model(processor, d_model=32, heads=2, audio_layers=1, text_layers=1, seed=0)
    qwen2_audio.save(model, processor, root / "policy")
    (root / "audio").mkdir()
    for i in range(4):
        t = np.arange(int(16_000 * (0.3 + 0.2 * i))) / 16_000
        wave = 0.4 * np.sin(2 * np.pi * (200 if i % 2 else 2500) * t)
        soundfile.write(root / "audio" / f"{i}.wav", wave.astype(np.float32), 16_000)
    return Tiny(root / "policy", root / "audio")


@pytest.fixture(scope="session")
def programs() -> Iterator[forked.Server]:
    """Starts our programs without their imports."""
    with forked.server() as server:
        yield server


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file is one unit of work for one worker, but for tests that name a group of their own."""
    for item in items:
        if not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))


def pytest_collection_finish() -> None:
    """Modules need not be looked through in each garbage collection of a training, 1 s each."""
    gc.collect()
    gc.freeze()

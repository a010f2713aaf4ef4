"""Shared fixtures: a Qwen2-Audio of a few thousand parameters and a folder of short tones."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import soundfile
from xdist.scheduler import LoadFileScheduling

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


SEVERAL = "tests whose processes wait for each other, so only one of them at a time"
SECOND = "the whole loop, killed or waiting"
UNITS = {
    **dict.fromkeys(("test_full_size_twin.py", "test_distributed.py", "test_new_tokens.py"), SEVERAL),
    **dict.fromkeys(("test_filtering_ranks.py", "test_packed_ranks.py", "test_grpo_twin.py"), SEVERAL),
    **dict.fromkeys(("::test_killed_in_every", "::test_people_are", "::test_a_server_that_is_not"), SECOND),
}
"""Part of a test's id -> what goes to one worker; else a file does. (xdist 3.8's `xdist_group` marks do
nothing with pytest 9.2, which no longer reads the node id that xdist changes.)"""


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling:
    """Files go to workers one by one, in their order, but for `UNITS`."""

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            own = (unit for part, unit in UNITS.items() if part in nodeid)
            return next(own, super()._split_scope(nodeid))

    return Scheduling(config, log)


def pytest_collection_finish() -> None:
    """Modules need not be looked through in each garbage collection of a training, 1 s each."""
    gc.collect()
    gc.freeze()

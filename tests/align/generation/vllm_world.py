"""A policy that vLLM serves on a CPU, what its tests need, and how two engines' completions are compared."""

import os
import time
from contextlib import suppress

import psutil
import pytest

from align.generation.vllm.server import missing
from align.models.qwen2_audio import model as qwen2_audio
from tests.align.generation import toy_policy
from tests.conftest import TEXTS

NEEDS_VLLM = [
    pytest.mark.slow,
    pytest.mark.skipif(missing() is not None and not os.environ.get("CI"), reason=str(missing())),
]


def make_policy(audio, to, seed=0):
    """A toy policy; vLLM's attention on a CPU needs heads of 32 at least."""
    processor = qwen2_audio.build_processor(TEXTS * 20, vocab_size=400, mel_bins=32, hop_length=320, clip_s=1)
    model = qwen2_audio.build_model(processor, d_model=64, heads=2, audio_layers=1, text_layers=1, seed=seed)
    qwen2_audio.save(model, processor, to.with_name(f"random-{to.name}"))
    toy_policy.train(to.with_name(f"random-{to.name}"), audio, to)
    return to


def assert_equal(ours, theirs):
    assert sorted(ours) == sorted(theirs)
    for number, (completion,) in ours.items():
        (other,) = theirs[number]
        assert other.token_ids == completion.token_ids
        assert other.text == completion.text
        assert other.logps == pytest.approx(completion.logps, abs=1e-4)


def tokens(groups):
    return {number: [completion.token_ids for completion in group] for number, group in groups.items()}


def servers():
    """Processes of vLLM's that this one has started."""
    return {child for child in psutil.Process().children(recursive=True) if is_vllm(child)}


def is_vllm(process):
    with suppress(psutil.Error):
        words = process.cmdline()
        return is_alive(process) and any(word.startswith(("VLLM::", "vllm.entry")) for word in words)
    return False


def is_alive(process):
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def assert_end(processes, within_s=30):
    """All of them end by themselves."""
    deadline = time.monotonic() + within_s
    while alive := [process for process in processes if is_alive(process)]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.1)

"""Real vLLM on the CPU against our engine: the same greedy tokens; other weights; killed and resumed."""

import os
import signal
import subprocess
import sys
import time
from functools import partial

import psutil
import pytest

from align.generation.complete import RequestSet, complete_all
from align.generation.engine import Decoding
from align.generation.transformers_engine import TransformersEngine
from align.generation.vllm.engine import VllmEngine
from align.generation.vllm.server import ServerFailed, environment
from align.models.features import ClipFeatures
from align.models.qwen2_audio import model as qwen2_audio
from tests.align.generation import toy_policy
from tests.align.generation.test_transformers_engine import requests
from tests.conftest import TEXTS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not environment().is_ready and not os.environ.get("CI"), reason="run `align engine install` first"
    ),
]
GREEDY = Decoding(max_new_tokens=12)
DRAWN = Decoding(max_new_tokens=12, temperature=1.0, completions=4)


@pytest.fixture(scope="module")
def policies(tiny, tmp_path_factory):
    """Two policies of one shape; vLLM's attention on a CPU needs heads of 32 at least."""
    root = tmp_path_factory.mktemp("vllm")
    processor = qwen2_audio.build_processor(TEXTS * 20, vocab_size=400, mel_bins=32, hop_length=320, clip_s=1)
    for seed in (0, 1):
        model = qwen2_audio.build_model(
            processor, d_model=64, heads=2, audio_layers=1, text_layers=1, seed=seed
        )
        qwen2_audio.save(model, processor, root / f"random-{seed}")
        toy_policy.train(root / f"random-{seed}", tiny.audio, root / str(seed))
    return root / "0", root / "1"


@pytest.fixture(scope="module")
def clips(policies, tiny):
    return ClipFeatures(qwen2_audio.load_processor(policies[0]), tiny.audio)


@pytest.fixture(scope="module")
def engine(policies, clips):
    engine = VllmEngine(policies[0], clips)
    yield engine
    engine.close()


def assert_equal(ours, theirs):
    assert sorted(ours) == sorted(theirs)
    for number, (completion,) in ours.items():
        (other,) = theirs[number]
        assert other.token_ids == completion.token_ids
        assert other.text == completion.text
        assert other.logps == pytest.approx(completion.logps, abs=1e-4)


def tokens(groups):
    return {number: [completion.token_ids for completion in group] for number, group in groups.items()}


def test_greedy_equals_transformers_before_and_after_other_weights_are_loaded(engine, policies, clips):
    """Chats with one clip, two or none and plain texts: 200 requests."""
    numbered = dict(enumerate(requests(200)))
    ours = TransformersEngine(policies[0], clips)
    before = dict(engine.complete(numbered, GREEDY, 0))
    assert_equal(dict(ours.complete(numbered, GREEDY, 0)), before)
    engine.load(policies[1])
    ours.load(policies[1])
    few = {number: numbered[number] for number in range(40)}
    after = dict(engine.complete(few, GREEDY, 0))
    assert_equal(dict(ours.complete(few, GREEDY, 0)), after)
    assert any(after[number] != before[number] for number in few)
    with pytest.raises(FileNotFoundError, match="no saved policy"):
        engine.load(policies[0].parent)
    engine.load(policies[0])  # and it still serves
    assert_equal({0: before[0]}, dict(engine.complete({0: numbered[0]}, GREEDY, 0)))


def test_draws_depend_on_seed_and_number_alone(engine):
    numbered = {7 * i: request for i, request in enumerate(requests(30))}
    together = tokens(dict(engine.complete(numbered, DRAWN, seed=3)))
    few = {number: numbered[number] for number in reversed(list(numbered)[10:14])}
    assert tokens(dict(engine.complete(few, DRAWN, seed=3))) == {number: together[number] for number in few}
    assert tokens(dict(engine.complete(few, DRAWN, seed=4))) != {number: together[number] for number in few}
    assert len({tuple(ids) for group in together.values() for ids in group}) > 30


def test_what_a_killed_server_has_completed_is_kept_and_a_resume_completes_the_rest(
    engine, policies, clips, tmp_path
):
    """The resume has a server of another process, which does not outlive its client's kill -9."""
    numbered = requests(60)
    folder = tmp_path / "batches"
    run = partial(
        complete_all, sets=[RequestSet("prompts", clips, numbered)], decoding=DRAWN, seed=5, batch_size=10
    )
    whole = run(lambda: Kept(engine, batches=6))["prompts"]
    with pytest.raises(ServerFailed, match="vLLM"):
        run(lambda: Kept(engine, batches=2), folder=folder)
    kept = sorted((folder / "prompts").iterdir())
    assert len(kept) == 2
    times = [path.stat().st_mtime_ns for path in kept]
    command = [sys.executable, "-c", RESUME, *map(str, (policies[0], clips.root, folder))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as client:
        server = psutil.Process(int(client.stdout.readline()))
        family = [server, *server.children(recursive=True)]
        assert len(family) > 1  # vLLM's own processes
        client.kill()
    resumed = run(no_engine, folder=folder)["prompts"]
    assert [path.stat().st_mtime_ns for path in kept] == times
    assert tokens(dict(enumerate(resumed))) == tokens(dict(enumerate(whole)))
    deadline = time.monotonic() + 30
    while any(process.is_running() and process.status() != "zombie" for process in family):
        assert time.monotonic() < deadline
        time.sleep(0.1)


class Kept:
    """An engine that stays open; its server is killed after some batches."""

    def __init__(self, engine, batches):
        self.engine, self.batches = engine, batches

    def complete(self, *arguments):
        if self.batches == 0:
            os.killpg(self.engine.server.pid, signal.SIGKILL)
        self.batches -= 1
        return self.engine.complete(*arguments)

    def close(self):
        pass


def no_engine():
    raise AssertionError("nothing is missing")


RESUME = """
import sys
from functools import partial
from pathlib import Path
from align.generation.complete import RequestSet, complete_all
from align.generation.engine import Decoding
from align.generation.vllm.engine import VllmEngine
from align.models.features import ClipFeatures
from align.models.qwen2_audio.model import load_processor
from tests.align.generation.test_transformers_engine import requests

class Open(VllmEngine):
    def close(self):
        print(self.server.pid, flush=True)
        sys.stdin.read()

policy, root, folder = map(Path, sys.argv[1:])
clips = ClipFeatures(load_processor(policy), root)
sets = [RequestSet("prompts", clips, requests(60))]
decoding = Decoding(max_new_tokens=12, temperature=1.0, completions=4)
complete_all(partial(Open, policy, clips), sets, decoding, seed=5, batch_size=10, folder=folder)
"""

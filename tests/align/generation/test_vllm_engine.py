"""Real vLLM on the CPU against our engine: the same greedy tokens; other weights; killed and resumed."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from functools import partial

import psutil
import pytest

from align.generation.complete import RequestSet, complete_all
from align.generation.engine import Decoding, open_engine
from align.generation.transformers_engine import TransformersEngine
from align.generation.vllm.engine import VllmEngine
from align.generation.vllm.server import ServerFailed
from align.models.features import ClipFeatures
from align.models.qwen2_audio import model as qwen2_audio
from tests.align.generation.test_transformers_engine import requests
from tests.align.generation.vllm_world import (
    NEEDS_VLLM,
    assert_end,
    assert_equal,
    is_vllm,
    make_policy,
    tokens,
)

pytestmark = NEEDS_VLLM
GREEDY = Decoding(max_new_tokens=12)
DRAWN = Decoding(max_new_tokens=12, temperature=1.0, completions=4)


@pytest.fixture(scope="module")
def policies(tiny, tmp_path_factory):
    """Two policies of one shape."""
    root = tmp_path_factory.mktemp("vllm")
    return [make_policy(tiny.audio, root / str(seed), seed) for seed in (0, 1)]


@pytest.fixture(scope="module")
def clips(policies, tiny):
    return ClipFeatures(qwen2_audio.load_processor(policies[0]), tiny.audio)


@pytest.fixture(scope="module")
def engine(policies, clips):
    engine = VllmEngine(policies[0], clips)
    yield engine
    engine.close()


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
    assert_end(family)


@pytest.mark.alone
@pytest.mark.timeout(900)
def test_workers_with_a_server_each_complete_what_one_does_and_leave_none(
    policies, clips, tmp_path, monkeypatch
):
    """Also where the run fails in the middle; the next one completes the rest."""
    monkeypatch.setenv("TEST_MARK", str(tmp_path))
    numbered, folder = requests(60), tmp_path / "batches"
    run = partial(
        complete_all, sets=[RequestSet("prompts", clips, numbered)], decoding=DRAWN, seed=5, batch_size=10
    )
    seen = []

    def failing(done):
        seen.extend(marked(tmp_path))
        if done:
            raise KeyboardInterrupt

    two = partial(run, partial(open_engine, "vllm", policies[0], clips), folder=folder, workers=2)
    with pytest.raises(KeyboardInterrupt):
        two(on_progress=failing)
    assert len({*seen}) > 3  # two servers, with processes of their own
    assert_end([*seen, *marked(tmp_path)], within_s=120)  # also where a server was still starting
    assert len(list((folder / "prompts").iterdir())) == 1
    resumed = two()["prompts"]
    assert_end(marked(tmp_path))
    whole = run(partial(open_engine, "vllm", policies[0], clips))["prompts"]  # of a server that is not killed
    assert tokens(dict(enumerate(resumed))) == tokens(dict(enumerate(whole)))


def marked(folder):
    """Processes of vLLM's that were started below a test which has set the mark."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("TEST_MARK") == str(folder) and is_vllm(process):
                found.append(process)
    return found


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

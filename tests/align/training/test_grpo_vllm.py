"""GRPO whose completions come from real vLLM on the CPU: the weights it draws with, and how it ends."""

import os
import signal
import subprocess
import sys

import psutil
import pytest
import torch

from align.generation.engine import Decoding
from align.generation.vllm.engine import VllmEngine
from align.generation.vllm.server import ServerFailed
from align.training.checkpoints import checkpoints, live_policy, step_of
from tests.align.generation import vllm_world
from tests.align.generation.test_transformers_engine import requests
from tests.align.training import tiny_training
from tests.align.training.test_grpo import LORA, PROMPTS, G, T, make_trainer, perturb
from tests.align.training.tiny_training import rows_of, stage, weights
from tests.conftest import Tiny

pytestmark = [
    *vllm_world.NEEDS_VLLM,
    pytest.mark.skipif(torch.cuda.is_available(), reason="written for servers on a CPU"),
]
NUMBERED = dict(enumerate(requests(40)))


# -------------------------------------------------------------------------- the weights it draws with


@pytest.fixture(scope="module")
def own(tiny, tmp_path_factory):
    """The tones, and a trained policy about them."""
    return Tiny(vllm_world.make_policy(tiny.audio, tmp_path_factory.mktemp("grpo-vllm") / "own"), tiny.audio)


@pytest.fixture(scope="module")
def server(own, tmp_path_factory):
    """One server for all trainers: each sends its own weights."""
    trainer = make_trainer(own, tmp_path_factory.mktemp("server"), method={"max_new_tokens": 12})
    engine = VllmEngine(own.policy, trainer._live.clips)
    yield engine
    engine.close()


@pytest.fixture
def trainer_of(own, server, tmp_path):
    def make(**options):
        method = {"open_engine": lambda clips: server}
        return make_trainer(own, tmp_path / "out", method=method, **options)

    return make


def greedy(engine, trainer):
    trainer.model.eval()
    decoding = Decoding(12, suppress=(trainer.clip_ids.audio_id,))
    return dict(engine.complete(NUMBERED, decoding, 0))


def test_completions_are_those_of_the_weights_as_they_are(trainer_of, own, tmp_path):
    """Greedy ones equal the policy's own, drawn ones a fresh server's, before and after a step."""
    trainer = trainer_of()
    before = greedy(trainer._current_engine(), trainer)
    vllm_world.assert_equal(greedy(trainer._live, trainer), before)
    perturb(trainer.model)
    after = greedy(trainer._current_engine(), trainer)
    vllm_world.assert_equal(greedy(trainer._live, trainer), after)
    assert any(after[number] != before[number] for number in NUMBERED)
    rows = [trainer.train_dataset[i] for i in range(PROMPTS)]
    drawn = trainer._complete(rows)
    assert not list((tmp_path / "out").glob(".partial-live-*"))
    with live_policy(trainer.model, tmp_path) as policy:
        trainer.processing_class.save_pretrained(policy)
        fresh = VllmEngine(policy, trainer._live.clips)
    numbered = {row["draw"]: row["request"] for row in rows}
    decoding = Decoding(T, 1.0, completions=G, suppress=(trainer.clip_ids.audio_id,))
    groups = dict(fresh.complete(numbered, decoding, trainer.args.seed))
    fresh.close()
    by_draw = {row["draw"]: group for row, group in zip(rows, drawn, strict=True)}
    assert vllm_world.tokens(groups) == vllm_world.tokens(by_draw)


def test_low_rank_updates_are_merged_into_what_is_sent(trainer_of):
    trainer = trainer_of(lora=LORA)
    perturb(trainer.model)
    vllm_world.assert_equal(greedy(trainer._live, trainer), greedy(trainer._current_engine(), trainer))


def test_a_clip_is_never_drawn(trainer_of):
    """<|AUDIO|> by far the likeliest token."""
    trainer = trainer_of()
    audio_id, head = trainer.clip_ids.audio_id, trainer.model.lm_head.weight
    with torch.no_grad():
        trainer.model.model.language_model.norm.weight.fill_(1.0)
        head.mul_(0.01)
        head[audio_id] = 1000 * head.abs().max() * torch.sign(torch.randn(head.shape[1]))
    allowed = dict(trainer._current_engine().complete(NUMBERED, Decoding(4), 0))
    assert audio_id in {token for (one,) in allowed.values() for token in one.token_ids}
    groups = trainer._complete([trainer.train_dataset[i] for i in range(PROMPTS)])
    assert audio_id not in {token for group in groups for one in group for token in one.token_ids}


# -------------------------------------------------------------------------- the stage


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny_training.make_world(tmp_path_factory.mktemp("world") / "world", d_model=64)


def make_config(**changes):
    return tiny_training.make_config("grpo-vllm", steps=6, save_steps=2, **changes)


KILLED = """
import os, signal, sys
import psutil
from align.training.grpo_trainer import AudioGRPOTrainer
from tests.align.training import tiny_training

world, folder = sys.argv[1:]
stock, passed = AudioGRPOTrainer._total, []

def dying(*args):
    passed.append(1)
    if len(passed) == 5:
        print(*(child.pid for child in psutil.Process().children(recursive=True)), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    return stock(*args)

AudioGRPOTrainer._total = dying
config = tiny_training.make_config("grpo-vllm", steps=6, save_steps=2)
tiny_training.run_here(config, world, folder)
"""


@pytest.mark.timeout(1800)
def test_killed_and_resumed_is_the_unbroken_run_and_leaves_no_server(world, tmp_path):
    """Dies of kill -9 in step 5, goes on from checkpoint 4."""
    whole, broken, before = tmp_path / "whole", tmp_path / "broken", vllm_world.servers()
    tiny_training.run_here(make_config(), world, whole)
    assert vllm_world.servers() <= before
    command = [sys.executable, "-c", KILLED, str(world), str(broken)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        numbers = process.stdout.readlines()[-1].split()
        family = [psutil.Process(int(number)) for number in numbers if psutil.pid_exists(int(number))]
    assert process.returncode == -signal.SIGKILL
    assert len(numbers) > 1  # vLLM's own processes
    vllm_world.assert_end(family)
    assert [step_of(path) for path in checkpoints(stage(broken) / "checkpoints")] == [4]
    tiny_training.run_here(make_config(), world, broken)
    for name, value in weights(whole).items():
        assert torch.equal(weights(broken)[name], value), name
    assert [row["reward"] for row in rows_of(broken)] == [row["reward"] for row in rows_of(whole)]
    for row in rows_of(whole):
        assert 0 < row["sampling/sampling_logp_difference/max"] < 1e-4
    assert vllm_world.servers() <= before


def test_a_policy_that_vllm_cannot_serve_is_refused_before_the_first_step(tmp_path):
    world = tiny_training.make_world(tmp_path / "world")
    with pytest.raises(ServerFailed, match="attention heads 16 wide: on a CPU vLLM takes 32, 64"):
        tiny_training.run_here(make_config(), world, tmp_path)
    assert rows_of(tmp_path) == []


@pytest.mark.timeout(900)
def test_two_processes_have_a_server_each_and_train_as_one_does(world, tmp_path):
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "STEPS": "2", "SAVE_STEPS": "2"}
    case = "grpo-ddp-vllm"
    done = subprocess.run(
        [*program, tiny_training.__file__, str(world), str(tmp_path), case],
        capture_output=True, text=True, env=env, timeout=800, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    config = tiny_training.make_config("grpo-vllm", steps=2, save_steps=2, beta=0.0)
    tiny_training.run_here(config, world, tmp_path / "one")
    for one, both in zip(rows_of(tmp_path / "one"), rows_of(tmp_path / case), strict=True):
        for name in ("reward", "completions/mean_length", "entropy", "grad_norm"):
            assert both[name] == pytest.approx(one[name], rel=1e-4), (one["step"], name)

"""`make gpu-check`: its parts run on a CPU at toy size; one that fails takes no other with it."""

import json
import multiprocessing
import os
import subprocess
import sys
import time

import pytest
import torch

from tests.benchmarks.gpu_check import main, run_part
from tests.benchmarks.gpu_parts import PARTS, Part

FORK = multiprocessing.get_context("fork")


def test_every_part_runs_at_toy_size(tmp_path):
    out = tmp_path / "rehearsal.json"
    names = [name for name in PARTS if name not in ("card", "vllm")]  # a vLLM server takes minutes to start
    chosen = [word for name in names for word in ("--part", name)]
    command = [sys.executable, "-m", "tests.benchmarks.gpu_check", "--rehearse", "--out", str(out), *chosen]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(out.read_text())
    assert not told["is_evidence"]
    parts = told["parts"]
    assert {part["status"] for part in parts.values()} == {"ok"}
    assert parts["attention"]["split"]["agrees"]
    assert parts["dpo_ours"]["best"]["useful_flops_per_pair"] > 0
    assert parts["memory"]["planned_gb"] == pytest.approx(parts["memory"]["arithmetic_gb"], rel=0.01)
    assert parts["resume"]["resumed"]["bit_equal"]
    assert parts["resume"]["frozen_tower"]
    assert parts["rollouts"]["ours"]["tokens_per_s"] > 0
    assert "trl_default / ours, s per pair" in told["summary"]


def raises(size):
    yield {"first": 1}
    raise ValueError("no such kernel")


def dies(size):
    yield {"first": 1}
    os.kill(os.getpid(), 9)


def hangs(size):
    yield {"first": 1}
    subprocess.run(["sleep", "300"])


@pytest.mark.parametrize(
    ("part", "status", "error"),
    [
        (raises, "failed", "ValueError: no such kernel"),
        (dies, "failed", "its process ended with -9"),
        (hangs, "out of time", "not done after 2 s"),
    ],
)
def test_what_a_part_had_measured_stays_when_it_fails(monkeypatch, part, status, error):
    monkeypatch.setitem(PARTS, "sft", Part(part, 2))
    started = time.monotonic()
    figures = run_part(FORK, "sft", "toy", 2)
    assert (figures["first"], figures["status"], figures["error"]) == (1, status, error)
    assert time.monotonic() - started < 20


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([]) == 1
    assert "torch sees no GPU on this machine; nothing was measured" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())

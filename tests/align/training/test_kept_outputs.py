"""Training with the outputs of a frozen tower on disk: the same weights bit for bit, however often killed."""

import os
import shutil
import signal
import time

import pytest
import torch

from align.models.tower_outputs import FOLDER
from tests.align.training import tiny_training
from tests.align.training.tiny_training import make_config, rows_of, run_here, weights


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """With a tower of more than a million parameters."""
    return tiny_training.make_world(tmp_path_factory.mktemp("world"), d_model=320)


def files(folder):
    return sorted((folder / FOLDER).glob("*/??/*.safetensors"))


def losses(folder):
    return [(row["loss"], row["grad_norm"]) for row in rows_of(folder)]


def assert_equal_weights(one, other):
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("kind", ["sft", "dpo", "grpo"])
def test_outputs_that_are_found_teach_the_same(world, tmp_path, kind, capfd):
    config = make_config(f"{kind}-kept", steps=3, save_steps=3)
    first, second, without = tmp_path / "first", tmp_path / "second", tmp_path / "without"
    run_here(config, world, first)
    assert f"outputs of the audio tower are kept in {first / FOLDER}" in capfd.readouterr().out
    assert files(first)
    second.mkdir()
    shutil.copytree(first / FOLDER, second / FOLDER)  # a run folder may be moved
    written = [path.stat().st_mtime_ns for path in files(second)]
    run_here(config, world, second)
    assert losses(first) == losses(second)
    assert_equal_weights(first, second)
    assert [path.stat().st_mtime_ns for path in files(second)] == written

    off = make_config(f"{kind}-kept", steps=3, save_steps=3, hardware={"tower_outputs_gb": 0})
    run_here(off, world, without)
    assert "are not kept: hardware.tower_outputs_gb is 0" in capfd.readouterr().out
    assert not (without / FOLDER).exists()
    # Of a batch the tower's last bits are others than of a clip alone
    assert losses(without) == [pytest.approx(pair, rel=1e-4, abs=1e-5) for pair in losses(first)]


def test_a_killed_run_resumes_to_the_same_bits(world, programs, tmp_path):
    def start(out):
        out.mkdir(exist_ok=True)
        env = {**os.environ, "OMP_NUM_THREADS": "1", "STEPS": "8", "SAVE_STEPS": "2"}
        log, script = out / "log.txt", tiny_training.__file__
        return programs.start(script, str(world), str(out), "sft-kept", env=env, stderr=log)

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(whole).wait() == 0
    process, trace = start(killed), killed / "sft-kept" / "trace-0.jsonl"
    while process.poll() is None and (not trace.exists() or len(trace.read_text().splitlines()) < 4):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (killed / "sft-kept" / "finished").exists()
    found = files(killed / "sft-kept")
    assert found
    for path in found:
        path.write_bytes(path.read_bytes()[:-4])
    assert start(killed).wait() == 0
    assert "is damaged; it is made again" in (killed / "log.txt").read_text()
    assert_equal_weights(whole / "sft-kept", killed / "sft-kept")
    assert [path.name for path in files(killed / "sft-kept")] == [
        path.name for path in files(whole / "sft-kept")
    ]


def test_features_that_are_augmented_are_not_kept(world, tmp_path, capfd):
    run_here(make_config("sft-frozen", steps=1, save_steps=1), world, tmp_path / "run")
    assert "outputs of the audio tower are not kept: features are augmented" in capfd.readouterr().out
    assert not (tmp_path / "run" / FOLDER).exists()

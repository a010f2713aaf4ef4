"""Training stages on Ray Train's workers: killed, hung and stopped, with real processes and signals."""

import json
import os
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from align.execution.workers import ClusterTooSmall, WorkersFailed, run_stage
from align.run_folder.artifacts import StageFolder, read_metrics
from align.training.checkpoints import newest, step_of
from tests.align.training import tiny_training
from tests.benchmarks import kill_drill

pytestmark = [pytest.mark.alone, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[3]
STEPS, SAVE_STEPS = 60, 10


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny_training.make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def alone(world, tmp_path_factory):
    """The same training in one process."""
    folder = tmp_path_factory.mktemp("alone")
    tiny_training.run_here(
        tiny_training.make_config("sft", steps=STEPS, save_steps=SAVE_STEPS), world, folder
    )
    return folder


class Driver:
    """A driver with two Ray workers, in a process of its own."""

    def __init__(self, programs, world, out):
        env = {"STEPS": str(STEPS), "SAVE_STEPS": str(SAVE_STEPS), "TIMEOUT_S": "15"}
        out.mkdir(exist_ok=True)
        self.out = out
        self.stage = out / "sft-ddp" / ".partial-stage"
        self.log = out / "log.txt"
        words = ["--drive", str(world), str(out)]
        env, log = {**os.environ, **env, "PYTHONPATH": str(ROOT)}, self.log
        self.process = programs.start(kill_drill.__file__, *words, env=env, stdout=log, stderr=log)

    def at(self, step, group):
        """Wait until this step has been taken by this group of workers; returns each rank's process."""
        folder = self.stage / ".workers" / f"group-{group:04d}"
        deadline = time.monotonic() + 300
        while not (folder.exists() and len(read_metrics(self.stage / "metrics.jsonl")) >= step):
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.005)
        places = [(folder / f"rank-{rank}.place").read_text().split() for rank in range(2)]
        return [psutil.Process(int(place[1])) for place in places]


def weights(folder):
    return load_file(folder / "model" / "model.safetensors")


def assert_equal_to(alone, stage):
    a, b = (read_metrics(folder / "metrics.jsonl") for folder in (alone / ".partial-stage", stage))
    assert [row["step"] for row in b] == list(range(1, STEPS + 1))
    for x, y in zip(a, b, strict=True):
        assert y["loss"] == pytest.approx(x["loss"], rel=1e-4)
        assert y["num_tokens"] == x["num_tokens"]
    for name, value in weights(alone / ".partial-stage").items():
        torch.testing.assert_close(weights(stage)[name], value, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.slow
def test_a_hung_and_a_killed_worker_are_named_and_replaced(programs, world, alone, tmp_path):
    driver = Driver(programs, world, tmp_path / "run")
    hung = driver.at(13, group=1)[1]
    hung.suspend()
    driver.at(35, group=2)[0].kill()
    assert driver.process.wait(timeout=600) == 0, driver.log.read_text()[-3000:]
    output = driver.log.read_text()
    assert (
        f"workers replaced (1 of 3): rank 1 (process {hung.pid} on {os.uname().nodename}) reported nothing"
        in output
    )
    assert "workers replaced (2 of 3): rank 0" in output
    metrics = json.loads((tmp_path / "run" / "done.json").read_text())
    assert (metrics["workers"], metrics["workers_replaced"]) == (2, 2)
    assert metrics["peak_memory_mb"] > 200  # of a worker, which has imported torch: the driver has not
    assert_equal_to(alone, driver.stage)


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)])
def test_a_stopped_run_saves_exits_with_75_and_resumes_in_one_process(
    programs, world, alone, tmp_path, number
):
    driver = Driver(programs, world, tmp_path / "run")
    driver.at(5, group=1)
    os.killpg(driver.process.pid, number)  # as a terminal does: the workers get it too
    assert driver.process.wait(timeout=300) == 75, driver.log.read_text()[-3000:]
    saved = newest(driver.stage / "checkpoints")
    assert step_of(saved) >= 5
    assert step_of(saved) == read_metrics(driver.stage / "metrics.jsonl")[-1]["step"]
    config = tiny_training.make_config("sft", steps=STEPS, save_steps=SAVE_STEPS)
    tiny_training.run_here(config, world, tmp_path / "run" / "sft-ddp")
    assert_equal_to(alone, driver.stage)


def test_a_mistake_of_the_stage_is_told_and_not_tried_again(world, tmp_path):
    out = StageFolder(tmp_path, "stage", "fingerprint")
    out.path.mkdir()
    config = tiny_training.make_config("sft-ddp")
    inputs = {"corpus": Path(world) / "nowhere", "policy": Path(world) / "policy"}
    with pytest.raises(WorkersFailed, match=r"rank \d: BadDataset: .*nowhere"):
        run_stage(config, inputs, out)
    assert len(list((out.path / ".workers").glob("group-*"))) == 1


def test_more_gpus_than_there_are_is_an_error_not_a_wait(world, tmp_path):
    out = StageFolder(tmp_path, "stage", "fingerprint")
    config = tiny_training.make_config("sft", batch_size=999, hardware={"workers": 999, "device": "gpu"})
    with pytest.raises(
        ClusterTooSmall, match="999 workers with 1 CPUs each and a GPU; the Ray cluster at this"
    ):
        run_stage(config, {}, out)

"""Resources of stages: threads and GPUs of workers, and memory that a stage gives back."""

import sys
from types import SimpleNamespace

import pytest
import ray
import torch

from align.execution import workers
from align.recipe.config.corpus import CorpusConfig
from align.recipe.config.training import Hardware
from align.run_folder.artifacts import StageFolder


@pytest.mark.alone
def test_workers_have_as_many_threads_as_cpus():
    """Ray sets one, which would make an offloaded optimizer single-threaded."""

    @ray.remote(num_cpus=3)
    def threads():
        import os

        return os.environ["OMP_NUM_THREADS"]

    with workers._cluster(Hardware(workers=1, cpus_per_worker=3)):
        assert ray.get(threads.remote()) == "3"


def grow(monkeypatch, *states):
    """A cluster that has these resources, each for one look."""
    resources = iter(states)
    monkeypatch.setattr(ray, "cluster_resources", lambda: next(resources))
    monkeypatch.setattr(workers, "_LOOK_EVERY_S", 0)


def test_a_cluster_that_gets_gpus_is_waited_for(monkeypatch):
    hardware = Hardware(workers=2, address="auto")
    grow(monkeypatch, {"CPU": 8, "GPU": 1}, {"CPU": 8, "GPU": 1}, {"CPU": 16, "GPU": 2})
    workers._wait_for_room(hardware)
    with pytest.raises(StopIteration):
        ray.cluster_resources()  # it looked until there were two
    grow(monkeypatch, {"CPU": 8})
    workers._wait_for_room(hardware)  # one without GPUs is a cluster of CPUs


def test_a_cluster_that_stays_too_small_is_an_error(monkeypatch):
    clock = iter(range(0, 100, 3))
    monkeypatch.setattr(workers.time, "monotonic", lambda: next(clock))
    grow(monkeypatch, *[{"CPU": 8, "GPU": 1}] * 9)
    with pytest.raises(workers.ClusterTooSmall, match="2 workers with 1 CPUs each and a GPU; .* 1 GPUs"):
        workers._wait_for_room(Hardware(workers=2, address="auto", timeout_s=5))


def test_a_stage_in_this_process_gives_its_gpu_memory_back(monkeypatch, tmp_path):
    calls = []
    stage = SimpleNamespace(run=lambda *_: calls.append("run") or {})
    monkeypatch.setitem(sys.modules, "align.stages.corpus", stage)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty_cache"))
    config = CorpusConfig(stage="corpus", corpus="folder", dir="recordings")
    workers.run_stage(config, {}, StageFolder(tmp_path, "0_corpus", "f"))
    assert calls == ["run", "empty_cache"]

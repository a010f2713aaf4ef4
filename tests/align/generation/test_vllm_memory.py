"""How a server shares a GPU's memory with a training. There is no GPU here: its figures are made up."""

from types import SimpleNamespace

import pytest
import torch

from align.generation.vllm import server

GPU_BYTES = 80_000_000_000


@pytest.fixture
def gpu(monkeypatch):
    """The second of the two GPUs, of 80 GB, that this process may see."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    found = SimpleNamespace(total_memory=GPU_BYTES)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")


def test_a_server_takes_what_the_training_leaves_of_its_gpu(gpu):
    assert server.training_problem(48) is None
    assert server._memory_flags(48) == ["--gpu-memory-utilization", "0.350"]  # 1 - 48 / 80 - .05
    assert server._own_gpu() == {"CUDA_VISIBLE_DEVICES": "5"}
    assert server._memory_flags(None) == []  # no training: vLLM's own default


def test_what_a_training_may_use_must_be_known_and_leave_enough(gpu):
    assert "hardware: {memory_gb: ...}" in server.training_problem(None)
    assert "leaves vLLM 5% of the GPU's 80 GB" in server.training_problem(72)


def test_on_a_cpu_nothing_is_shared():
    assert server.training_problem(None) is None
    assert server._memory_flags(60) == []

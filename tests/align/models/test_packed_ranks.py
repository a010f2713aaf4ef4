"""The packed backbone over two processes of which one never has audio: DDP, ZeRO-2, ZeRO-3."""

import json
from pathlib import Path

import pytest
import torch

from tests.align.ragged_batch import small_model
from tests.compiler import need_compiler

ROOT = Path(__file__).parents[3]


def losses(programs, folder, stage, processes):
    model = small_model()
    model.save_pretrained(folder / "reference")
    with torch.no_grad():
        model.lm_head.weight.mul_(1.1)
    model.save_pretrained(folder / "policy")
    programs.run_ranks(processes, str(ROOT / "tests/align/models/packed_ranks.py"), stage, str(folder))
    return json.loads((folder / "losses.json").read_text())


@pytest.fixture(scope="module")
def alone(programs, tmp_path_factory):
    """The same four batches of two pairs in one process."""
    return losses(programs, tmp_path_factory.mktemp("alone") / "run", "ddp", 1)


@pytest.mark.parametrize("stage", ["ddp", pytest.param("2", marks=pytest.mark.slow), "3"])
def test_two_processes_learn_what_one_does(programs, tmp_path, alone, stage):
    if stage != "ddp":
        need_compiler()
    found = losses(programs, tmp_path / "run", stage, 2)
    assert found == pytest.approx(alone, abs=1e-4)
    assert abs(alone[0] - alone[-1]) > 1e-3

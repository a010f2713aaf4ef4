"""The packed backbone over two processes of which one never has audio: DDP, ZeRO-2, ZeRO-3."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.align.ragged_batch import small_model
from tests.compiler import need_compiler

pytestmark = pytest.mark.alone
ROOT = Path(__file__).parents[3]


def losses(folder, stage, processes):
    model = small_model()
    model.save_pretrained(folder / "reference")
    with torch.no_grad():
        model.lm_head.weight.mul_(1.1)
    model.save_pretrained(folder / "policy")
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    command += ["--master-port=0", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    command += [str(ROOT / "tests/align/models/packed_ranks.py"), stage, str(folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "losses.json").read_text())


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same four batches of two pairs in one process."""
    return losses(tmp_path_factory.mktemp("alone") / "run", "ddp", 1)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["ddp", "2", "3"])
def test_two_processes_learn_what_one_does(tmp_path, alone, stage):
    if stage != "ddp":
        need_compiler()
    found = losses(tmp_path / "run", stage, 2)
    assert found == pytest.approx(alone, abs=1e-4)
    assert abs(alone[0] - alone[-1]) > 1e-3

"""Arguments of each strategy, and that DeepSpeed sums the gradients of micro-batches in float32."""

import json
import os
import socket
import subprocess
import sys

import pytest

from align.training.strategies import deepspeed_config
from tests.compiler import need_compiler

ACCUMULATE = """
import json, os, sys
import torch
from torch import nn
from align.training import preparation, strategies

os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": sys.argv[1]}
torch.distributed.init_process_group("gloo")
preparation.prepare_process(sys.argv[2])
import deepspeed
from deepspeed.utils import safe_get_full_grad

steps = 64
torch.manual_seed(0)
model = nn.Linear(8, 8, bias=False).bfloat16()
twin = nn.Linear(8, 8, bias=False).bfloat16()
twin.load_state_dict(model.state_dict())
config = strategies.deepspeed_config(sys.argv[2], "none") | {
    "bf16": {"enabled": True},
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": steps,
    "train_batch_size": steps,
    "gradient_clipping": 0.0,
}
if sys.argv[3] == "default":
    del config["data_types"]
optimizer = torch.optim.AdamW(model.parameters())
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
total = torch.zeros(8, 8)
for step in range(steps):
    batch = torch.randn(1, 8).bfloat16()
    loss = engine(batch).float().square().sum()
    engine.backward(loss)
    twin.zero_grad()
    (twin(batch).float().square().sum() / steps).backward()
    total += twin.weight.grad.float()
    if step < steps - 1:
        engine.step()
gradient = safe_get_full_grad(engine.module.weight).float()
print("RESULT", json.dumps({"error": ((gradient - total).norm() / total.norm()).item()}), flush=True)
os._exit(0)
"""


@pytest.mark.parametrize(("strategy", "stage"), [("zero2", 2), ("zero3", 3)])
def test_deepspeed_sums_gradients_in_float32_and_leaves_the_optimizer_to_the_trainer(strategy, stage):
    config = deepspeed_config(strategy, "optimizer")
    assert config["zero_optimization"]["stage"] == stage
    assert config["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}
    assert config["zero_force_ds_cpu_optimizer"] is False
    assert "optimizer" not in config


@pytest.mark.alone
@pytest.mark.timeout(900)
def test_gradients_of_micro_batches_in_bfloat16_are_summed_in_float32():
    """64 micro-batches: against float32 sums of the same bfloat16 gradients, and DeepSpeed's own default."""
    need_compiler()
    assert error_of("zero2", "ours") < 1e-3
    assert error_of("zero2", "default") > 3e-3


def error_of(strategy, config):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    done = subprocess.run(
        [sys.executable, "-c", ACCUMULATE, str(port), strategy, config],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=800,
    )
    line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
    assert line, done.stderr[-3000:]
    return json.loads(line.removeprefix("RESULT "))["error"]

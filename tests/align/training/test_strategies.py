"""Arguments of each strategy."""

import pytest

from align.training.strategies import deepspeed_config


@pytest.mark.parametrize(("strategy", "stage"), [("zero2", 2), ("zero3", 3)])
def test_deepspeed_sums_gradients_in_float32_and_leaves_the_optimizer_to_the_trainer(strategy, stage):
    config = deepspeed_config(strategy, "optimizer")
    assert config["zero_optimization"]["stage"] == stage
    assert config["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}
    assert config["zero_force_ds_cpu_optimizer"] is False
    assert "optimizer" not in config

"""How training is spread over processes: trainer arguments for DDP, DeepSpeed's ZeRO and FSDP2.

DeepSpeed differs from its defaults in what its stages leave open here: its checkpoints gather whole
weights, gradients of micro-batches are summed in float32, and the optimizer is the Trainer's own, so that
every strategy takes the same steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import distributed
from transformers.integrations.deepspeed import (
    HfDeepSpeedConfig,
    set_hf_deepspeed_config,
    unset_hf_deepspeed_config,
)

Strategy = Literal["ddp", "zero2", "zero3", "fsdp2"]
Offload = Literal["none", "optimizer", "all"]


class UnsupportedStrategy(RuntimeError):
    """The strategy cannot work on this hardware."""


def trainer_arguments(strategy: Strategy, offload: Offload) -> dict[str, Any]:
    """Arguments of TRL's config classes that spread training over this process and its peers, if any.

    Raises:
        UnsupportedStrategy: fsdp2 without a GPU.
    """
    on_gpu = torch.cuda.is_available()
    if not distributed.is_initialized():
        return {}
    common = {"use_cpu": not on_gpu, "ddp_backend": "nccl" if on_gpu else "gloo"}
    if strategy in ("zero2", "zero3"):
        return {**common, "deepspeed": deepspeed_config(strategy, offload)}
    if strategy == "fsdp2":
        if not on_gpu:
            raise UnsupportedStrategy(
                "fsdp2 needs GPUs: on CPUs accelerate runs plain DDP without saying so; "
                "use ddp, zero2 or zero3"
            )
        layers = ["Qwen2AudioEncoderLayer", "Qwen2DecoderLayer"]
        return {
            **common,
            "fsdp": True,
            "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": layers},
        }
    # Every rank uses every weight that learns: see `processes`
    return {**common, "ddp_find_unused_parameters": False}


def end() -> None:
    """From now on models are loaded whole, whatever a trainer's arguments have said."""
    unset_hf_deepspeed_config()


@contextmanager
def whole_models(config: HfDeepSpeedConfig | None) -> Iterator[None]:
    """Within this block models are built whole although training goes on under DeepSpeed's `config`."""
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            set_hf_deepspeed_config(config)


def deepspeed_config(strategy: Strategy, offload: Offload) -> dict[str, Any]:
    """DeepSpeed's configuration; what is `auto` follows from the Trainer's arguments."""
    stage: dict[str, Any] = {"stage": 2 if strategy == "zero2" else 3}
    if strategy == "zero3":
        stage["stage3_gather_16bit_weights_on_model_save"] = True
    if offload != "none":
        stage["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if offload == "all":
        stage["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "zero_optimization": stage,
        "bf16": {"enabled": "auto"},
        "data_types": {"grad_accum_dtype": "fp32"},  # else micro-batches are summed in bfloat16
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }

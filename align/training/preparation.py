"""A process, then a model, made ready to train: every change to either, in a written order."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import Qwen2AudioForConditionalGeneration

from align.models.qwen2_audio.packed import pack
from align.training.library_fixes import compile_once, leave_frozen_weights_out
from align.training.memory import MicroBatchPlan
from align.training.processes import encode_silence_without_audio
from align.training.strategies import Strategy, UnsupportedStrategy
from align.training.tuning import PARTS, Part, Tuning


def prepare_process(strategy: Strategy) -> None:
    """Prepare this process before any model is built; its peers are connected already.

    Models are loaded whole, under ZeRO-3 too, and divided when training begins: until then stages look at
    them, resize and pack them. That takes host memory for one copy per worker, 17 GB for Qwen2-Audio.

    Raises:
        UnsupportedStrategy: DeepSpeed has no compiler for what it needs on a CPU.
    """
    if strategy not in ("zero2", "zero3"):
        return
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # where pip puts ninja
    if not torch.cuda.is_available() and not (shutil.which("g++") and shutil.which("ninja")):
        raise UnsupportedStrategy(
            f"{strategy} on a CPU compiles an op of DeepSpeed's on first use and needs g++ and ninja: "
            "`apt-get install g++ ninja-build`, or use ddp"
        )
    import deepspeed  # patches what it finds loaded: only where a strategy needs it

    leave_frozen_weights_out()
    compile_once()
    deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo")


def prepare_model(
    model: Qwen2AudioForConditionalGeneration,
    tuning: Tuning,
    plan: Callable[[], MicroBatchPlan | None] = lambda: None,
) -> MicroBatchPlan | None:
    """Change a loaded model for training, in place and in this order; returns the `plan`.

    1. Freeze what does not learn.
    2. Make the weights that learn float32, unless DeepSpeed keeps such masters itself.
    3. Mask gradients, where only some rows of the embeddings and the head learn.
    4. Pack: the inner backbone becomes `PackedQwen2AudioModel`; the stock one encodes silence without audio.
    5. Checkpoint the activations of the layers that `plan` names; it measures the model as it is now.

    Then the trainer's constructor lets PEFT wrap the linear layers of `Tuning.peft_config` and TRL put its
    fused head over the backbone, and at the first step accelerate adds autocast and DDP, DeepSpeed or FSDP.
    """
    freeze_all_but(model, tuning.train, tuning.new_modules)
    if tuning.lora is None and tuning.strategy in ("ddp", "fsdp2"):
        learn_in_full_precision(model)
    if tuning.train is not None and "new_tokens" in tuning.train:
        learn_rows(model, tuning.new_rows)
    if tuning.packed:
        pack(model, tuning.attention)
    else:
        encode_silence_without_audio(model)
    micro_batches = plan()
    if micro_batches is not None:
        micro_batches.checkpoint(model)
    return micro_batches


def freeze_all_but(
    model: Qwen2AudioForConditionalGeneration, train: Sequence[Part] | None, new_modules: Sequence[str] = ()
) -> None:
    """Let only the parts `train` and the `new_modules` learn; None is all parts.

    The audio tower's positions are sinusoids and never learn; `from_pretrained` silently un-freezes them.
    """
    for part in ("audio_tower", "projector", "language_model"):
        for name in PARTS[part]:
            if name != "lm_head" or hasattr(model, name):  # a reward model has none
                model.get_submodule(name).requires_grad_(train is None or part in train)
    for name in new_modules:
        model.get_submodule(name).requires_grad_(True)
    if train is not None and "new_tokens" in train:
        for name in PARTS["new_tokens"]:
            model.get_submodule(name).requires_grad_(True)
    model.model.audio_tower.embed_positions.requires_grad_(False)


def learn_rows(model: Qwen2AudioForConditionalGeneration, rows: Sequence[int]) -> None:
    """Let only these rows of the embeddings and the head learn.

    The gradient of the others is zero, and so are Adam's moments and its steps: they stay bit for bit, as
    long as weight decay leaves the tables alone (`Tuning.undecayed`). A hook on the weight comes
    before DDP and DeepSpeed see its gradient.
    """
    learned = torch.tensor(rows, dtype=torch.long)

    def of_rows(grad: torch.Tensor) -> torch.Tensor:
        index = learned.to(grad.device)
        return torch.zeros_like(grad).index_copy_(0, index, grad[index])

    for name in PARTS["new_tokens"]:
        model.get_submodule(name).weight.register_hook(of_rows)


def learn_in_full_precision(model: nn.Module) -> None:
    """Make the weights that learn float32, in place.

    Next to a bfloat16 weight an update of 1e-6 times its size is lost in rounding (8 bits of mantissa):
    training would go through all its motions and change nothing. DeepSpeed keeps such copies itself.
    """
    for weight in model.parameters():
        if weight.requires_grad and weight.dtype == torch.bfloat16:
            weight.data = weight.data.float()

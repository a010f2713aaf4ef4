"""How much useful work a step does, and which share of the device's peak that is, in the metrics."""

from __future__ import annotations

import time
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from align.models.packing import PackedBatch
from align.models.qwen2_audio.flops import Cost, cost_of, gemm_peak
from align.training.collate import labelled


class CountsWork(Trainer):
    """Mixin for a Trainer over packed batches; logs two numbers, of this device.

    `flops`: useful FLOPs (see `align.models.flops`) per optimizer step. `mfu`, on a GPU: them per second of
    wall time, over the rate of a large matrix product measured at the start.
    """

    _flops: float | Tensor = 0.0
    _since: tuple[int, float] | None = None

    @cached_property
    def _cost(self) -> Cost:
        inner: Any = self.accelerator.unwrap_model(self.model)
        return cost_of(inner.get_base_model() if hasattr(inner, "peft_config") else inner)

    @cached_property
    def _peak(self) -> float | None:
        dtype = torch.bfloat16 if self.args.bf16 else torch.float32
        return gemm_peak(self.args.device, dtype) if self.args.device.type == "cuda" else None

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """One forward and backward, counted."""
        packed = inputs.get("packed")
        if isinstance(packed, PackedBatch):
            self._since = self._since or (self.state.global_step, time.monotonic())
            # A tensor, so that a GPU is not waited for before the next log
            scored = labelled(inputs)[:, 1:].sum().double()
            self._flops = self._flops + self._cost.of(packed) + self._cost.scored * scored
        loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the work since the last log."""
        if "loss" in logs and self._since is not None and self.state.global_step > self._since[0]:
            steps, seconds = self.state.global_step - self._since[0], time.monotonic() - self._since[1]
            logs["flops"] = float(self._flops) / steps
            if self._peak is not None:
                logs["mfu"] = float(self._flops) / seconds / self._peak
            self._flops, self._since = 0.0, (self.state.global_step, time.monotonic())
        super().log(logs, start_time)

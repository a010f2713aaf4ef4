"""What of a policy learns, and over which processes: one value for all training stages."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2AudioForConditionalGeneration

from align.models.qwen2_audio import model as qwen2_audio
from align.models.qwen2_audio.packed import pack
from align.training import ranks, strategies
from align.training.freeze import PARTS, Part, freeze_all_but, learn_in_full_precision, learn_rows
from align.training.lora import LoRA, load_quantised
from align.training.silence import hear_silence
from align.training.strategies import Offload, Strategy


@dataclass(frozen=True)
class Tuning:
    """`train`: the parts that learn, all if None. With `lora` only its low-rank updates do.

    `packed` is how batches are computed and `attention` by which back end, see `qwen2_audio.packed`;
    `memory_gb` what one process may use, in 10^9 bytes, by default its GPU's.
    """

    train: tuple[Part, ...] | None = None
    lora: LoRA | None = None
    strategy: Strategy = "ddp"
    offload: Offload = "none"
    memory_gb: float | None = None
    packed: bool = False
    attention: str | None = None
    new_rows: tuple[int, ...] = ()
    """Of the embeddings and the head; they learn if `train` has `new_tokens`."""

    def load(self, path: Path | str) -> Qwen2AudioForConditionalGeneration:
        """A policy to train, in the precision it is trained in."""
        if self.lora is not None and self.lora.bits is not None:
            return load_quantised(path)
        return qwen2_audio.load_model(path)

    def prepare(self, model: Qwen2AudioForConditionalGeneration) -> None:
        """Freeze what is not to learn and ready the model for its peers, before a trainer gets it."""
        freeze_all_but(model, self.train)
        if self.lora is None and self.strategy in ("ddp", "fsdp2"):
            learn_in_full_precision(model)
        if self._rows_alone:
            learn_rows(model, self.new_rows)
        if self.packed:
            pack(model, self.attention)
        else:
            hear_silence(model)

    @property
    def _rows_alone(self) -> bool:
        return self.train is not None and "new_tokens" in self.train

    @property
    def undecayed(self) -> frozenset[str]:
        """Names of weights of which some rows learn and the others stay: no weight decay may touch them."""
        return frozenset(f"{name}.weight" for name in PARTS["new_tokens"] if self._rows_alone)

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the modules that learn; the empty name is the whole model."""
        return ("",) if self.train is None else tuple(name for part in self.train for name in PARTS[part])

    def arguments(self) -> dict[str, Any]:
        """Arguments of TRL's config classes.

        Raises:
            UnsupportedStrategy: see `strategies`; or several GPUs are visible to a lone process.
        """
        if ranks.world_size() == 1 and torch.cuda.device_count() > 1:
            raise strategies.UnsupportedStrategy(
                f"{torch.cuda.device_count()} GPUs are visible to one process, over which the Trainer would "
                "multiply the batch: give the stage hardware: {workers: ...}, or set CUDA_VISIBLE_DEVICES=0"
            )
        return strategies.trainer_arguments(self.strategy, self.offload)

    @property
    def peft_config(self) -> Any:
        """For TRL's trainers: what PEFT adds, if anything."""
        return None if self.lora is None else self.lora.config()

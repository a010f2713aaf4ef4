"""Low-rank updates of frozen weights (LoRA, arXiv:2106.09685), and how they become plain weights again."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from peft import LoraConfig, PeftModel, prepare_model_for_kbit_training
from transformers import BitsAndBytesConfig, Qwen2AudioForConditionalGeneration

from align.models.qwen2_audio import model as qwen2_audio


class CannotQuantise(RuntimeError):
    """4-bit weights were asked for where they cannot be."""


@dataclass(frozen=True)
class LoRA:
    """`target` is a regular expression over whole names of linear layers; `bits` 4 is QLoRA."""

    r: int
    alpha: int
    dropout: float
    target: str
    bits: Literal[4] | None = None

    def config(self) -> LoraConfig:
        """For PEFT."""
        return LoraConfig(
            r=self.r, lora_alpha=self.alpha, lora_dropout=self.dropout, target_modules=self.target
        )


def load_quantised(path: Path | str) -> Qwen2AudioForConditionalGeneration:
    """A policy with the language model's linear layers in 4-bit NF4 (arXiv:2305.14314), ready for LoRA.

    Raises:
        CannotQuantise: there is no CUDA, or no bitsandbytes.
    """
    if not torch.cuda.is_available():
        raise CannotQuantise("lora.bits: 4 needs a CUDA GPU, and there is none here; remove lora.bits")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise CannotQuantise(
            "lora.bits: 4 needs bitsandbytes: `pip install bitsandbytes`, or remove lora.bits"
        )
    quantised = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["audio_tower", "multi_modal_projector", "lm_head"],
    )
    model = Qwen2AudioForConditionalGeneration.from_pretrained(
        path,
        dtype=torch.bfloat16,
        use_safetensors=True,
        quantization_config=quantised,
        device_map={"": torch.cuda.current_device()},
    )
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def merged(base: Path | str, adapter: Path) -> Qwen2AudioForConditionalGeneration:
    """The base policy with an adapter's updates added to its weights: a plain model again."""
    return PeftModel.from_pretrained(qwen2_audio.load_model(base), adapter).merge_and_unload()

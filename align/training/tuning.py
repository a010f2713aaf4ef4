"""The parts of a policy that learn, by which updates, and over which processes."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, prepare_model_for_kbit_training
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel, Qwen2AudioForConditionalGeneration

from align.models.qwen2_audio import model as qwen2_audio
from align.training import processes, strategies
from align.training.strategies import Offload, Strategy

Part = Literal["audio_tower", "projector", "language_model", "new_tokens"]
PARTS: MappingProxyType[Part, tuple[str, ...]] = MappingProxyType(
    {
        "audio_tower": ("model.audio_tower",),
        "projector": ("model.multi_modal_projector",),
        "language_model": ("model.language_model", "lm_head"),
        "new_tokens": ("model.language_model.embed_tokens", "lm_head"),
    }
)
"""Part -> its modules; of those of the new tokens only some rows learn, see `preparation`."""


class CannotQuantise(RuntimeError):
    """4-bit weights are not possible here."""


@dataclass(frozen=True)
class LoRA:
    """`target` is a regular expression over whole names of linear layers; `bits` 4 is QLoRA."""

    r: int
    alpha: int
    dropout: float
    target: str
    bits: Literal[4] | None = None

    def config(self, new_modules: Sequence[str] = ()) -> LoraConfig:
        """For PEFT; `new_modules` learn as a whole."""
        return LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=self.target,
            modules_to_save=list(new_modules) or None,
        )


@dataclass(frozen=True)
class Tuning:
    """`train`: the parts that learn, all if None. With `lora` only its low-rank updates do.

    `packed` chooses the packed backbone and `attention` its back end, see `qwen2_audio.packed`;
    `memory_gb` is what one process may use, in 10^9 bytes, by default its GPU's, and `tower_outputs_gb` what
    the outputs of a frozen tower may take on disk.
    """

    train: tuple[Part, ...] | None = None
    lora: LoRA | None = None
    strategy: Strategy = "ddp"
    offload: Offload = "none"
    memory_gb: float | None = None
    tower_outputs_gb: float | None = None
    packed: bool = False
    attention: str | None = None
    new_rows: tuple[int, ...] = ()
    """Rows of the embeddings and the head; they learn if `train` has `new_tokens`."""
    new_modules: tuple[str, ...] = ()
    """Names of modules that come from no checkpoint, such as a reward model's head: they always learn."""

    def load(self, path: Path | str) -> Qwen2AudioForConditionalGeneration:
        """A policy to train, in the precision it is trained in."""
        if self.lora is not None and self.lora.bits is not None:
            return load_quantised(path)
        return qwen2_audio.load_model(path)

    @property
    def _rows_only(self) -> bool:
        return self.train is not None and "new_tokens" in self.train

    @property
    def undecayed(self) -> frozenset[str]:
        """Names of weights of which some rows learn and the others stay: no weight decay may touch them."""
        return frozenset(f"{name}.weight" for name in PARTS["new_tokens"] if self._rows_only)

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the modules that learn; the empty name is the whole model."""
        if self.train is None:
            return ("",)
        return (*(name for part in self.train for name in PARTS[part]), *self.new_modules)

    def arguments(self) -> dict[str, Any]:
        """Arguments of TRL's config classes.

        Raises:
            UnsupportedStrategy: see `strategies`; or several GPUs are visible to a lone process.
        """
        if processes.world_size() == 1 and torch.cuda.device_count() > 1:
            raise strategies.UnsupportedStrategy(
                f"{torch.cuda.device_count()} GPUs are visible to one process, over which the Trainer would "
                "multiply the batch: give the stage hardware: {workers: ...}, or set CUDA_VISIBLE_DEVICES=0"
            )
        return strategies.trainer_arguments(self.strategy, self.offload)

    def learns_in(self, model: nn.Module, part: Part) -> bool:
        """Whether anything learns in a part of a prepared model, which PEFT has not wrapped yet."""
        names = PARTS[part]
        if self.lora is None:
            return any(p.requires_grad for name in names for p in model.get_submodule(name).parameters())
        inside = [n for n, _ in model.named_modules() if n.startswith(tuple(f"{name}." for name in names))]
        return any(re.fullmatch(self.lora.target, name) for name in inside)

    @property
    def peft_config(self) -> Any:
        """For TRL's trainers: what PEFT adds, if anything."""
        return None if self.lora is None else self.lora.config(self.new_modules)


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


def merged(base: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    """The base with an adapter's updates added to its weights: a plain model again."""
    return PeftModel.from_pretrained(base, adapter).merge_and_unload()


def merged_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and weights that `model` would have without its low-rank updates, those added to the weights.

    The model stays as it is: merging in place and back would round the weights that are frozen.
    """
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    for name, weight in inner.state_dict().items():
        layer, marker, leaf = name.rpartition(".base_layer.")
        if marker and leaf == "weight":
            update = inner.get_submodule(layer).get_delta_weight("default")
            weight = (weight + update).to(weight.dtype)
        if ".lora_" not in name:
            yield f"{layer}.{leaf}" if marker else name, weight

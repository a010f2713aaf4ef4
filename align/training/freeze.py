"""What of Qwen2-Audio learns: a list of its parts. Everything else really stays as it was."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import Literal

import torch
from torch import nn
from transformers import Qwen2AudioForConditionalGeneration

Part = Literal["audio_tower", "projector", "language_model"]
PARTS: MappingProxyType[Part, tuple[str, ...]] = MappingProxyType(
    {
        "audio_tower": ("model.audio_tower",),
        "projector": ("model.multi_modal_projector",),
        "language_model": ("model.language_model", "lm_head"),
    }
)
"""Part -> its modules."""


def freeze_all_but(model: Qwen2AudioForConditionalGeneration, train: Sequence[Part] | None) -> None:
    """Let only the parts `train` learn; None is all of them.

    The audio tower's positions are sinusoids and never learn; `from_pretrained` silently un-freezes them.
    """
    for part, names in PARTS.items():
        for name in names:
            model.get_submodule(name).requires_grad_(train is None or part in train)
    model.model.audio_tower.embed_positions.requires_grad_(False)


def learn_in_full_precision(model: nn.Module) -> None:
    """Make the weights that learn float32, in place.

    Next to a bfloat16 weight an update of 1e-6 times its size is lost in rounding (8 bits of mantissa):
    training would go through all its motions and change nothing. DeepSpeed keeps such copies itself.
    """
    for weight in model.parameters():
        if weight.requires_grad and weight.dtype == torch.bfloat16:
            weight.data = weight.data.float()

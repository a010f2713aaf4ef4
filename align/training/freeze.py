"""What of Qwen2-Audio learns: a list of its parts. Everything else really stays as it was."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import Literal

import torch
from torch import nn
from transformers import Qwen2AudioForConditionalGeneration

Part = Literal["audio_tower", "projector", "language_model", "new_tokens"]
PARTS: MappingProxyType[Part, tuple[str, ...]] = MappingProxyType(
    {
        "audio_tower": ("model.audio_tower",),
        "projector": ("model.multi_modal_projector",),
        "language_model": ("model.language_model", "lm_head"),
        "new_tokens": ("model.language_model.embed_tokens", "lm_head"),
    }
)
"""Part -> its modules; of the new tokens' only some rows, see `learn_rows`."""


def freeze_all_but(model: Qwen2AudioForConditionalGeneration, train: Sequence[Part] | None) -> None:
    """Let only the parts `train` learn; None is all of them.

    The audio tower's positions are sinusoids and never learn; `from_pretrained` silently un-freezes them.
    """
    for part in ("audio_tower", "projector", "language_model"):
        for name in PARTS[part]:
            model.get_submodule(name).requires_grad_(train is None or part in train)
    if train is not None and "new_tokens" in train:
        for name in PARTS["new_tokens"]:
            model.get_submodule(name).requires_grad_(True)
    model.model.audio_tower.embed_positions.requires_grad_(False)


def learn_rows(model: Qwen2AudioForConditionalGeneration, rows: Sequence[int]) -> None:
    """Of the embeddings and the head let only these rows learn.

    The gradient of the others is zero, and so are Adam's moments and its steps: they stay bit for bit, as
    long as weight decay leaves the tables alone (`AtomicCheckpoints.undecayed`). A hook on the weight comes
    before DDP and DeepSpeed see its gradient.
    """
    kept = torch.tensor(rows, dtype=torch.long)

    def of_rows(grad: torch.Tensor) -> torch.Tensor:
        index = kept.to(grad.device)
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

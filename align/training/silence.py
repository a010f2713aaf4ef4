"""A rank without audio in its batch listens to silence, so that it takes part in what the others do.

Gradients (DDP, ZeRO) and weights (ZeRO-3) are exchanged module by module in the order in which they are
used. A rank that skips the audio tower because its rows are all text leaves the others waiting for ever,
or, worse, adds its next gradients to those of other weights. One silent clip, times zero, costs it one
pass through the tower.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen2AudioForConditionalGeneration


class _Silence:
    """Two hooks: the backbone's input tells whether there is audio, the embeddings are added nothing."""

    def __init__(self, model: Qwen2AudioForConditionalGeneration) -> None:
        self.backbone = model.model
        self.is_missing = False

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.is_missing = kwargs.get("input_features") is None

    def after_embedding(self, module: nn.Module, args: tuple[Any, ...], embeddings: Tensor) -> Tensor:
        """Where a clip would have been encoded: between the embeddings and the language model."""
        if not self.is_missing:
            return embeddings
        self.is_missing = False
        tower = self.backbone.audio_tower
        frames = 2 * tower.config.max_source_positions  # the second convolution halves them
        silence = torch.zeros(1, tower.config.num_mel_bins, frames, device=embeddings.device)
        heard = self.backbone.multi_modal_projector(tower(silence).last_hidden_state)
        return embeddings + 0 * heard.sum().to(embeddings.dtype)


def hear_silence(model: Qwen2AudioForConditionalGeneration) -> None:
    """Make forward passes without `input_features` use the audio tower and projector all the same.

    Works with any backbone that embeds its tokens before it encodes its clips, as the stock one does.
    """
    silence = _Silence(model)
    model.model.register_forward_pre_hook(silence.before, with_kwargs=True)
    model.get_input_embeddings().register_forward_hook(silence.after_embedding)

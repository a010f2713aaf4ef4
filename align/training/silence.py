"""A rank without audio in its batch listens to silence, so that it takes part in what the others do.

Gradients (DDP, ZeRO) and weights (ZeRO-3) are exchanged module by module in the order in which they are
used. A rank that skips the audio tower because its rows are all text leaves the others waiting for ever,
or, worse, adds its next gradients to those of other weights. One silent clip, times zero, costs it one
pass through the tower.

A lone process listens too. Without it, a batch of text alone would leave the tower without gradients, and
the optimizer would skip it; with it, they are zeros, and its momentum carries on, as over several ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Qwen2AudioForConditionalGeneration


class _Silence:
    """Two hooks: the backbone's input tells whether there is audio, the language model's is added nothing."""

    def __init__(self, model: Qwen2AudioForConditionalGeneration) -> None:
        self.backbone = model.model
        self.is_missing = False

    def before_backbone(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.is_missing = kwargs.get("input_features") is None

    def before_language_model(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Where clips are encoded: after the embedding, whose weights ZeRO-3 then fetches back last."""
        if not self.is_missing:
            return None
        embeddings = kwargs["inputs_embeds"]
        tower = self.backbone.audio_tower
        frames = 2 * tower.config.max_source_positions  # the second convolution halves them
        silence = torch.zeros(1, tower.config.num_mel_bins, frames, device=embeddings.device)
        heard = self.backbone.multi_modal_projector(tower(silence).last_hidden_state)
        return args, {**kwargs, "inputs_embeds": embeddings + 0 * heard.sum().to(embeddings.dtype)}


def hear_silence(model: Qwen2AudioForConditionalGeneration) -> None:
    """Make forward passes without `input_features` use the audio tower and projector all the same.

    Works with any backbone that embeds its tokens, then encodes its clips, then calls its language model
    with `inputs_embeds`, as the stock one does.
    """
    silence = _Silence(model)
    model.model.register_forward_pre_hook(silence.before_backbone, with_kwargs=True)
    model.model.language_model.register_forward_pre_hook(silence.before_language_model, with_kwargs=True)

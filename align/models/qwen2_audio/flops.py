"""Useful work of a training step: FLOPs of the model on each distinct token and clip, nothing twice.

Recomputed activations, padding, shared prefixes computed again: all of that is work, none of it useful.
A product with a weight costs 2 FLOPs per weight and row forward, the same again backward where its input
needs a gradient, and once more where the weight learns. Attention costs 4 per head dimension and pair of
query and key forward, twice that backward. Norms, activations and the optimizer are left out.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.benchmark import Timer
from transformers import Qwen2AudioForConditionalGeneration

from align.models.packing import PackedBatch
from align.models.qwen2_audio.reward_model import is_reward_model


class Cost(NamedTuple):
    """FLOPs forward and backward per unit of a packed batch.

    A clip of which the tower's outputs are on disk (`KeptClips`) costs nothing in the tower.
    """

    token: float
    """A packed token through the language model."""
    pair: float
    """A pair of tokens of which one sees the other, over all layers."""
    frame: float
    """An encoder frame (20 ms) through convolutions and tower."""
    frame_pair: float
    """A pair of frames of one clip."""
    vector: float
    """An audio vector through the projector."""
    scored: float
    """An answer position through the head; a reward model's gives one number per answer, which is nothing."""

    def of(self, batch: PackedBatch) -> float:
        """FLOPs of a batch but for its head."""
        total = self.token * len(batch.tokens) + self.pair * batch.sees.n_pairs()
        if batch.clips is not None:
            total += self.frame * batch.clips.n_encoded + self.frame_pair * batch.clips.n_pairs
            total += self.vector * batch.clips.n_vectors
        return total


def cost_of(model: Qwen2AudioForConditionalGeneration) -> Cost:
    """FLOPs of a training step of `model`, with what of it learns; LoRA's own products included."""
    audio, text = model.config.audio_config, model.config.text_config
    tower, projector, language = (
        model.model.audio_tower,
        model.model.multi_modal_projector,
        model.model.language_model,
    )
    tower_learns, projector_learns = _learns(tower), _learns(projector)
    before_language = tower_learns or projector_learns or _learns(model.get_input_embeddings())
    through_language = before_language or _learns(language)
    text_width = language.layers[0].self_attn.head_dim * text.num_attention_heads
    return Cost(
        token=_products(language.layers, through_language),
        pair=4 * text_width * text.num_hidden_layers * (3 if through_language else 1),
        frame=_products(tower.layers, tower_learns) + _convolutions(tower, tower_learns),
        frame_pair=4 * audio.d_model * audio.encoder_layers * (3 if tower_learns else 1),
        vector=_products([projector], tower_learns),
        scored=0.0 if is_reward_model(model) else _products([model.lm_head], through_language),
    )


def gemm_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product on this GPU, measured: what a step can be compared with."""
    rows, inner, columns = 8192, 4096, 11008
    a = torch.randn(rows, inner, device=device, dtype=dtype)
    b = torch.randn(inner, columns, device=device, dtype=dtype)
    timer = Timer("torch.mm(a, b)", globals={"torch": torch, "a": a, "b": b})
    return 2 * rows * inner * columns / timer.timeit(20).median


def _learns(part: nn.Module) -> bool:
    return any(weight.requires_grad for weight in part.parameters())


def _products(parts: Iterable[nn.Module], input_gradient: bool) -> float:
    linears = [m for part in parts for m in part.modules() if isinstance(m, nn.Linear)]
    return sum(
        2 * linear.in_features * linear.out_features * (1 + input_gradient + linear.weight.requires_grad)
        for linear in linears
    )


def _convolutions(tower: Any, tower_learns: bool) -> float:
    """Per encoder frame; two mel frames go through the first, which needs no gradient of its input."""
    bins, width = tower.conv1.in_channels, tower.conv1.out_channels
    first = 2 * 2 * 3 * bins * width * (1 + tower_learns)
    second = 2 * 3 * width * width * (1 + 2 * tower_learns)
    return float(first + second)

"""Greedy or drawn completions of text prompts by any causal language model that transformers loads."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from align.generation.decoding import decode
from align.generation.engine import Decoding


@torch.no_grad()
def complete_prompts(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    stops: Sequence[int],
    draws: np.ndarray | None = None,
) -> list[tuple[list[int], list[float]]]:
    """Tokens and their log-probabilities, `decoding.completions` rows a prompt, as `decode` gives them.

    Prompts are padded on the left to the longest and go through the model's own forward pass once.
    """
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), stops[0], device=model.device)
    mask = torch.zeros(ids.shape, dtype=torch.bool, device=model.device)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = True
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters

    def forward(ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:
        placed: dict[str, Any] = {"position_ids": positions} if takes_positions else {}
        outputs = model(
            input_ids=ids, attention_mask=mask.long(), past_key_values=cache, use_cache=True, **placed
        )
        logits: Tensor = outputs.logits[:, -1]
        return logits

    cache = DynamicCache(config=model.config)
    logits = forward(ids, mask, (mask.cumsum(-1) - 1).clamp(min=0), cache)
    k = decoding.completions
    cache.batch_repeat_interleave(k)
    repeated = logits.repeat_interleave(k, 0), cache, mask.repeat_interleave(k, 0)
    return decode(*repeated, forward, decoding, draws, stops)

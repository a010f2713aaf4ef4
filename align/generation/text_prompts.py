"""Greedy completions of text prompts by any causal language model that transformers loads."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from align.generation.decoding import decode
from align.generation.engine import Decoding


@torch.no_grad()
def complete_prompts(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int, stops: Sequence[int]
) -> list[list[int]]:
    """Tokens of each prompt's completion, up to and with its stop token.

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
    decoded = decode(logits, cache, mask, forward, Decoding(max_new_tokens), None, stops)
    return [tokens for tokens, _ in decoded]

"""Token by token from a filled cache: what `Decoding` says, and nothing of a checkpoint's generation config.

Which token is drawn depends on the row's own random numbers and distribution: completions that are decoded
beside it change neither. Only rounding differs between batches of another shape, by about one part in 10^7
in float32: a greedy tie, or a draw that falls within it of a boundary, may then go the other way.
Shapes: R rows (completions), T keys in the cache, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from align.generation.engine import Decoding, request_seed

Step = Callable[[Tensor, Tensor, Tensor, DynamicCache], Tensor]
"""Tokens (R, 1), which keys count (R, T + 1), positions (R, 1) and the cache -> next logits (R, V)."""
_ROWS = 64
"""Rows whose cumulative probabilities exist at a time, in float64."""
_RESERVED = 256
"""Tokens that a cache gets room for at a time."""


class NextTokens(NamedTuple):
    """The next token of each row that goes on, and its log p before temperature and top-p; all (R,)."""

    rows: Tensor
    tokens: Tensor
    logps: Tensor


def decode(
    logits: Tensor,
    cache: DynamicCache,
    mask: Tensor,
    step: Step,
    decoding: Decoding,
    draws: np.ndarray | None,
    stops: Sequence[int],
) -> list[tuple[list[int], list[float]]]:
    """Tokens of each row up to and with its stop token, and log p of each before temperature and top-p.

    Args:
        logits: (R, V) after the prompts.
        cache: holds the prompts' keys and values; rows that are done leave it.
        mask: (R, T) booleans, False at padding on the left.
        step: the language model and its head.
        decoding: how many tokens and how they are drawn.
        draws: `uniforms` (R, max_new_tokens); None where decoding is greedy.
        stops: tokens that end a completion.
    """
    n, device = len(logits), logits.device
    tokens = torch.full((n, decoding.max_new_tokens), -1, device=device)
    logps = torch.zeros(n, decoding.max_new_tokens, device=device)
    for t, drawn in enumerate(draw_tokens(logits, cache, mask, step, decoding, draws, stops)):
        tokens[drawn.rows, t] = drawn.tokens
        logps[drawn.rows, t] = drawn.logps
    lengths = (tokens >= 0).sum(-1).tolist()
    return [
        (ids[:length], scores[:length])
        for ids, scores, length in zip(tokens.tolist(), logps.tolist(), lengths, strict=True)
    ]


def draw_tokens(
    logits: Tensor,
    cache: DynamicCache,
    mask: Tensor,
    step: Step,
    decoding: Decoding,
    draws: np.ndarray | None,
    stops: Sequence[int],
) -> Generator[NextTokens, Collection[int] | None, None]:
    """One token of each row at a time; a row leaves with its stop token, or when its number is sent back.

    Args are those of `decode`.
    """
    device = logits.device
    _reserve(cache, min(decoding.max_new_tokens, _RESERVED))
    rows, positions = torch.arange(len(logits), device=device), mask.sum(-1, keepdim=True)
    ends = torch.tensor(list(stops), device=device)
    left = torch.from_numpy(draws).to(device) if draws is not None else None
    suppressed = torch.tensor(decoding.suppress, dtype=torch.long, device=device)
    for t in range(decoding.max_new_tokens):
        allowed = logits.index_fill(-1, suppressed, -torch.inf) if decoding.suppress else logits
        chosen = greedy(allowed) if left is None else draw(allowed, decoding, left[rows, t])
        logps = logits.float().log_softmax(-1).gather(-1, chosen[:, None])[:, 0]
        leaving = yield NextTokens(rows, chosen, logps)
        goes_on = ~torch.isin(chosen, ends)
        if leaving:
            goes_on &= ~torch.isin(rows, torch.tensor(list(leaving), device=device))
        if t + 1 == decoding.max_new_tokens or not goes_on.any():
            break
        if not goes_on.all():
            kept = goes_on.nonzero()[:, 0]
            cache.batch_select_indices(kept)
            rows, chosen, positions, mask = rows[kept], chosen[kept], positions[kept], mask[kept]
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        logits = step(chosen[:, None], mask, positions, cache)
        positions = positions + 1


class _ReservedLayer(DynamicLayer):
    """A layer of a cache with room for the tokens to come, so that adding one rarely copies the others.

    Room for `more` tokens is made whenever there is none.
    """

    def __init__(self, layer: DynamicLayer, more: int) -> None:
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        length, self._more = layer.get_seq_length(), more
        self._buffers = [F.pad(states, (0, 0, 0, more)) for states in (layer.keys, layer.values)]
        self._show(length)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Write keys and values (R, H, n, D) behind the others; returns all of them."""
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if end > self._buffers[0].shape[-2]:
            self._buffers = [F.pad(buffer, (0, 0, 0, self._more)) for buffer in self._buffers]
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = states
        self._show(end)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        length = self.get_seq_length()
        self._buffers = [buffer[indices] for buffer in self._buffers]
        self._show(length)

    def _show(self, length: int) -> None:
        self.keys, self.values = (buffer[:, :, :length] for buffer in self._buffers)


def _reserve(cache: DynamicCache, more: int) -> None:
    """Give every layer that attends to everything room for so many more tokens."""
    cache.layers = [
        _ReservedLayer(layer, more) if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]


def greedy(logits: Tensor) -> Tensor:
    """The likeliest token (R,) of logits (R, V)."""
    return logits.argmax(-1)


def draw(logits: Tensor, decoding: Decoding, uniform: Tensor) -> Tensor:
    """The token (R,) at which the cumulative probability passes each row's number (R,) in [0, 1)."""
    chosen = []
    for part, numbers in zip(logits.split(_ROWS), uniform.split(_ROWS), strict=True):
        probs = (part.float() / decoding.temperature).softmax(-1)
        if decoding.top_p < 1:
            probs = nucleus(probs, decoding.top_p)
        cumulative = probs.double().cumsum(-1)
        target = numbers[:, None] * cumulative[:, -1:]
        chosen.append(torch.searchsorted(cumulative, target, right=True)[:, 0])
    return torch.cat(chosen).clamp(max=logits.shape[-1] - 1)


def nucleus(probs: Tensor, top_p: float) -> Tensor:
    """Probabilities (R, V), 0 but for the likeliest tokens that together have `top_p`; unnormalised."""
    ordered, order = probs.sort(-1, descending=True)
    ordered[ordered.cumsum(-1) - ordered >= top_p] = 0
    return torch.zeros_like(probs).scatter_(-1, order, ordered)


def uniforms(decoding: Decoding, seed: int, numbers: Sequence[int]) -> np.ndarray | None:
    """Random numbers in [0, 1) for each completion of each request: (R, max_new_tokens); None if greedy.

    A completion's are the same however many tokens or other completions are asked for.
    """
    if decoding.temperature == 0:
        return None
    keys = [request_seed(seed, number, i) for number in numbers for i in range(decoding.completions)]
    return np.stack(
        [np.random.Generator(np.random.Philox(key=key)).random(decoding.max_new_tokens) for key in keys]
    )


def stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end a completion: those of the generation config, else the tokenizer's."""
    ends: Any = model.generation_config.eos_token_id
    if ends is None:
        ends = tokenizer.eos_token_id
    return list(ends) if isinstance(ends, (list, tuple)) else [ends]

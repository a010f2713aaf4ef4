"""Log-probabilities and divergences of completions that are there already, computed without padding.

Batches come from a collator: packed ones where the model has the packed backbone, else padded rows. Only
positions that predict a completion's token reach the head, and its logits exist for a few of them at a time,
never as (B, T, V). Shapes: B rows, T tokens of the longest, S scored positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from peft import PeftModel
from torch import Tensor, nn

from align.models.answer_head import is_completion

Row = Mapping[str, Any]
Collate = Callable[[Sequence[Any]], dict[str, Any]]
"""Rows to a batch: input_ids, attention_mask (B, T), labels or completion_mask (B, T), clips, `packed`."""
MODEL_INPUTS = ("input_ids", "attention_mask", "input_features", "feature_attention_mask", "packed")
"""Keys of a batch that a backbone reads; the rest is for losses and logs."""
_ROWS = 64
"""Rows that are collated together at most, before `max_tokens` divides them."""


@torch.no_grad()
def completion_logps(model: nn.Module, batch: Mapping[str, Any], *, positions: int = 1024) -> Tensor:
    """Log p (B, T - 1) in nats of each row's next token where the batch has a label there; 0 elsewhere.

    Sums over the last dimension are the log-probabilities of whole completions.

    Args:
        model: Qwen2-Audio, bare or with an adapter; in eval mode if dropout must not be drawn.
        batch: of a collator, on any device, with `labels` or `completion_mask` (B, T).
        positions: whose logits exist at a time: (positions, V) in float32.
    """
    states, targets, scored = _states(model, batch)
    head = _inner(model).get_output_embeddings()
    logps = [
        -F.cross_entropy(head(part).float(), target, reduction="none")
        for part, target in zip(states.split(positions), targets.split(positions), strict=True)
    ]
    return torch.zeros(scored.shape, device=states.device).masked_scatter_(scored, torch.cat(logps))


@torch.no_grad()
def kl_per_completion(
    policy: nn.Module,
    reference: nn.Module,
    collate: Collate,
    rows: Sequence[Any],
    *,
    max_tokens: int = 16_384,
    positions: int = 512,
) -> Tensor:
    """KL(policy || reference) over the whole vocabulary, summed over each row's completion tokens: (B,).

    Both models must read the collator's batches: packed ones only if both have the packed backbone.

    Args:
        policy: what moved; `rows` hold its own completions.
        reference: what it moved from.
        collate: rows to a batch.
        rows: as the collator takes them.
        max_tokens: that go through the language model at a time, see `batches_within`.
        positions: whose logits of both models exist at a time.
    """
    sums = []
    for batch in batches_within(collate, rows, max_tokens):
        here, _, scored = _states(policy, batch)
        there, _, _ = _states(reference, batch)
        heads = [_inner(model).get_output_embeddings() for model in (policy, reference)]
        parts = []
        for states in zip(here.split(positions), there.split(positions), strict=True):
            p, q = (head(part).float().log_softmax(-1) for head, part in zip(heads, states, strict=True))
            parts.append((p.exp() * (p - q)).sum(-1))
        per_token = torch.zeros(scored.shape, device=here.device).masked_scatter_(scored, torch.cat(parts))
        sums.append(per_token.sum(-1))
    return torch.cat(sums)


def batches_within(collate: Collate, rows: Sequence[Any], max_tokens: int) -> Iterator[dict[str, Any]]:
    """Batches of neighbouring rows, in order, of at most `max_tokens` tokens each; a longer row comes alone.

    Counted are tokens that the language model computes: distinct ones where packed, else padded rows.
    """
    for start in range(0, len(rows), _ROWS):
        yield from _divided(collate, rows[start : start + _ROWS], max_tokens)


def n_tokens(batch: Mapping[str, Any]) -> int:
    """Tokens of a batch that the language model computes."""
    packed = batch.get("packed")
    return len(packed.tokens) if packed is not None else batch["input_ids"].numel()


def _divided(collate: Collate, rows: Sequence[Any], max_tokens: int) -> Iterator[dict[str, Any]]:
    batch = collate(rows)
    if n_tokens(batch) <= max_tokens or len(rows) == 1:
        yield batch
        return
    half = len(rows) // 2
    yield from _divided(collate, rows[:half], max_tokens)
    yield from _divided(collate, rows[half:], max_tokens)


def _states(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states (S, D) before completions' tokens, those tokens (S,), and their places (B, T - 1)."""
    inner = _inner(model)
    moved = send_to_device(dict(batch), next(inner.parameters()).device)
    scored = is_completion(moved)[:, 1:]
    inputs = {name: moved[name] for name in MODEL_INPUTS if name in moved}
    if inputs.get("packed") is not None:
        rows, columns = scored.nonzero(as_tuple=True)
        places = rows * moved["input_ids"].shape[1] + columns
        states = inner.model(**inputs, scored=places, use_cache=False).last_hidden_state[0]
    else:
        states = inner.model(**inputs, use_cache=False).last_hidden_state[:, :-1][scored]
    return states, moved["input_ids"][:, 1:][scored], scored


def _inner(model: nn.Module) -> Any:
    """The model itself, below an adapter's wrapper; adapters stay in its layers."""
    return model.get_base_model() if isinstance(model, PeftModel) else model

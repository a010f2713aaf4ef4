"""The packed path beside transformers' own, on the first batch of a run: same numbers, and how much faster.

The proof that packing changes nothing is in the tests; that it holds for this model, these data, this
device and its kernels is seen here, before the first step. Two forward passes of each kind, no gradients.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from align.kernels.choice import wait_for
from align.models.answer_head import answers_only
from align.training.collate import MODEL_INPUTS, PreferenceCollator, Row, SFTCollator, labelled
from align.training.device import listening
from align.training.feeding import FeedingCollator

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}
"""Mean difference of log-probs in nats that rounding explains; a wrong mask makes more than one nat."""


class Compared(NamedTuple):
    """`packed_s`, `padded_s`: seconds of a forward pass; `difference`: of log-probs, mean absolute, nats."""

    packed_s: float
    padded_s: float
    difference: float

    def __str__(self) -> str:
        ratio = self.padded_s / self.packed_s
        return (
            f"a forward pass takes {self.packed_s:.3g} s packed, {self.padded_s:.3g} s as padded rows "
            f"({ratio:.1f} x); log-probs differ by {self.difference:.1g}"
        )


class PackingIsWrong(ValueError):
    """The packed path gives other numbers than transformers' own; nothing was trained."""


def compare(
    model: nn.Module,
    collate: SFTCollator | PreferenceCollator | FeedingCollator,
    rows: Sequence[Row],
    precision: torch.dtype,
) -> Compared:
    """Log-probs of the answers in `rows`, computed both ways.

    Args:
        model: packed, with TRL's fused head, as a trainer has prepared it.
        collate: gives packed batches.
        rows: of one batch.
        precision: in which the model computes.

    Raises:
        PackingIsWrong: they differ by more than rounding does.
    """
    device = next(model.parameters()).device
    packed, packed_s = _timed(model, send_to_device(collate(rows), device))
    padded, padded_s = _timed(model, send_to_device(_padded(collate)(rows), device))
    difference = (packed - padded).abs().mean().item()
    if not difference <= _TOLERANCE[precision]:
        raise PackingIsWrong(
            f"packed and padded rows disagree on the first batch: log-probs differ by {difference:.3g} nats "
            f"on average, in {precision} on {device}. Set packed: false, or another back end (packed: split)"
        )
    return Compared(packed_s, padded_s, difference)


def _padded(collate: Any) -> Callable[..., dict[str, Any]]:
    """The collator that gives the stock model's batches of the same rows."""
    if isinstance(collate, FeedingCollator):
        return replace(collate, collate=replace(collate.collate, packed=False))
    stock: Callable[..., dict[str, Any]] = replace(collate, packed=False)
    return stock


@torch.no_grad()
def _timed(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, float]:
    """Log-probs of all answers' tokens (S,), without dropout, and the seconds of the second of two passes."""
    inputs = {name: value for name, value in batch.items() if name in MODEL_INPUTS}
    ids, answers = batch["input_ids"], labelled(batch)
    labels = ids.masked_fill(~answers, -100)
    with listening(model, ids.device):
        for _ in range(2):
            wait_for(ids.device)
            started = time.perf_counter()
            outputs = answers_only(model)(**inputs, labels=labels, use_cache=False, fused_lm_head=True)
            scores: Tensor = outputs.log_probs[answers[:, 1:]].float()
            wait_for(ids.device)
            seconds = time.perf_counter() - started
    return scores, seconds

"""How far a policy has moved from its reference, in nats."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


@torch.no_grad()
def kl_per_answer(policy: nn.Module, reference: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """KL(policy || reference) summed over each answer's tokens, over the whole vocabulary: (B,).

    `batch` is an SFT batch of the policy's own answers; positions with label -100 do not count.
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    here = policy(**inputs, use_cache=False).logits[:, :-1].float().log_softmax(-1)
    there = reference(**inputs, use_cache=False).logits[:, :-1].float().log_softmax(-1)
    per_token = (here.exp() * (here - there)).sum(-1)
    return (per_token * (batch["labels"][:, 1:] != -100)).sum(-1)

"""Where a process computes, before a trainer has settled it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def own_device() -> torch.device:
    """This process' GPU, of those of its machine the one that accelerate will take; else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


@contextmanager
def listening(model: nn.Module, device: torch.device) -> Iterator[None]:
    """A whole model on `device`, not training, for as long as the block runs."""
    before, was_training = next(model.parameters()).device, model.training
    model.eval()
    if before != device:
        model.to(device)
    try:
        yield
    finally:
        model.train(was_training)
        if before != device:
            model.to(before)

"""Activation checkpointing of chosen layers (arXiv:1604.06174).

Not by transformers' own switch, `activation_checkpointing`, for two reasons. It makes the outputs of all
embeddings need gradients, to which it counts the audio tower's first convolution: a frozen tower then keeps
its activations and is differentiated. And TRL switches it off and on again around every live reference
pass, for all layers.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def checkpoint_layers(layers: Iterable[nn.Module]) -> None:
    """Keep only the input of each of these layers; the backward pass computes them again."""
    for layer in layers:
        layer.forward = MethodType(_checkpointed, layer)  # a bound method: a copy of the model gets its own


def restore_layers(layers: Iterable[nn.Module]) -> None:
    """Undo `checkpoint_layers`."""
    for layer in layers:
        del layer.forward


def _checkpointed(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    forward = partial(type(layer).forward, layer)
    if not (layer.training and torch.is_grad_enabled()):
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)

"""Dataclasses whose tensors go to a device together, while the rest stays on the host."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

Self = TypeVar("Self", bound="Movable")


class Movable:
    """Base of a dataclass with tensors and other such dataclasses; data loaders and accelerate know `to`."""

    def to(self: Self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """A copy whose tensors are on `device`."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self: Self) -> Self:
        """A copy in page-locked memory, from which a GPU copies without waiting."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self: Self, move: Callable[[Tensor], Tensor]) -> Self:
        changed: dict[str, object] = {}
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            match getattr(self, field.name):
                case Tensor() as tensor:
                    changed[field.name] = move(tensor)
                case Movable() as inner:
                    changed[field.name] = inner._each(move)
        return dataclasses.replace(self, **changed)  # type: ignore[type-var]

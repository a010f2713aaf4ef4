"""Attention over a packed row of which every token sees certain ranges only.

Three ways to the same result behind one signature: `dense` (one product with an (L, L) mask; slow,
obvious, the oracle of the tests), `split` (one product per segment; any device) and `varlen` (one kernel
call for all segments; CUDA). Shapes: H heads, L packed tokens, D head size; keys may have fewer heads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from align.kernels.prefix_tree import Segment

Self = TypeVar("Self", bound="Movable")


class Movable:
    """Base of a dataclass whose tensors go to a device together, while the rest stays on the host.

    Its fields may be such dataclasses too; data loaders and accelerate know `to` and `pin_memory`.
    """

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


@dataclasses.dataclass(frozen=True)
class Ragged(Movable):
    """Which packed tokens see which: as segments on the host, and as what a varlen kernel reads.

    `key_index` (K,) lists the keys of all segments one after another; `query_bounds` and `key_bounds`
    (S + 1,) say where each of the S segments starts in queries and in keys.
    """

    segments: tuple[Segment, ...]
    causal: bool
    key_index: Tensor
    query_bounds: Tensor
    key_bounds: Tensor

    @classmethod
    def of(cls, segments: Sequence[Segment], *, causal: bool) -> Ragged:
        """On the CPU, from neighbouring segments. Not causal: all of a segment sees its keys."""
        ranges = [np.arange(*keys) for segment in segments for keys in segment.keys]
        return cls(
            tuple(segments),
            causal,
            torch.from_numpy(np.concatenate(ranges)),
            _bounds([segment.n_queries for segment in segments]),
            _bounds([segment.n_keys for segment in segments]),
        )

    def n_pairs(self) -> int:
        """Pairs of query and key that attention has to compute: what its FLOPs are proportional to."""
        triangles = sum(s.n_queries * (s.n_queries - 1) // 2 for s in self.segments) if self.causal else 0
        return sum(s.n_queries * s.n_keys for s in self.segments) - triangles

    def mask(self, length: int) -> Tensor:
        """Who sees whom as a matrix (L, L) of booleans."""
        sees = torch.zeros(length, length, dtype=torch.bool)
        for segment in self.segments:
            keys = torch.cat([torch.arange(*keys) for keys in segment.keys])
            sees[segment.start : segment.end, keys] = _lower_right(segment, self.causal)
        return sees

    @cached_property
    def segment_masks(self) -> list[Tensor | None]:
        """Per segment the mask (queries, keys) that `split` needs; None where a kernel knows it itself."""
        return [
            None
            if not self.causal or segment.n_queries in (1, segment.n_keys)
            else _lower_right(segment, True, self.key_index.device)
            for segment in self.segments
        ]

    @cached_property
    def visible_segments(self) -> list[list[int]]:
        """Per segment the numbers of the segments that its tokens see, itself last."""
        numbers = {segment.start: number for number, segment in enumerate(self.segments)}
        return [[numbers[start] for start, _ in segment.keys] for segment in self.segments]


def _bounds(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)


def _lower_right(segment: Segment, causal: bool, device: torch.device | None = None) -> Tensor:
    """The last query sees all keys, the one before it all but one, and so on."""
    everything = torch.ones(segment.n_queries, segment.n_keys, dtype=torch.bool, device=device)
    return everything.tril(segment.n_keys - segment.n_queries) if causal else everything


def dense(query: Tensor, key: Tensor, value: Tensor, sees: Ragged, scale: float | None) -> Tensor:
    """The twin that everything else is compared with. (1, H, L, D) in and out."""
    mask = sees.mask(query.shape[2]).to(query.device)
    return _product(query, key, value, scale, attn_mask=mask)


def split(query: Tensor, key: Tensor, value: Tensor, sees: Ragged, scale: float | None) -> Tensor:
    """One product per segment. (1, H, L, D) in and out.

    The row is cut into its segments once: the gradient of the cut is one concatenation, where that of a
    view per segment would be a row of zeros per segment.
    """
    lengths = [segment.n_queries for segment in sees.segments]
    queries, keys, values = (states.split(lengths, dim=2) for states in (query, key, value))
    outputs = []
    for own, visible, mask in zip(queries, sees.visible_segments, sees.segment_masks, strict=True):
        own_keys, own_values = (_join([states[number] for number in visible]) for states in (keys, values))
        whole = sees.causal and own.shape[2] == own_keys.shape[2]
        outputs.append(_product(own, own_keys, own_values, scale, attn_mask=mask, is_causal=whole))
    return torch.cat(outputs, dim=2)


def varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sees: Ragged,
    scale: float | None,
    kernel: Callable[..., Any] = varlen_attn,
) -> Tensor:
    """All segments in one call of torch's `varlen_attn`; the keys of shared prefixes are copied together.

    Where queries are fewer than keys its causal window is aligned to the last query, as a tree needs.
    """
    dtype = compute_dtype(query)  # under autocast RoPE leaves queries and keys in float32
    queries, keys, values = (states[0].transpose(0, 1).to(dtype) for states in (query, key, value))
    output: Tensor = kernel(
        queries.contiguous(),
        keys[sees.key_index],
        values[sees.key_index],
        sees.query_bounds,
        sees.key_bounds,
        max(segment.n_queries for segment in sees.segments),
        max(segment.n_keys for segment in sees.segments),
        scale=scale,
        window_size=(-1, 0) if sees.causal else (-1, -1),
        **({"enable_gqa": True} if query.shape[1] != key.shape[1] else {}),
    )
    return output.transpose(0, 1)[None]


BACKENDS: dict[str, Callable[..., Tensor]] = {
    "dense": dense,
    "split": split,
    "varlen": varlen,
}


def compute_dtype(states: Tensor) -> torch.dtype:
    """The type in which products of `states` are computed, under autocast or not."""
    device = states.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype


def _join(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=2)


def _product(query: Tensor, key: Tensor, value: Tensor, scale: float | None, **how: Any) -> Tensor:
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=grouped, **how)

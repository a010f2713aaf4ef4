"""Rows of token ids and their clips -> what the packed backbone needs to know of a batch, as integers.

Made in the collator, on the host and in its workers, so that a GPU never waits for it.
Shapes: N rows, T tokens of the longest, L packed tokens, A audio tokens among them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from align.kernels.attention import Movable, Ragged
from align.kernels.prefix_tree import prefix_tree


@dataclasses.dataclass(frozen=True)
class PackedBatch(Movable):
    """A batch with every distinct prefix once.

    `tokens`, `positions` (L,): the packed row. `index` (N, T): where each token of each row is in it; 0 at
    padding. `sees`: the prefix tree. `audio_at`, `audio_from` (A,): which of its places take which audio
    vector. `clips`: how the family's encoder packs its clips; None in a batch of text alone.
    """

    tokens: Tensor
    positions: Tensor
    index: Tensor
    sees: Ragged
    audio_at: Tensor
    audio_from: Tensor
    clips: Any


def pack_tokens(
    rows: Sequence[Sequence[int] | Tensor],
    row_clips: Sequence[Sequence[int]],
    n_tokens: Sequence[int],
    audio_token_id: int,
    clips: Any,
    min_shared: int = 4,
) -> PackedBatch:
    """Pack rows of token ids, of which row i hears the distinct clips `row_clips[i]`, in that order.

    `n_tokens` are the audio tokens of each distinct clip. See `prefix_tree` for `min_shared`. A family calls
    this with its own `clips`.

    Raises:
        ValueError: a row has not as many audio tokens as its clips have vectors.
    """
    starts = np.cumsum([0, *n_tokens])
    keys = [
        _with_audio_keys(number, np.asarray(row, dtype=np.int64), clips, starts, audio_token_id)
        for number, (row, clips) in enumerate(zip(rows, row_clips, strict=True))
    ]
    tree = prefix_tree(keys, min_shared)
    audio_at = np.flatnonzero(tree.tokens < 0)
    index = np.zeros((len(rows), max(map(len, keys))), np.int64)
    for row, places in zip(index, tree.places, strict=True):
        row[: len(places)] = places
    return PackedBatch(
        torch.from_numpy(np.where(tree.tokens < 0, audio_token_id, tree.tokens)),
        torch.from_numpy(tree.positions),
        torch.from_numpy(index),
        Ragged.of(tree.segments, causal=True),
        torch.from_numpy(audio_at),
        torch.from_numpy(-1 - tree.tokens[audio_at]),
        clips,
    )


def _with_audio_keys(
    number: int, row: np.ndarray, clips: Sequence[int], starts: np.ndarray, audio_token_id: int
) -> np.ndarray:
    """The row with -1 - v in place of the token that takes audio vector v: other audio is another prefix."""
    at = row == audio_token_id
    vectors = [np.arange(starts[clip], starts[clip + 1]) for clip in clips]
    n_vectors = sum(map(len, vectors))
    if n_vectors != at.sum():
        raise ValueError(
            f"row {number} has {at.sum()} audio tokens but its clips {list(clips)} give {n_vectors}"
        )
    keys = row.copy()
    if vectors:
        keys[at] = -1 - np.concatenate(vectors)
    return keys

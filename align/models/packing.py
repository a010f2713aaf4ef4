"""Rows of token ids and their clips -> what the packed backbone needs to know of a batch, as integers.

Made in the collator, on the host and in its workers, so that a GPU never waits for it.
Shapes: N rows, T tokens of the longest, L packed tokens, A audio tokens among them, E encoder frames of
all distinct clips, V audio vectors they give.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from align.kernels.attention import Ragged
from align.kernels.movable import Movable
from align.kernels.prefix_tree import clips_apart, prefix_tree
from align.models.audio_tokens import n_audio_tokens, n_encoder_frames


@dataclasses.dataclass(frozen=True)
class PackedClips(Movable):
    """Distinct clips in one packed row of encoder frames, without padding.

    `clip` and `position` (E,) say where each frame comes from and where in its clip it is; `pooled` (2V,)
    are the frames that are averaged in twos; `sees` keeps clips apart.
    """

    clip: Tensor
    position: Tensor
    pooled: Tensor
    sees: Ragged

    @classmethod
    def of(cls, n_frames: Sequence[int]) -> PackedClips:
        """Of clips with so many mel frames each."""
        frames = [n_encoder_frames(n) for n in n_frames]
        starts = np.cumsum([0, *frames[:-1]])
        pooled = [start + np.arange(n // 2 * 2) for start, n in zip(starts, frames, strict=True)]
        return cls(
            torch.repeat_interleave(torch.arange(len(frames)), torch.tensor(frames)),
            torch.cat([torch.arange(n) for n in frames]),
            torch.from_numpy(np.concatenate(pooled)),
            Ragged.of(clips_apart(frames), causal=False),
        )


@dataclasses.dataclass(frozen=True)
class PackedBatch(Movable):
    """A batch with every distinct prefix once.

    `tokens`, `positions` (L,): the packed row. `index` (N, T): where each token of each row is in it; 0 at
    padding. `sees`: the prefix tree. `audio_at`, `audio_from` (A,): which of its places take which audio
    vector. `clips`: None in a batch of text alone.
    """

    tokens: Tensor
    positions: Tensor
    index: Tensor
    sees: Ragged
    audio_at: Tensor
    audio_from: Tensor
    clips: PackedClips | None


def pack_rows(
    rows: Sequence[Sequence[int] | Tensor],
    row_clips: Sequence[Sequence[int]],
    n_frames: Sequence[int],
    audio_token_id: int,
    min_shared: int = 4,
) -> PackedBatch:
    """Pack rows of token ids, of which row i hears the distinct clips `row_clips[i]`, in that order.

    `n_frames` are the mel frames of each distinct clip. See `prefix_tree` for `min_shared`.

    Raises:
        ValueError: a row has not as many audio tokens as its clips have vectors.
    """
    starts = np.cumsum([0, *(n_audio_tokens(n) for n in n_frames)])
    keys = [
        _told_apart(number, np.asarray(row, dtype=np.int64), clips, starts, audio_token_id)
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
        PackedClips.of(n_frames) if len(n_frames) else None,
    )


def _told_apart(
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
    told = row.copy()
    if vectors:
        told[at] = -1 - np.concatenate(vectors)
    return told

"""Clips as Qwen2-Audio's encoder takes them: how many frames and tokens, and several in one packed row.

Shapes: C distinct clips, M mel bins, F mel frames, E encoder frames of all clips, V audio vectors they give.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import ProcessorMixin

from align.kernels.attention import Movable, Ragged
from align.kernels.prefix_tree import clips_apart
from align.models.chat import Encoded, expand_audio
from align.models.features import Clip
from align.models.packing import PackedBatch, pack_tokens

HALO = 2
"""Mel frames after a clip that its last encoder frame is computed from: two convolutions of width 3."""


def n_encoder_frames(n_frames: int) -> int:
    """Frames that `n_frames` mel frames become in the encoder: convolution by 2."""
    return (n_frames - 1) // 2 + 1


def n_audio_tokens(n_frames: int) -> int:
    """Tokens that `n_frames` mel frames become: convolution by 2, then pooling by 2, each rounding its way.

    30 s = 3,000 frames at the released hop of 10 ms = 750 tokens.
    """
    return (n_encoder_frames(n_frames) - 2) // 2 + 1


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
        """Pack clips of so many mel frames each."""
        frames = [n_encoder_frames(n) for n in n_frames]
        starts = np.cumsum([0, *frames[:-1]])
        pooled = [start + np.arange(n // 2 * 2) for start, n in zip(starts, frames, strict=True)]
        return cls(
            torch.repeat_interleave(torch.arange(len(frames)), torch.tensor(frames)),
            torch.cat([torch.arange(n) for n in frames]),
            torch.from_numpy(np.concatenate(pooled)),
            Ragged.of(clips_apart(frames), causal=False),
        )

    @property
    def n_encoded(self) -> int:
        """E, the frames that go through the encoder."""
        return len(self.position)

    @property
    def n_pairs(self) -> int:
        """Pairs of frames of which one sees the other."""
        return self.sees.n_pairs()

    @property
    def n_vectors(self) -> int:
        """V."""
        return len(self.pooled) // 2


class KeptClip(NamedTuple):
    """A clip of `n_frames` mel frames; `name` is that of its outputs in `TowerOutputs`."""

    name: str
    n_frames: int
    is_found: bool


@dataclasses.dataclass(frozen=True)
class KeptClips(Movable):
    """Distinct clips of a frozen tower whose outputs are on disk, or will be after this batch.

    `found` (W, d): the outputs of those that `is_found`, one after another; None if there are none.
    """

    clips: tuple[KeptClip, ...]
    found: Tensor | None

    @classmethod
    def of(cls, clips: Sequence[Clip]) -> KeptClips:
        """Of clips that were looked up in `TowerOutputs`."""
        found = [clip.outputs for clip in clips if clip.outputs is not None]
        return cls(
            tuple(KeptClip(clip.name or "", clip.n_frames, clip.outputs is not None) for clip in clips),
            torch.cat(found) if found else None,
        )

    def outputs(self, encode: Callable[[Tensor, KeptClip], Tensor], features: Tensor | None) -> Tensor:
        """(V, d) of all clips; `encode` gives those (v, d) of a clip that is not found.

        It gets `features` (1, M, F) of that clip alone, on its own length: what comes out then does not
        depend on the clips beside it, and is bit for bit what a later batch finds.
        """
        lengths = [n_audio_tokens(clip.n_frames) for clip in self.clips if clip.is_found]
        found = iter(() if self.found is None else self.found.split(lengths))
        mels = iter(() if features is None else features)
        parts = [
            next(found)
            if clip.is_found
            else encode(next(mels)[None, :, : clip.n_frames + HALO].contiguous(), clip)
            for clip in self.clips
        ]
        return torch.cat(parts)

    @property
    def n_encoded(self) -> int:
        """Frames that go through the encoder."""
        return sum(n_encoder_frames(clip.n_frames) for clip in self.clips if not clip.is_found)

    @property
    def n_pairs(self) -> int:
        """Pairs of these frames of which one sees the other."""
        return sum(n_encoder_frames(clip.n_frames) ** 2 for clip in self.clips if not clip.is_found)

    @property
    def n_vectors(self) -> int:
        """V."""
        return sum(n_audio_tokens(clip.n_frames) for clip in self.clips)


def pack_rows(
    rows: Sequence[Sequence[int] | Tensor],
    row_clips: Sequence[Sequence[int]],
    n_frames: Sequence[int],
    audio_token_id: int,
    min_shared: int = 4,
) -> PackedBatch:
    """`pack_tokens` for distinct clips of so many mel frames each.

    Raises:
        ValueError: a row has not as many audio tokens as its clips have vectors.
    """
    clips = PackedClips.of(n_frames) if len(n_frames) else None
    return _pack(rows, row_clips, n_frames, audio_token_id, clips, min_shared)


def _pack(
    rows: Sequence[Sequence[int] | Tensor],
    row_clips: Sequence[Sequence[int]],
    n_frames: Sequence[int],
    audio_token_id: int,
    clips: PackedClips | KeptClips | None,
    min_shared: int = 4,
) -> PackedBatch:
    tokens = [n_audio_tokens(n) for n in n_frames]
    return pack_tokens(rows, row_clips, tokens, audio_token_id, clips, min_shared)


def expand_clips(processor: ProcessorMixin, encoded: Encoded, clips: Sequence[Clip]) -> Encoded:
    """`expand_audio` for these clips."""
    audio_id = processor.tokenizer.convert_tokens_to_ids("<|AUDIO|>")
    return expand_audio(encoded, [n_audio_tokens(clip.n_frames) for clip in clips], audio_id)


def pack_audio(
    processor: ProcessorMixin, rows: Sequence[Sequence[int] | Tensor], clips: Sequence[Sequence[Clip]]
) -> dict[str, Any]:
    """`packed` rows with their clips, and `input_features` of each clip to encode once, if there are any.

    Clips are the same where they are one object, as `ClipFeatures` hands them out.
    """
    distinct = list({id(clip): clip for own in clips for clip in own}.values())
    number = {id(clip): i for i, clip in enumerate(distinct)}
    row_clips = [[number[id(clip)] for clip in own] for own in clips]
    audio_id = processor.tokenizer.convert_tokens_to_ids("<|AUDIO|>")
    n_frames = [clip.n_frames for clip in distinct]
    is_kept = any(clip.name for clip in distinct)
    if is_kept:
        packed = _pack(rows, row_clips, n_frames, audio_id, KeptClips.of(distinct))
    else:
        packed = pack_rows(rows, row_clips, n_frames, audio_id)
    return {**stack_unpadded([clip for clip in distinct if clip.outputs is None]), "packed": packed}


def stack_unpadded(clips: Sequence[Clip]) -> dict[str, Tensor]:
    """The packed model's input of C clips: input_features (C, M, F), F no more than the longest needs."""
    if not clips:
        return {}
    width = max(min(clip.n_frames + HALO, clip.n_padded) for clip in clips)
    features = torch.zeros(len(clips), clips[0].mel.shape[0], width)
    for row, clip in zip(features, clips, strict=True):
        here = min(width, clip.mel.shape[-1])
        row[:, :here] = clip.mel[:, :here]
    return {"input_features": features}

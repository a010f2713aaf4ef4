"""How long a clip is in mel frames and in audio tokens, as Qwen2-Audio's processor counts."""

from __future__ import annotations

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

"""How long a clip is in mel frames and in audio tokens, as Qwen2-Audio's processor counts."""

from __future__ import annotations


def n_audio_tokens(n_frames: int) -> int:
    """Tokens that `n_frames` mel frames become: convolution by 2, then pooling by 2, each rounding its way.

    30 s = 3,000 frames at the released hop of 10 ms = 750 tokens.
    """
    after_convolution = (n_frames - 1) // 2 + 1
    return (after_convolution - 2) // 2 + 1

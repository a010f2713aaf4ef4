"""Random changes to log-mel features, each a pure function of a seed.

Because nothing here has state, the n-th training example is augmented the same way however often a run
was killed and resumed. Masks follow SpecAugment (arXiv:1904.08779); the vocal-tract warp is VTLP.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Augmentation(NamedTuple):
    """Strength of each part; 0 switches it off. Units: log-mel, frames, bins, log frequency ratio."""

    gain: float = 0.0
    time_mask: int = 0
    frequency_mask: int = 0
    vocal_tract: float = 0.0
    channel: float = 0.0
    floor: float = 0.0


class SpecAugment(NamedTuple):
    """A policy of SpecAugment (arXiv:1904.08779, table 1): masks that lie within the clip, not its padding.

    Time warping (W = 80) is left out: the paper finds that it matters least and should be dropped first, and
    it would move words away from their time stamps.
    """

    frequency_mask: int
    """F, the widest masked band, in mel bins."""
    frequency_masks: int
    """mF, how many bands."""
    time_mask: int
    """T, the longest masked stretch, in frames (10 ms each in released models)."""
    time_masks: int
    """mT, how many stretches."""
    time_share: float
    """p, the most of a clip that one stretch may cover."""


POLICIES = {
    "librispeech_basic": SpecAugment(
        frequency_mask=27, frequency_masks=1, time_mask=100, time_masks=1, time_share=1.0
    )
}
"""By the name that a recipe gives: LibriSpeech Basic (LB), with which Qwen-Audio was trained."""


def augmentation_of(policy: str | None = None, **strengths: Any) -> Augmentation | SpecAugment:
    """A policy by its name, else an augmentation of these strengths."""
    return POLICIES[policy] if policy else Augmentation(**strengths)


def mask(mel: Tensor, n_frames: int, policy: SpecAugment, seed: int) -> Tensor:
    """A copy of `mel` (M, F), of which `n_frames` are the clip, with bands and stretches set to its mean."""
    draw = torch.Generator().manual_seed(seed)

    def stretch(longest: int, total: int) -> slice:
        width = int(torch.randint(0, longest + 1, (), generator=draw))
        start = int(torch.randint(0, total - width + 1, (), generator=draw))
        return slice(start, start + width)

    clip = mel[:, :n_frames].clone()
    mean = clip.mean()
    for _ in range(policy.frequency_masks):
        clip[stretch(min(policy.frequency_mask, len(mel)), len(mel))] = mean
    longest = min(policy.time_mask, int(policy.time_share * n_frames))
    for _ in range(policy.time_masks):
        clip[:, stretch(longest, n_frames)] = mean
    return torch.cat([clip, mel[:, n_frames:]], dim=1)


def augment(mel: Tensor, n_frames: int, how: Augmentation, seed: int) -> Tensor:
    """A changed copy of `mel` (M, F), of which `n_frames` are the clip: the time mask lies within them.

    The silence behind them is changed like the clip, as if it had been recorded with it.
    """
    draw = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=draw)

    bins = len(mel)
    if how.vocal_tract:
        mel = warp_frequency(mel, math.exp(float(uniform(-how.vocal_tract, how.vocal_tract))))
    if how.channel:
        response = uniform(-how.channel, how.channel, 1, 1, 6)
        mel = mel + F.interpolate(response, size=bins, mode="linear", align_corners=True)[0, 0, :, None]
    if how.floor:
        mel = torch.maximum(mel, mel.min() + uniform(0, how.floor))
    mel = mel + uniform(-how.gain, how.gain)
    mean = mel[:, :n_frames].mean()
    if how.frequency_mask:
        width = int(uniform(0, how.frequency_mask))
        start = int(uniform(0, bins - width))
        mel[start : start + width] = mean
    if how.time_mask:
        width = int(uniform(0, how.time_mask))
        width = min(width, n_frames)
        start = int(uniform(0, n_frames - width))
        mel[:, start : start + width] = mean
    return mel


def warp_frequency(mel: Tensor, ratio: float) -> Tensor:
    """Read bin m of `mel` (M, F) at its frequency times `ratio`: another length of vocal tract."""
    bins = mel.shape[0]
    top = _to_mel(torch.tensor(8000.0))
    centres = _to_hertz((torch.arange(bins) + 1) * top / (bins + 1))
    source = (_to_mel(centres * ratio) * (bins + 1) / top - 1).clamp(0, bins - 1)
    low = source.floor().long().clamp(max=bins - 2)
    weight = (source - low)[:, None]
    return mel[low] * (1 - weight) + mel[low + 1] * weight


def _to_mel(hertz: Tensor) -> Tensor:
    """Slaney's mel scale, as Whisper's features use it."""
    return torch.where(
        hertz < 1000, 3 * hertz / 200, 15 + 27 / math.log(6.4) * torch.log(hertz.clamp(min=1) / 1000)
    )


def _to_hertz(mel: Tensor) -> Tensor:
    return torch.where(mel < 15, 200 * mel / 3, 1000 * torch.exp(math.log(6.4) / 27 * (mel - 15)))

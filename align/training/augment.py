"""Random changes to log-mel features, each a pure function of a seed.

Because nothing here has state, the n-th training example is augmented the same way however often a run
was killed and resumed. Masks follow SpecAugment (arXiv:1904.08779); the vocal-tract warp is VTLP.
"""

from __future__ import annotations

import math
from typing import NamedTuple

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


def augment(mel: Tensor, how: Augmentation, seed: int) -> Tensor:
    """A changed copy of `mel` (M, F)."""
    draw = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=draw)

    bins, frames = mel.shape
    if how.vocal_tract:
        mel = warp_frequency(mel, math.exp(float(uniform(-how.vocal_tract, how.vocal_tract))))
    if how.channel:
        response = uniform(-how.channel, how.channel, 1, 1, 6)
        mel = mel + F.interpolate(response, size=bins, mode="linear", align_corners=True)[0, 0, :, None]
    if how.floor:
        mel = torch.maximum(mel, mel.min() + uniform(0, how.floor))
    mel = mel + uniform(-how.gain, how.gain)
    mean = mel.mean()
    if how.frequency_mask:
        width = int(uniform(0, how.frequency_mask))
        start = int(uniform(0, bins - width))
        mel[start : start + width] = mean
    if how.time_mask:
        width = int(uniform(0, how.time_mask))
        start = int(uniform(0, frames - width))
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

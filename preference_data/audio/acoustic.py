"""Are two clips the same recording? By how they sound, whatever was done to the file.

A sketch of a clip's spectrum finds pairs that may be alike; aligning their samples decides. Both survive
lossy coding, another sample rate, gain, polarity, silence before or after, and cut ends: a shift changes only
the phases of a spectrum, and coding keeps most of the waveform.

`CANNOT_FIND` says what this cannot find. Clips as plain as a single tone, of which little tells them apart,
may be taken for each other.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import fft

from preference_data.audio.decode import SAMPLE_RATE

Floats = NDArray[np.float32]

DIMENSIONS = 512
"""Numbers per sketch: 2 kB a clip."""
MAY_BE_ALIKE = 0.55
"""Least cosine of two sketches whose clips are aligned."""
ALIKE = 0.7
"""Least `likeness` of the same recording."""

CANNOT_FIND = (
    "another speed or pitch, a mixture with something about as loud, a piece of less than about two thirds "
    "of a clip, one inside a much longer recording, coding below about 16 kbit/s, a new recording of the same"
)
"""For whoever reads that nothing was found."""

_LOW_HZ, _HIGH_HZ = 100, 3400  # what telephone and the lowest bit rates keep
_GRID = 1 << 15  # frequencies half a hertz apart; longer clips are folded, which samples their spectrum there
_BOX = np.full(51, 1 / 51, np.float32)  # 25 Hz: what is finer tells recordings apart, what is coarser voices
_WHITENING = 0.75  # of 1: how far loud frequencies are brought down, so that the rest of the recording counts
_LEAST_S = 0.1


def _band(n: int) -> slice:
    """The frequencies that count, in a spectrum of n samples."""
    return slice(_LOW_HZ * n // SAMPLE_RATE, _HIGH_HZ * n // SAMPLE_RATE)


_WIDTH = (_band(_GRID).stop - _band(_GRID).start) // DIMENSIONS * DIMENSIONS
_SIGNS = np.random.default_rng(0).choice(np.array([-1, 1], np.float32), _WIDTH)


def sketch(samples: Floats) -> Floats:
    """The fine structure of a clip's spectrum, hashed by count sketch (Charikar et al. 2002).

    Args:
        samples: shape (n,), at `SAMPLE_RATE`.

    Returns:
        Shape (`DIMENSIONS`,), of length 1; all 0 for silence and for less than 0.1 s.
    """
    if len(samples) < _LEAST_S * SAMPLE_RATE:
        return np.zeros(DIMENSIONS, np.float32)
    folded = np.pad(samples, (0, -len(samples) % _GRID)).reshape(-1, _GRID).sum(axis=0)
    magnitude = np.sqrt(np.abs(fft.rfft(folded)[_band(_GRID)][:_WIDTH]))
    fine = magnitude - np.convolve(magnitude, _BOX, mode="same")
    hashed: Floats = (fine * _SIGNS).reshape(-1, DIMENSIONS).sum(axis=0)
    length = float(np.linalg.norm(hashed))
    return hashed / length if length > 1e-6 else np.zeros_like(hashed)


def likeness(first: Floats, second: Floats) -> float:
    """How alike two clips are where they overlap, 0 to 1: the peak of their whitened cross-correlation.

    0 where the best alignment leaves less than half of the energy of both.
    """
    lag, whole = _peak(first, second)
    if whole < ALIKE / 2:
        return whole
    start, start_of_second = max(0, lag), max(0, -lag)
    n = min(len(first) - start, len(second) - start_of_second)
    parts = first[start : start + n], second[start_of_second : start_of_second + n]
    is_half = any(
        2 * _energy(part) >= _energy(side) for part, side in zip(parts, (first, second), strict=True)
    )
    return _peak(*parts)[1] if is_half and n >= _LEAST_S * SAMPLE_RATE else 0.0


def _peak(first: Floats, second: Floats) -> tuple[int, float]:
    """By how many samples the second clip must be delayed to fit the first, and how well it then does."""
    n = fft.next_fast_len(len(first) + len(second), real=True)
    spectra = [fft.rfft(side, n)[_band(n)] for side in (first, second)]
    a, b = (side * np.maximum(np.abs(side), 1e-9) ** -_WHITENING for side in spectra)
    product = np.zeros(n // 2 + 1, np.complex64)
    product[_band(n)] = a * b.conj()
    correlation = np.abs(fft.irfft(product, n))
    at = int(correlation.argmax())
    scale = 2 / n * np.sqrt(float((np.abs(a) ** 2).sum()) * float((np.abs(b) ** 2).sum()))
    return at if at < len(first) else at - n, float(correlation[at] / max(scale, 1e-12))


def _energy(samples: Floats) -> float:
    return float(np.dot(samples, samples))

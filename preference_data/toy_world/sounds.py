"""Sound events, instruments and backgrounds from formulas. Everything is mono at `SAMPLE_RATE`.

Each sound varies with the generator it is given (pitch, length, decay), never in what it is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from scipy.signal import butter, lfilter, sosfilt

from preference_data.audio.decode import SAMPLE_RATE

Samples = NDArray[np.floating[Any]]
"""Shape (n,), full scale -1..1."""


def seconds(duration_s: float) -> Samples:
    """The time of every sample of a stretch."""
    return np.arange(int(SAMPLE_RATE * duration_s)) / SAMPLE_RATE


def add(buffer: Samples, sound: Samples, at_s: float) -> None:
    """Mix a sound into a buffer in place; what sticks out at the end is cut."""
    start = int(at_s * SAMPLE_RATE)
    end = min(len(buffer), start + len(sound))
    if start < end:
        buffer[start:end] += sound[: end - start]


def fade(n: int, attack_s: float = 0.005, release_s: float = 0.02) -> Samples:
    """A gain of 1 with a linear rise and fall, so that a tone does not click."""
    gain = np.ones(n)
    rise, fall = max(1, int(attack_s * SAMPLE_RATE)), max(1, int(release_s * SAMPLE_RATE))
    gain[:rise] = np.linspace(0, 1, rise)
    gain[-fall:] *= np.linspace(1, 0, fall)
    return gain


def tone(frequency_hz: float, time: Samples) -> Samples:
    """A sine; single precision, which is several times faster and off by -50 dB at worst."""
    return np.sin((2 * np.pi * frequency_hz * time).astype(np.float32))


# -------------------------------------------------------------------- events


def beep(rng: Generator) -> Samples:
    """A short sine."""
    time = seconds(rng.uniform(0.12, 0.2))
    return 0.35 * tone(rng.uniform(600, 1600), time) * fade(len(time))


@cache
def _band(low_hz: int, high_hz: int) -> Samples:
    return butter(2, [low_hz, high_hz], "band", fs=SAMPLE_RATE, output="sos")


def clap(rng: Generator) -> Samples:
    """A burst of band-passed noise."""
    time = seconds(0.12)
    burst = rng.standard_normal(len(time)) * np.exp(-time / rng.uniform(0.012, 0.03))
    band = _band(100 * int(rng.integers(7, 13)), 100 * int(rng.integers(30, 56)))  # few, to be cached
    return 0.5 * sosfilt(band, burst)


_BELL = ((1, 1, 5), (2.0, 0.6, 7), (2.76, 0.7, 8), (5.4, 0.5, 12), (8.9, 0.3, 16))
"""Partial, amplitude, decay per second."""


def bell(rng: Generator) -> Samples:
    """Inharmonic partials that die away."""
    time, frequency = seconds(0.42), rng.uniform(500, 1100)
    partials = [a * tone(frequency * p, time) * np.exp(-time * decay) for p, a, decay in _BELL]
    return 0.18 * np.sum(partials, axis=0) * fade(len(time), 0.002)


def whistle(rng: Generator) -> Samples:
    """A glide up or down by about an octave."""
    time = seconds(rng.uniform(0.28, 0.4))
    low = rng.uniform(700, 1200)
    start, end = low, low * rng.uniform(1.7, 2.3)
    if rng.random() < 0.5:
        start, end = end, start
    phase = start * time + (end - start) * time**2 * SAMPLE_RATE / (2 * len(time))
    return 0.3 * np.sin(2 * np.pi * phase) * fade(len(time), 0.02, 0.05)


def knock(rng: Generator) -> Samples:
    """A low thud with a noisy start."""
    time = seconds(0.14)
    thud = 0.7 * tone(rng.uniform(90, 180), time) * np.exp(-time * rng.uniform(18, 30))
    return thud + 0.04 * rng.standard_normal(len(time)) * np.exp(-time * 150)


EVENTS: dict[str, Callable[[Generator], Samples]] = {
    "beep": beep,
    "clap": clap,
    "bell": bell,
    "whistle": whistle,
    "knock": knock,
}

# --------------------------------------------------------------- instruments


def piano(frequency_hz: float, duration_s: float, rng: Generator) -> Samples:
    """Six harmonics; the higher, the sooner they die."""
    time = seconds(duration_s)
    partials = [tone(frequency_hz * k, time) / k**1.6 * np.exp(-time * (2.5 + 1.2 * k)) for k in range(1, 7)]
    return 0.3 * np.sum(partials, axis=0) * fade(len(time), 0.004)


_ORGAN = ((0.5, 0.6), (1, 1), (2, 0.8), (3, 0.5), (4, 0.4), (8, 0.25))
"""Harmonic, amplitude."""


def organ(frequency_hz: float, duration_s: float, rng: Generator) -> Samples:
    """Steady harmonics with a suboctave."""
    time = seconds(duration_s)
    partials = [a * tone(frequency_hz * k, time) for k, a in _ORGAN]
    return 0.16 * np.sum(partials, axis=0) * fade(len(time), 0.02, 0.03)


def flute(frequency_hz: float, duration_s: float, rng: Generator) -> Samples:
    """Nearly a sine, with vibrato and breath."""
    time = seconds(duration_s)
    vibrato = 1 + 0.006 * tone(5.5, time)
    phase = 2 * np.pi * frequency_hz * np.cumsum(vibrato) / SAMPLE_RATE
    breath = 0.02 * rng.standard_normal(len(time))
    return (0.3 * np.sin(phase) + 0.05 * np.sin(2 * phase) + breath) * fade(len(time), 0.05, 0.05)


def guitar(frequency_hz: float, duration_s: float, rng: Generator) -> Samples:
    """A plucked string (Karplus and Strong 1983): noise in a damped loop of one period."""
    n, period = int(SAMPLE_RATE * duration_s), max(2, int(SAMPLE_RATE / frequency_hz))
    pluck = np.zeros(n)
    pluck[:period] = rng.uniform(-1, 1, period)
    loop = np.zeros(period + 2)
    loop[0] = 1
    loop[period] = loop[period + 1] = -0.498
    return 0.5 * lfilter([1.0], loop, pluck) * fade(n, 0.002)


INSTRUMENTS: dict[str, Callable[[float, float, Generator], Samples]] = {
    "piano": piano,
    "organ": organ,
    "guitar": guitar,
    "flute": flute,
}


def melody(duration_s: float, instrument: str, direction: str, tempo: str, rng: Generator) -> Samples:
    """Notes that rise or fall: 4-6 fast ones of about 0.2 s, or 3-4 slow ones of about 0.6 s.

    Args:
        duration_s: of the result.
        instrument: a key of `INSTRUMENTS`.
        direction: "rising" or "falling".
        tempo: "fast" or "slow".
        rng: draws the notes.
    """
    n_notes = int(rng.integers(4, 7) if tempo == "fast" else rng.integers(3, 5))
    step_s = rng.uniform(0.18, 0.26) if tempo == "fast" else rng.uniform(0.5, 0.65)
    semitones = np.cumsum([0, *rng.choice([2, 2, 3, 4], n_notes - 1)])
    frequencies = rng.uniform(196, 330) * 2 ** (semitones / 12)
    if direction == "falling":
        frequencies = frequencies[::-1]
    buffer = np.zeros(int(SAMPLE_RATE * duration_s))
    for i, frequency in enumerate(frequencies):
        add(buffer, INSTRUMENTS[instrument](frequency, step_s * 1.15, rng), 0.08 + i * step_s)
    return buffer


# --------------------------------------------------------------- backgrounds


_RAIN = butter(1, 1500, "high", fs=SAMPLE_RATE, output="sos")


def rain(duration_s: float, rng: Generator) -> Samples:
    """High-passed noise."""
    level = rng.uniform(0.02, 0.05)
    return level * sosfilt(_RAIN, rng.standard_normal(int(SAMPLE_RATE * duration_s)))


def humming(duration_s: float, rng: Generator) -> Samples:
    """A low steady tone, as of a machine."""
    time, frequency = seconds(duration_s), rng.uniform(50, 120)
    return rng.uniform(0.05, 0.12) * np.sum([tone(frequency * k, time) / k for k in (1, 2, 3)], axis=0)


def beeping(duration_s: float, rng: Generator) -> Samples:
    """A beep about twice a second, always the same."""
    at_s, period_s = rng.uniform(0, 0.3), rng.uniform(0.4, 0.6)
    time = seconds(0.1)
    beep = rng.uniform(0.12, 0.16) * tone(rng.uniform(900, 1600), time) * fade(len(time))
    buffer = np.zeros(int(SAMPLE_RATE * duration_s))
    for start in np.arange(at_s, duration_s - 0.2, period_s):
        add(buffer, beep, float(start))
    return buffer


def music(duration_s: float, rng: Generator) -> Samples:
    """A quiet slow melody on any instrument."""
    instrument = str(rng.choice(list(INSTRUMENTS)))
    direction = str(rng.choice(["rising", "falling"]))
    return 0.35 * melody(duration_s, instrument, direction, "slow", rng)


BACKGROUNDS: dict[str, Callable[[float, Generator], Samples]] = {
    "rain": rain,
    "humming": humming,
    "beeping": beeping,
    "music": music,
}

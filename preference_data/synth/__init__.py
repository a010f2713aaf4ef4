"""Audio made from nothing, so that every fact about it is known: speech, sound events, instruments."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Samples = NDArray[np.float32]
"""Mono float32 in -1..1 at `SAMPLE_RATE`."""

SAMPLE_RATE = 16_000

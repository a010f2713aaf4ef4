"""Samples -> the bytes of an audio file, and such a file inside a message of a chat."""

from __future__ import annotations

import base64
from io import BytesIO
from typing import Any, Literal

import numpy as np
import soundfile

from preference_data.audio.decode import SAMPLE_RATE


def encode(
    samples: np.ndarray,
    container: Literal["WAV", "FLAC", "MP3"],
    subtype: Literal["PCM_16", "FLOAT"] | None = None,
) -> bytes:
    """16 kHz mono samples (S,) as a file; `subtype` is how each is kept, None: the container's default."""
    file = BytesIO()
    soundfile.write(file, samples, SAMPLE_RATE, format=container, subtype=subtype)
    return file.getvalue()


def input_audio(wav: bytes) -> dict[str, Any]:
    """A WAV file as a content part of OpenAI's chat format."""
    data = base64.b64encode(wav).decode()
    return {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}

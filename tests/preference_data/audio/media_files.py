"""Writes the files of phones, browsers and old programs by PyAV, where it is installed."""

from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

AVAILABLE = find_spec("av") is not None
needs_media = pytest.mark.skipif(not AVAILABLE, reason="PyAV is not installed: pip install -e '.[media]'")
CODECS = {  # by a file's ending: container, coding, sample rate, options
    ".m4a": ("mp4", "aac", 16_000, {"movflags": "faststart"}),
    ".mp4": ("mp4", "aac", 44_100, {"movflags": "frag_keyframe+empty_moov"}),
    ".mov": ("mov", "alac", 16_000, {}),
    ".3gp": ("3gp", "libopencore_amrnb", 8_000, {}),
    ".amr": ("amr", "libopencore_amrnb", 8_000, {}),
    ".aac": ("adts", "aac", 44_100, {}),
    ".webm": ("webm", "libopus", 48_000, {}),
    ".mka": ("matroska", "aac", 48_000, {}),
    ".wma": ("asf", "wmav2", 44_100, {}),
}


def write(path: Path, samples: np.ndarray, rate: int, **options: str) -> Path:
    """Write samples (n,) or (channels, n) as the format of the path's ending."""
    import av

    container_name, codec, codec_rate, own = CODECS[path.suffix]
    planes = np.atleast_2d(samples).astype(np.float32)
    layout = "mono" if len(planes) == 1 else "stereo"
    with av.open(path, "w", format=container_name, options={**own, **options}) as container:
        stream = container.add_stream(codec, rate=codec_rate, layout=layout)
        stream.codec_context.bit_rate = {"libopencore_amrnb": 12_200}.get(codec, 64_000)
        frame = av.AudioFrame.from_ndarray(planes, format="fltp", layout=layout)
        frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        stream.codec_context.open(strict=False)
        resample = av.AudioResampler(
            stream.codec_context.format, layout, codec_rate, stream.codec_context.frame_size
        )
        for part in [*resample.resample(frame), *resample.resample(None)]:
            container.mux(stream.encode(part))
        container.mux(stream.encode(None))
    return path

"""The clips of a page: where its player finds them, how long they are, and what they look like.

Clips are untrusted files and decoded with the bounds of `preference_data.audio`, to what a policy hears:
16 kHz mono.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple
from urllib.parse import quote

import numpy as np

from preference_data.audio import decode
from preference_data.audio.clip_files import BadAudio
from preference_data.audio.encode import encode
from preference_data.dataset.dataset import Dataset

Placing = Literal["packed", "linked"]
"""`packed`: clips are inside the page up to a budget, the rest is linked; `linked`: all are, by paths
relative to the page."""

BARS = 72
_HALF_HEIGHT = 12
_MAX_DURATION_S = 600.0


class Clip(NamedTuple):
    """One clip of a page. What cannot be played has a `problem` and nothing else.

    `link` is a URL relative to the page, empty for a clip inside a tar shard; `waveform` is the path of an
    SVG of `BARS` times 24 units, a bar's half height being the loudest sample in it relative to the clip's
    loudest.
    """

    name: str
    link: str
    seconds: float
    waveform: str
    problem: str


def gather(corpus: Path, names: Iterable[str], page: Path) -> dict[str, Clip]:
    """Decode every clip once.

    Args:
        corpus: folder that the names are relative to.
        names: clips; one may come several times.
        page: the file that will link to them.
    """
    return {name: _clip(corpus, name, page.resolve().parent) for name in dict.fromkeys(names)}


def _clip(corpus: Path, name: str, beside: Path) -> Clip:
    try:
        file = Dataset(corpus).find(name)
        samples = decode.load(file, max_duration_s=_MAX_DURATION_S)
    except BadAudio as error:
        return Clip(name, "", 0.0, "", f"{error.code}: {error.detail}")
    link = quote(os.path.relpath(file, beside)) if isinstance(file, Path) else ""
    return Clip(name, link, samples.size / decode.SAMPLE_RATE, waveform(samples), "")


def pack(corpus: Path, clips: Mapping[str, Clip], characters: int) -> dict[str, str]:
    """The sound of the first playable clips as data URLs by name, as many as go into so many characters."""
    packed: dict[str, str] = {}
    for name in (name for name, clip in clips.items() if not clip.problem):
        url = audio_url(corpus, name) or ""
        characters -= len(url)
        if characters < 0:
            break
        packed[name] = url
    return packed


def audio_url(corpus: Path, name: str) -> str | None:
    """One clip of a corpus folder as a data URL, see `mp3`; None without sound."""
    sound = mp3(corpus, name)
    return None if sound is None else f"data:audio/mpeg;base64,{base64.b64encode(sound).decode()}"


def mp3(corpus: Path, name: str) -> bytes | None:
    """One clip of a corpus folder as an MP3 that every browser plays; None without sound."""
    try:
        samples = decode.load(Dataset(corpus).find(name), max_duration_s=_MAX_DURATION_S)
    except BadAudio:
        return None
    return encode(samples, "MP3")


def waveform(samples: np.ndarray) -> str:
    """The path of `Clip.waveform`; where there is silence the bars are dots."""
    edges = np.linspace(0, samples.size, BARS + 1).astype(int)
    loudest = np.array(
        [np.abs(samples[a : max(b, a + 1)]).max(initial=0.0) for a, b in zip(edges, edges[1:], strict=False)]
    )
    heights = np.rint(2 * (_HALF_HEIGHT - 1) * loudest / (loudest.max() or 1.0)).astype(int).clip(min=1)
    return "".join(f"M{x} {_HALF_HEIGHT - h / 2:g}v{h}" for x, h in enumerate(heights.tolist()))

"""Clips of a corpus with facts: 16-bit WAVs where the pipeline looks for them, and their records.

Clips to learn from lie in `audio/<split>/`; clips of dev and test lie where AIR-Bench would have them,
`<split>/Chat/<task_name>_<dataset_name>/`.
"""

from __future__ import annotations

import hashlib
import io
import wave
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from preference_data.audio.decode import SAMPLE_RATE, Quarantined
from preference_data.dataset.splits import HELD_OUT
from preference_data.schema import AudioClip, Facts, Split
from preference_data.toy_world.phrasebook import Phrasebook
from preference_data.toy_world.sounds import Samples


class PreparedClips(NamedTuple):
    """The clips of a corpus, the recordings that cannot be used, and those that are odd."""

    clips: list[AudioClip]
    quarantined: list[Quarantined]
    odd: Sequence[Quarantined] = ()


def wav_bytes(samples: Samples) -> bytes:
    """A 16-bit WAV file of samples at `SAMPLE_RATE`; what exceeds full scale is cut off."""
    file = io.BytesIO()
    with wave.open(file, "wb") as wav:
        wav.setparams((1, 2, SAMPLE_RATE, len(samples), "NONE", ""))
        wav.writeframes(np.rint(np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())
    return file.getvalue()


class ClipWriter:
    """Writes the clips of one corpus below `out`."""

    def __init__(self, out: Path, phrasebook: Phrasebook, dataset_name: str) -> None:
        self.out = out
        self.phrasebook = phrasebook
        self.dataset_name = dataset_name

    def write(
        self,
        clip_id: str,
        split: Split,
        samples: Samples,
        facts: Facts,
        *,
        speaker: str | None,
        source: str,
    ) -> AudioClip:
        """Write samples at `SAMPLE_RATE`; the same samples give the same bytes."""
        task_name = self.phrasebook.task_of(facts)
        folder = f"{split}/Chat/{task_name}_{self.dataset_name}" if split in HELD_OUT else f"audio/{split}"
        path = f"{folder}/{clip_id}.wav"
        data = wav_bytes(samples)
        (self.out / path).parent.mkdir(parents=True, exist_ok=True)
        (self.out / path).write_bytes(data)
        return AudioClip(
            id=clip_id,
            path=path,
            split=split,
            duration_s=len(samples) / SAMPLE_RATE,
            sha256=hashlib.sha256(data).hexdigest(),
            speaker=speaker,
            facts=facts,
            source=source,
        )

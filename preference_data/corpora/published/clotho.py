"""Clotho 2.1: sounds of Freesound, 15 to 30 s, each with five captions.

Home: https://zenodo.org/records/4783391. Licence: Tampere University's for the captions (research,
no commerce), Creative Commons of various kinds for the audio (named in clotho_metadata_*.csv).
37 h, 11 GB of WAV at 44.1 kHz.
Layout: `clotho_captions_{development,validation,evaluation}.csv` (file_name, caption_1 … caption_5), audio
in `development/`, `validation/` and `evaluation/`: train, dev and test.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from preference_data.corpora.published.recording import Recording, captioned, rows, tables
from preference_data.schema import Split

_CAPTIONS = tuple(f"caption_{number}" for number in range(1, 6))
_SPLITS: dict[str, Split] = {"evaluation": "test", "validation": "dev", "development": "train"}


def read(folder: Path) -> Iterator[Recording]:
    """Every recording with its five captions."""
    for part, split, table in tables(folder, "clotho_captions_{}.csv", _SPLITS, "clotho"):
        for row in rows(table, ("file_name", *_CAPTIONS)):
            path, captions = f"{part}/{row['file_name']}", [row[name] for name in _CAPTIONS]
            yield captioned(path, split, "clotho", captions)

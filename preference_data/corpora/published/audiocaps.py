"""AudioCaps 1.0: captions of 10 s pieces of YouTube videos (a part of AudioSet).

Home: https://github.com/cdjkim/audiocaps. Licence: MIT for the captions; the audio belongs to those who
uploaded it and is not distributed. 137 h; about a tenth of the videos no longer exist.
Layout: `train.csv`, `val.csv`, `test.csv` (audiocap_id, youtube_id, start_time, caption), audio anywhere
below `audio/`, named by youtube_id (also with Y before it, or _{start_time} after it) or audiocap_id.
The tables are its splits: one caption per recording in train, five in val and test.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from preference_data.audio.clip_files import ENDINGS, list_files
from preference_data.corpora.published.recording import Recording, captioned, grouped, rows, tables
from preference_data.schema import Split

_SPLITS: dict[str, Split] = {"test": "test", "val": "dev", "train": "train"}
_COLUMNS = ("audiocap_id", "youtube_id", "start_time", "caption")


def read(folder: Path) -> Iterator[Recording]:
    """Every captioned piece, there or not."""
    files = audio_files(folder)
    for _, split, table in tables(folder, "{}.csv", _SPLITS, "audiocaps"):
        pieces = grouped(rows(table, _COLUMNS), "youtube_id", "start_time")
        for (video, start), piece in pieces.items():
            captions = [row["caption"] for row in piece]
            names = [video, f"Y{video}", f"{video}_{start}", *(row["audiocap_id"] for row in piece)]
            path = next((files[name] for name in names if name in files), f"audio/{video}.wav")
            yield captioned(path, split, "audiocaps", captions)


def audio_files(folder: Path) -> Mapping[str, str]:
    """Name without ending -> path of every audio file below `audio/`, relative to `folder`."""
    paths = list_files(folder / "audio", "**/*", ENDINGS)
    return {path.stem: path.relative_to(folder).as_posix() for path in paths}

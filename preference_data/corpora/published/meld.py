"""MELD: utterances of the series Friends with one of seven emotions.

Home: https://affective-meld.github.io. Licence: GPL 3.0 for the labels; the scenes belong to the
broadcaster and are for research. 13.7 h, 11 GB of video.
Layout: `MELD.Raw/{train,dev,test}_sent_emo.csv` (Utterance, Speaker, Emotion, Dialogue_ID, Utterance_ID),
clips `dia{D}_utt{U}.wav` (or .flac), made from the .mp4, in `train_splits/`, `dev_splits_complete/` and
`output_repeated_splits_test/`. The tables are its splits; the actors are in all of them, so speakers are
not given. A few clips are missing or damaged in the official download.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from preference_data.corpora.published.recording import Content, QuestionAnswer, Recording, rows, tables
from preference_data.schema import Split

_CLIPS: dict[Split, str] = {
    "test": "output_repeated_splits_test",
    "dev": "dev_splits_complete",
    "train": "train_splits",
}
_COLUMNS = ("Utterance", "Emotion", "Dialogue_ID", "Utterance_ID")
_TYPOGRAPHY = str.maketrans(
    {"\x85": "...", "\x91": "'", "\x92": "'", "\x93": '"', "\x94": '"', "\x96": "-", "\x97": "-"}
)
"""The tables were once saved as Windows text and read as Latin."""
_QUESTION = "What emotion does the speaker express?"


def read(folder: Path) -> Iterator[Recording]:
    """Every labelled utterance, its clip there or not."""
    root = folder / "MELD.Raw" if (folder / "MELD.Raw").is_dir() else folder
    for _, split, table in tables(root, "{}_sent_emo.csv", {split: split for split in _CLIPS}, "meld"):
        for row in rows(table, _COLUMNS):
            emotion, text = row["Emotion"].lower(), row["Utterance"].translate(_TYPOGRAPHY)
            name = f"dia{row['Dialogue_ID']}_utt{row['Utterance_ID']}"
            flac = root / _CLIPS[split] / f"{name}.flac"
            path = flac if flac.exists() else flac.with_suffix(".wav")
            yield Recording(
                path.relative_to(folder).as_posix(),
                split,
                "meld",
                (
                    Content("emotion", emotion, "en", "en", benchmark="meld"),
                    Content("transcribe", text, "en", "en"),
                ),
                (QuestionAnswer(_QUESTION, emotion),),
            )

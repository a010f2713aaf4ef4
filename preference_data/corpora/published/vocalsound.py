"""VocalSound: laughter, sighs, coughs, throat clearing, sneezes and sniffs of 3,365 people.

Home: https://github.com/YuanGongND/vocalsound. Licence: CC BY-SA 4.0. 24 h, 1.7 GB of WAV at 16 kHz.
Layout: `audio_16k/{speaker}_{collection}_{sound}.wav` (or `audio_44k/`, `data_44k/`),
`meta/{tr,val,te}_meta.csv` with speaker, gender, age, country, language, health; a speaker begins with f or
m. The tables, of speakers, are its splits.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path

from preference_data.audio.clip_files import list_files
from preference_data.corpora.published.recording import (
    Content,
    QuestionAnswer,
    Recording,
    lines,
    not_a_corpus,
)
from preference_data.schema import Split

_SPLITS: dict[str, Split] = {"te": "test", "val": "dev", "tr": "train"}
_FOLDERS = ("audio_16k", "audio_44k", "data_44k")
_NAME = re.compile(r"(?P<speaker>[fm]\d+)_\d+_(?P<sound>[a-z]+)")
_SOUNDS = {"throatclearing": "throat clearing"}
_GENDERS = {"f": "female", "m": "male"}
_QUESTION = "What sound does the person make?"


def read(folder: Path) -> Iterator[Recording]:
    """Every sound by a speaker of one of the tables."""
    audio = next((folder / name for name in _FOLDERS if (folder / name).is_dir()), None)
    if audio is None:
        raise not_a_corpus(folder, "audio_16k/", "vocalsound")
    named = [(path, _NAME.fullmatch(path.stem)) for path in list_files(audio, endings={".wav"})]
    for part, split in _SPLITS.items():
        ages = _speakers(folder / "meta" / f"{part}_meta.csv")
        for path, name in named:
            if name and name["speaker"] in ages:
                yield _recording(folder, path, split, name["speaker"], name["sound"], ages[name["speaker"]])


def _recording(folder: Path, path: Path, split: Split, speaker: str, sound: str, age: str) -> Recording:
    sound = _SOUNDS.get(sound, sound)
    contents = [
        Content("vocal_sound", sound, text_language="en", benchmark="vocalsound"),
        Content("gender", _GENDERS[speaker[0]], text_language="en"),
    ]
    if age.isdecimal():
        contents.append(Content("age", age, text_language="en"))
    return Recording(
        path.relative_to(folder).as_posix(),
        split,
        "vocalsound",
        tuple(contents),
        (QuestionAnswer(_QUESTION, sound),),
        speaker=speaker,
    )


def _speakers(table: Path) -> dict[str, str]:
    """Speaker -> age, empty where it is not given. The tables have come with and without a header."""
    cells = csv.reader(line for _, line in lines(table))
    return {row[0].strip(): row[2].strip() if len(row) > 2 else "" for row in cells if row}

"""MusicCaps: 10 s of music from YouTube videos, described by musicians.

Home: https://huggingface.co/datasets/google/MusicCaps. Licence: CC BY-SA 4.0 for the descriptions; the
audio belongs to those who uploaded it and is not distributed. 5,521 pieces, 15 h.
Layout: `musiccaps-public.csv` (ytid, start_s, end_s, aspect_list, caption, is_audioset_eval …), audio
anywhere below `audio/`, named by ytid. Pieces of AudioSet's evaluation set are test, the rest is train.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

from preference_data.corpora.published.audiocaps import audio_files
from preference_data.corpora.published.recording import BadCorpus, Content, QuestionAnswer, Recording, rows
from preference_data.schema import Split

_TABLE = "musiccaps-public.csv"
_QUESTION = "Describe the music in this recording."
_COLUMNS = ("ytid", "start_s", "aspect_list", "caption", "is_audioset_eval")


def read(folder: Path) -> Iterator[Recording]:
    """Every described piece, there or not."""
    files = audio_files(folder)
    splits: tuple[Split, ...] = ("test", "train")
    for split in splits:
        for row in rows(folder / _TABLE, _COLUMNS):
            if _is_true(row["is_audioset_eval"]) == (split == "test"):
                yield _recording(split, row, files)


def _recording(split: Split, row: Mapping[str, str], files: Mapping[str, str]) -> Recording:
    video = row["ytid"]
    names = (video, f"Y{video}", f"{video}_{row['start_s']}")
    contents = [Content("describe_music", row["caption"], text_language="en", benchmark="musiccaps")]
    if aspects := _aspects(video, row["aspect_list"]):
        contents.append(Content("keyword", ", ".join(aspects), text_language="en"))
    return Recording(
        next((files[name] for name in names if name in files), f"audio/{video}.wav"),
        split,
        "musiccaps",
        tuple(contents),
        (QuestionAnswer(_QUESTION, row["caption"]),),
    )


def _is_true(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise BadCorpus(f"{_TABLE}: is_audioset_eval is {text!r}, not True or False")
    return text.lower() == "true"


def _aspects(video: str, text: str) -> list[str]:
    """The table spells its lists as Python does."""
    try:
        aspects = ast.literal_eval(text) if text else []
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise BadCorpus(f"{_TABLE}: aspect_list of {video!r} is not a list: {text[:80]!r}") from error
    return [str(aspect) for aspect in aspects] if isinstance(aspects, list) else []

"""AISHELL-1: read Mandarin with transcripts.

Home: https://www.openslr.org/33. Licence: Apache 2.0. 178 h, 15 GB of WAV at 16 kHz.
Layout: `data_aishell/wav/{train,dev,test}/{speaker}/{utterance}.wav` (the publisher packs each speaker
once more), `data_aishell/transcript/aishell_transcript_v0.8.txt` (utterance, words with blanks between
them), and `resource_aishell/speaker.info` (speaker number, M or F).
The folders are its splits; no speaker is in two of them. Recordings without a transcript are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from preference_data.audio.clip_files import list_files
from preference_data.corpora.published.recording import Content, Recording, lines, not_a_corpus
from preference_data.schema import Split

_SPLITS: tuple[Split, ...] = ("test", "dev", "train")
_GENDERS = {"F": "female", "M": "male"}


def read(folder: Path) -> Iterator[Recording]:
    """Every recording with a transcript."""
    root = folder / "data_aishell" if (folder / "data_aishell").is_dir() else folder
    if not (root / "wav").is_dir():
        raise not_a_corpus(folder, "data_aishell/wav/", "aishell1")
    texts = dict(
        line.split(None, 1)
        for _, line in lines(root / "transcript" / "aishell_transcript_v0.8.txt")
        if len(line.split(None, 1)) == 2
    )
    genders = _genders(folder / "resource_aishell" / "speaker.info")
    for split in _SPLITS:
        for path in list_files(root / "wav" / split, "*/*", {".wav"}):
            if path.stem in texts:
                speaker = path.parent.name
                text = "".join(texts[path.stem].split())
                contents = [Content("transcribe", text, "zh", "zh", benchmark=f"aishell1_{split}")]
                if speaker in genders:
                    contents.append(Content("gender", genders[speaker], "zh", "en"))
                yield Recording(
                    path.relative_to(folder).as_posix(),
                    split,
                    f"aishell1_{split}",
                    tuple(contents),
                    speaker=speaker,
                )


def _genders(table: Path) -> dict[str, str]:
    """Speaker -> gender, from lines `0002 F`."""
    cells = [line.split() for _, line in lines(table)] if table.is_file() else []
    return {f"S{row[0]}": _GENDERS[row[1]] for row in cells if len(row) == 2 and row[1] in _GENDERS}

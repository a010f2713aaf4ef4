"""Clotho 2.1: sounds of Freesound, 15 to 30 s, each with five captions.

Home: https://zenodo.org/records/4783391. Licence: Tampere University's for the captions (research,
no commerce), Creative Commons of various kinds for the audio (named in clotho_metadata_*.csv).
37 h, 11 GB of WAV at 44.1 kHz.
Layout: `clotho_captions_{development,validation,evaluation}.csv` (file_name, caption_1 … caption_5), audio
in `development/`, `validation/` and `evaluation/`: train, dev and test.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from preference_data.corpora.fetch import OnBytes, RemoteFile, fetch_parts
from preference_data.corpora.published.recording import (
    DESCRIBE_SOUND,
    Card,
    Content,
    QuestionAnswer,
    Recording,
    comma_separated,
    not_a_corpus,
)
from preference_data.schema import Split

_CAPTIONS = tuple(f"caption_{number}" for number in range(1, 6))
_SPLITS: dict[str, Split] = {"evaluation": "test", "validation": "dev", "development": "train"}
_MD5 = {
    "clotho_captions_development.csv": "d4090b39ce9f2491908eebf4d5b09bae",
    "clotho_captions_validation.csv": "5879e023032b22a2c930aaa0528bead4",
    "clotho_captions_evaluation.csv": "1b16b9e57cf7bdb7f13a13802aeb57e2",
    "clotho_audio_development.7z": "c8b05bc7acdb13895bb3c6a29608667e",
    "clotho_audio_validation.7z": "7dba730be08bada48bd15dc4e668df59",
    "clotho_audio_evaluation.7z": "4569624ccadf96223f19cb59fe4f849f",
}
_FILES = {
    part: [
        RemoteFile(f"https://zenodo.org/records/4783391/files/{name}", name, 8, f"md5:{_MD5[name]}")
        for name in (f"clotho_captions_{part}.csv", f"clotho_audio_{part}.7z")
    ]
    for part in _SPLITS
}

CARD = Card(
    "clotho",
    "sound captions (en)",
    37,
    11,
    "captions: research only; audio: CC",
    "https://zenodo.org/records/4783391",
    "open",
    tuple(_FILES),
)


def download(folder: Path, parts: Sequence[str] | None = None, on_bytes: OnBytes | None = None) -> str:
    """Fetch captions and archives; unpacking .7z is left to 7-Zip."""
    fetch_parts(folder, _FILES, parts, on_bytes)
    packed = [name for name in parts or _FILES if not (folder / name).is_dir()]
    if not packed:
        return ""
    commands = "\n".join(f"  7z x -o{folder} {folder}/clotho_audio_{part}.7z" for part in packed)
    return f"The audio is packed with 7-Zip (apt-get install p7zip-full); unpack it:\n{commands}"


def read(folder: Path) -> Iterator[Recording]:
    """Every recording with its five captions."""
    if not any((folder / f"clotho_captions_{part}.csv").is_file() for part in _SPLITS):
        raise not_a_corpus(folder, "clotho_captions_*.csv", "clotho")
    for part, split in _SPLITS.items():
        table = folder / f"clotho_captions_{part}.csv"
        for row in comma_separated(table, ("file_name", *_CAPTIONS)) if table.is_file() else ():
            captions = [row[name] for name in _CAPTIONS]
            yield Recording(
                f"{part}/{row['file_name']}",
                split,
                "clotho",
                tuple(
                    Content("caption_clotho", text, text_language="en", benchmark="clotho")
                    for text in captions
                ),
                tuple(QuestionAnswer(DESCRIBE_SOUND, text) for text in captions[:1]),
            )

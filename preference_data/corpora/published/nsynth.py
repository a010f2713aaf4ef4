"""NSynth: single notes of 1,006 instruments, 4 s each.

Home: https://magenta.tensorflow.org/datasets/nsynth. Licence: CC BY 4.0. 305,979 notes, 340 h, 24 GB packed
WAV at 16 kHz.
Layout: `nsynth-{train,valid,test}/examples.json`, one object: note name -> pitch, velocity,
instrument_family_str, instrument_source_str, qualities_str …; audio in `nsynth-*/audio/{name}.wav`.
The folders are its splits; no instrument of train is in the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ijson

from preference_data.corpora.published.recording import BadCorpus, Content, Recording, missing, not_a_corpus
from preference_data.schema import Split

_SPLITS: dict[str, Split] = {"test": "test", "valid": "dev", "train": "train"}
_KEYS = ("pitch", "velocity", "instrument_str", "instrument_family_str", "instrument_source_str")


def read(folder: Path) -> Iterator[Recording]:
    """Every note."""
    there = [part for part in _SPLITS if (folder / f"nsynth-{part}").is_dir()]
    if not there:
        raise not_a_corpus(folder, "nsynth-{train,valid,test}/", "nsynth")
    for part in there:
        table = folder / f"nsynth-{part}" / "examples.json"
        for name, note in _notes(table):
            lacking = [key for key in _KEYS if key not in note] if isinstance(note, dict) else list(_KEYS)
            if lacking:
                raise BadCorpus(f"{table}: {name!r} has no {', '.join(lacking)}; fetch it again")
            yield _recording(part, name, note)


def _recording(part: str, name: str, note: dict[str, Any]) -> Recording:
    family = str(note["instrument_family_str"]).replace("_", " ")
    contents = [
        Content("instrument", family, text_language="en", benchmark="nsynth_instrument"),
        Content("note_pitch", str(note["pitch"]), text_language="en"),
        Content("note_velocity", str(note["velocity"]), text_language="en"),
    ]
    if qualities := [str(quality).replace("_", " ") for quality in note.get("qualities_str", [])]:
        contents.append(Content("note_qualities", ", ".join(qualities), text_language="en"))
    return Recording(
        f"nsynth-{part}/audio/{name}.wav",
        _SPLITS[part],
        f"nsynth_{note['instrument_source_str']}",
        tuple(contents),
    )


def _notes(path: Path) -> Iterator[tuple[str, Any]]:
    """Name and description of each note; read piece by piece, as the whole does not fit memory."""
    if not path.is_file():
        raise missing(path)
    try:
        with path.open("rb") as file:
            if next(ijson.basic_parse(file))[0] != "start_map":
                raise ijson.JSONError("it is something else")
            file.seek(0)
            yield from ijson.kvitems(file, "")
    except ijson.JSONError as error:
        problem = " ".join(str(error).split())
        raise BadCorpus(f"{path} is not a JSON object, or is cut off ({problem}); fetch it again") from error

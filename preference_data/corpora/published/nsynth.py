"""NSynth: single notes of 1,006 instruments, 4 s each.

Home: https://magenta.tensorflow.org/datasets/nsynth. Licence: CC BY 4.0. 305,979 notes, 340 h, 24 GB packed
WAV at 16 kHz.
Layout: `nsynth-{train,valid,test}/examples.json`, one object: note name -> pitch, velocity,
instrument_family_str, instrument_source_str, qualities_str …; audio in `nsynth-*/audio/{name}.wav`.
The folders are its splits; no instrument of train is in the others.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from preference_data.corpora.fetch import OnBytes, RemoteFile, fetch_parts
from preference_data.corpora.published.found import BadCorpus, Card, Content, Found, nothing_in
from preference_data.schema import Split

_SPLITS: dict[str, Split] = {"test": "test", "valid": "dev", "train": "train"}
_FILES = {
    part: [
        RemoteFile(
            f"http://download.magenta.tensorflow.org/datasets/nsynth/nsynth-{part}.jsonwav.tar.gz",
            f"nsynth-{part}.jsonwav.tar.gz",
            gb,
        )
    ]
    for part, gb in (("test", 1.0), ("valid", 2.0), ("train", 26.0))
}
_CHUNK = 1 << 20  # characters
_COMMA, _COLON = re.compile(r"[\s,]*"), re.compile(r"\s*:\s*")
_KEYS = ("pitch", "velocity", "instrument_str", "instrument_family_str", "instrument_source_str")

CARD = Card(
    "nsynth",
    "instrument, pitch, velocity, qualities of notes",
    340,
    24,
    "CC BY 4.0",
    "https://magenta.tensorflow.org/datasets/nsynth",
    "open",
    tuple(_FILES),
)


def download(folder: Path, parts: Sequence[str] | None = None, on_bytes: OnBytes | None = None) -> str:
    """Fetch and unpack it."""
    fetch_parts(folder, _FILES, parts, on_bytes)
    return ""


def prepare(folder: Path) -> Iterator[Found]:
    """Every note."""
    there = [part for part in _SPLITS if (folder / f"nsynth-{part}").is_dir()]
    if not there:
        raise nothing_in(folder, "nsynth-{train,valid,test}/", "nsynth")
    for part in there:
        table = folder / f"nsynth-{part}" / "examples.json"
        for name, note in entries(table):
            lacking = [key for key in _KEYS if key not in note] if isinstance(note, dict) else list(_KEYS)
            if lacking:
                raise BadCorpus(f"{table}: {name!r} has no {', '.join(lacking)}; fetch it again")
            yield _found(part, name, note)


def _found(part: str, name: str, note: dict[str, Any]) -> Found:
    family = str(note["instrument_family_str"]).replace("_", " ")
    contents = [
        Content("instrument", family, text_language="en", benchmark="nsynth_instrument"),
        Content("note_pitch", str(note["pitch"]), text_language="en"),
        Content("note_velocity", str(note["velocity"]), text_language="en"),
    ]
    if qualities := [str(one).replace("_", " ") for one in note.get("qualities_str", [])]:
        contents.append(Content("note_qualities", ", ".join(qualities), text_language="en"))
    return Found(
        f"nsynth-{part}/audio/{name}.wav",
        _SPLITS[part],
        f"nsynth_{note['instrument_source_str']}",
        tuple(contents),
    )


def entries(path: Path) -> Iterator[tuple[str, Any]]:
    """Key and value of each member of a JSON object, read piece by piece: the whole does not fit memory.

    Raises:
        BadCorpus: the file is missing or not one JSON object.
    """
    if not path.is_file():
        raise BadCorpus(f"{path} is missing: is this the folder that `align data download` filled?")
    decode = json.JSONDecoder().raw_decode
    text, opened = "", False
    with path.open(encoding="utf-8-sig") as file:
        while chunk := file.read(_CHUNK):
            text += chunk
            if not opened:
                opened, text = text.lstrip().startswith("{"), text.lstrip().removeprefix("{")
            at = 0
            while opened and (member := _member(decode, text, at)):
                key, value, at = member
                yield key, value
            text = text[at:]
    if not opened or text.strip() != "}":
        raise BadCorpus(f"{path} is not one JSON object, or is cut off: {text[:80]!r}; fetch it again")


def _member(decode: Callable[[str, int], tuple[Any, int]], text: str, at: int) -> tuple[str, Any, int] | None:
    """The member at or after `at`, and where it ends; None if the rest of it is not there yet."""
    try:
        begin = _COMMA.match(text, at)
        key, end = decode(text, begin.end() if begin else at)
        colon = _COLON.match(text, end)
        if colon is None or not isinstance(key, str):
            return None
        value, end = decode(text, colon.end())
    except ValueError:
        return None
    return key, value, end

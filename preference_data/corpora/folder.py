"""Your own recordings: a folder with audio files, `facts.csv` and `phrasebook.yaml`.

`facts.csv` has the columns `path` (relative to the folder), `speaker` (may be empty), `split` (optional),
and one per slot of the phrasebook, empty where a clip has no such thing; "," or ";" or tabs are between them.
Values of a yes/no slot are separated by "|". A row without a split goes to the split that holds its speaker
out, else to train, and every fifth of those, by chance, to preference.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import NamedTuple, cast

import numpy as np

from preference_data.audio import decode
from preference_data.audio.clip_files import BadAudio, resolve_inside
from preference_data.dataset.splits import SPLITS, HeldOut
from preference_data.schema import Facts, Split, stable_id
from preference_data.text_files import BadText, find_table, open_text
from preference_data.toy_world.clip_files import ClipWriter, PreparedClips
from preference_data.toy_world.phrasebook import Phrasebook

_OURS = ("path", "speaker", "split")
_PREFERENCE_SHARE = 0.2
_MOST_PROBLEMS = 20  # in an error


class BadFacts(ValueError):
    """`facts.csv` does not say what it should; every problem with line, column and value."""


class _Row(NamedTuple):
    """One usable line of `facts.csv`."""

    id: str
    path: str
    speaker: str | None
    split: Split
    facts: Facts


def prepare(
    out: Path,
    phrasebook: Phrasebook,
    recordings: Path,
    *,
    max_duration_s: float,
    held_out: HeldOut | None = None,
    seed: int = 0,
    on_progress: Callable[[int], object] | None = None,
) -> PreparedClips:
    """Convert every recording to a 16 kHz mono WAV below `out`.

    Args:
        out: where the audio goes.
        phrasebook: that of the folder.
        recordings: the folder.
        max_duration_s: longer recordings are refused.
        held_out: speakers of dev and of test, for rows without a split.
        seed: draws which training recordings are for preferences.
        on_progress: called with the number of recordings converted so far.

    Raises:
        BadFacts: the table is not right, all problems at once.
        ValueError: no recording is usable.
    """
    rows = {row.id: row for row in _read(recordings, phrasebook, held_out or {}, seed)}
    paths = [(row.id, row.path) for row in rows.values()]
    good, bad = decode.audit(partial(resolve_inside, recordings), paths, max_duration_s=max_duration_s)
    if not good:
        raise ValueError(
            f"none of the {len(rows)} recordings of {recordings / 'facts.csv'} can be used"
            + "".join(f"; {item.path!r}: {item.code}: {item.detail}" for item in bad[:3])
            + decode.advice_on_length(bad)
        )
    writer = ClipWriter(out, phrasebook, "folder")
    clips = []
    for number, row in enumerate((rows[clip_id] for clip_id in good), start=1):
        samples = decode.load(resolve_inside(recordings, row.path), max_duration_s=max_duration_s)
        clips.append(
            writer.write(row.id, row.split, samples, row.facts, speaker=row.speaker, source="recording")
        )
        if on_progress:
            on_progress(number)
    return PreparedClips(clips, bad, decode.odd(good, dict(paths)))


def _read(folder: Path, phrasebook: Phrasebook, held_out: HeldOut, seed: int) -> list[_Row]:
    table = folder / "facts.csv"
    if not table.is_file():
        raise BadFacts(f"{table} is missing: write one line per recording, with the columns path and speaker")
    rows: list[_Row] = []
    problems: list[str] = []
    try:
        with open_text(table) as file:
            lines, separator, skipped = find_table(file)
            reader = csv.DictReader(lines, delimiter=separator)
            problems += [
                f"{table}:{skipped + 1}: {text}" for text in _bad_columns(reader.fieldnames or [], phrasebook)
            ]
            for line in () if problems else reader:
                wrong: list[str] = []
                rows.append(_row(folder, line, phrasebook, held_out, seed, wrong))
                problems += [f"{table}:{skipped + reader.line_num}: {text}" for text in wrong]
    except (BadText, UnicodeDecodeError, csv.Error) as error:
        raise BadFacts(f"{table} is not a CSV file in UTF-8: {error}") from error
    problems += [f"{table}: {text}" for text in _bad_table(rows, held_out)]
    if problems:
        more = f"\n… and {len(problems) - _MOST_PROBLEMS} more" if len(problems) > _MOST_PROBLEMS else ""
        raise BadFacts("\n".join(problems[:_MOST_PROBLEMS]) + more)
    return rows


def _bad_columns(columns: Sequence[str], phrasebook: Phrasebook) -> Iterator[str]:
    for column in ("path", "speaker"):
        if column not in columns:
            yield f"column {column!r} is missing; there are {', '.join(map(repr, columns)) or 'none'}"
    known = [*_OURS, *phrasebook.slots]
    for column in columns:
        if columns.count(column) > 1:
            yield f"column {column!r} comes more than once"
        if column not in known:
            near = get_close_matches(column, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            yield f"column {column!r} is not a slot of the phrasebook; {hint}"


def _bad_table(rows: list[_Row], held_out: HeldOut) -> Iterator[str]:
    """Problems across lines."""
    before: set[str] = set()
    for row in rows:
        if row.path in before:
            yield f"column 'path': {row.path!r} comes more than once"
        before.add(row.path)
    speakers = {row.speaker for row in rows}
    for split, names in held_out.items():
        for name in names:
            if name not in speakers:
                yield f"column 'speaker': nobody is called {name!r}, who is held out for {split}"


def _row(
    folder: Path,
    line: dict[str, str],
    phrasebook: Phrasebook,
    held_out: HeldOut,
    seed: int,
    problems: list[str],
) -> _Row:
    """A line of the table; what is wrong with it is added to `problems`."""
    if None in line or None in line.values():
        problems.append(f"has {'more' if None in line else 'fewer'} cells than there are columns")
    cells = {column: (text or "").strip() for column, text in line.items() if column is not None}
    path, speaker = cells["path"], cells["speaker"] or None
    try:
        resolve_inside(folder, path)
    except BadAudio as error:
        problems.append(f"column 'path': {path!r} {error.detail}")
    draw = np.random.default_rng(int(stable_id(seed, path), 16)).random()
    split = _split(cells, speaker, held_out, draw, problems)
    facts = _facts(cells, phrasebook, problems)
    if not problems:
        try:
            phrasebook.description(facts), phrasebook.task_of(facts)
        except ValueError as error:
            problems.append(str(error))
    safe = re.sub(r"[^A-Za-z0-9_-]", "_", PurePosixPath(path).stem)[:80]
    return _Row(f"{safe}-{stable_id(path)}", path, speaker, split, facts)


def _split(
    cells: Mapping[str, str], speaker: str | None, held_out: HeldOut, draw: float, problems: list[str]
) -> Split:
    given = cells.get("split", "")
    held = [split for split, names in held_out.items() if speaker in names]
    if given and given not in SPLITS:
        problems.append(f"column 'split': {given!r} is not one of {', '.join(SPLITS)}")
    elif len({*held, *([given] if given else [])}) > 1:
        held_for = ", ".join(held)
        problems.append(f"column 'split': {given!r}, but speaker {speaker!r} is held out for {held_for}")
    learning = "preference" if draw < _PREFERENCE_SHARE else "train"
    return cast(Split, given or next(chain(held, [learning])))


def _facts(cells: Mapping[str, str], phrasebook: Phrasebook, problems: list[str]) -> Facts:
    facts: Facts = {}
    for name, slot in phrasebook.slots.items():
        text = cells.get(name, "")
        if not text:
            continue
        values = [part.strip() for part in text.split("|")] if slot.denial else [text]
        facts[name] = values if slot.denial else text
        for value in values:
            parts = value.split(" ") if slot.sequence else [value]
            if unknown := [part for part in parts if part not in slot.values]:
                known = ", ".join(slot.values)
                problems.append(
                    f"column {name!r}: {unknown[0]!r} is not a value of this slot; known: {known}"
                )
    return facts

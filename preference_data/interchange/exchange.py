"""Files of preference pairs, labels and chats in and out, of prompts in, with their audio.

Rows are `convert`'s business.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from preference_data import store
from preference_data.audio import decode
from preference_data.audio.clip_files import BadAudio, ClipFile, place, resolve_inside
from preference_data.audio.decode import AudioInfo
from preference_data.dataset.dataset import (
    QUARANTINE,
    TABLES,
    BadDataset,
    Dataset,
    RecordWriter,
    describe,
    is_described,
    replacing_dataset,
    with_paths,
)
from preference_data.dataset.dataset import read_rows as read_dataset_rows
from preference_data.dataset.licences import is_allowed
from preference_data.interchange import row_files
from preference_data.interchange.columns import BadRow
from preference_data.interchange.conversation import Form, RowForm
from preference_data.interchange.convert import Example, Kind, dataset_info, read_row, write_row
from preference_data.interchange.questions import QUESTION_FORM
from preference_data.interchange.row_files import EMBEDDED, path_below
from preference_data.schema import AudioClip, Axis, Chat, Label, PreferencePair, Prompt
from preference_data.text_files import BadText, numbered_lines, parse_json, read_json

_MAX_DURATION_S = 30.0  # what Qwen2-Audio hears
_MOST_REFUSED = 20  # rows whose reasons are kept
_IMPORTED = "imported"
"""Under this name the description of a dataset lists the files that were imported into it."""
KINDS: dict[type[Example], Kind] = {PreferencePair: "pairs", Label: "labels", Chat: "chats"}
_KINDS_READ: tuple[type[Example | Prompt], ...] = (*KINDS, Prompt)

_Infos = Mapping[str, AudioInfo | BadAudio]


class Exported(NamedTuple):
    """A file of rows that was written; `refused` says which records were left out, and why."""

    path: Path
    kind: Kind
    written: int
    refused: list[str]


class Imported(NamedTuple):
    """Counts of what a file added; `refused` are the first rows that were left out, with place and reason."""

    pairs: int
    labels: int
    desirable: int
    """Of the labels."""
    chats: int
    clips: int
    n_refused: int
    refused: list[str]
    questions: int


# ------------------------------------------------------------------- out


def write_rows(
    records: Path, form: Form, corpus: Path, out: Path, licences: Collection[str] = ()
) -> Exported:
    """Write a file of pairs, labels or chats as others read it: `out/{name}.jsonl` and `out/audio/`.

    The rows name their audio relative to `out`, which can move as a whole.

    Args:
        records: JSON lines of `PreferencePair`, of `Label` or of `Chat`.
        form: whose rows.
        corpus: folder that audio paths are relative to, or a dataset.
        out: also gets `dataset_info.json` for LLaMA-Factory.
        licences: records about clips with others, or with none, are left out; empty: none is.

    Raises:
        BadRow: none of the records can be written in this format, or its clips are not there.
        BadText: the file is not JSON lines in UTF-8.
    """
    kind, dataset, names = kind_of(records), Dataset(corpus), dict[str, str]()
    rows = out / f"{records.stem}.jsonl"
    out.mkdir(parents=True, exist_ok=True)
    written, refused = 0, list[str]()
    with store.replacing(rows) as file:
        for place_of, record, clips, _ in usable(records, kind, dataset, licences, refused):
            try:
                row = write_row(record, [_placed(clip, out, names) for clip in clips], form)
            except BadRow as error:
                refused.append(f"{place_of}: record {record.id!r}: {error}")
                continue
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            written += 1
        refuse_nothing(records, written, refused)
    if form == "llamafactory":
        entry = dataset_info(f"align_{records.stem}", rows.name, KINDS[kind])
        known = out / "dataset_info.json"
        entries = read_json(known) if known.exists() else {}
        store.write_text(known, json.dumps({**entries, **entry}, indent=2, ensure_ascii=False) + "\n")
    return Exported(rows, KINDS[kind], written, refused)


class Usable(NamedTuple):
    """A record that can be written: its place for messages, and its clips with their licences."""

    place: str
    record: Example
    clips: list[ClipFile]
    licences: list[str | None]


def usable(
    records: Path, kind: type[Example], dataset: Dataset, licences: Collection[str], refused: list[str]
) -> Iterator[Usable]:
    """Records whose clips are there and allowed; the others are named in `refused`."""
    licence_of = dataset.licences()
    for number, line in numbered_lines(records):
        try:
            record = store.parse(line, kind, f"{records}:{number}")
        except store.BadRecord as error:
            refused.append(str(error))
            continue
        own = [licence_of.get(path) for path in record.audios]
        try:
            for path, licence in zip(record.audios, own, strict=True):
                if not is_allowed(licence, licences):
                    state = f"has licence {licence!r}" if licence else "has no licence"
                    raise BadRow(f"clip {path!r} {state}; allowed: {', '.join(licences)}")
            clips = [_file_of(dataset, path) for path in record.audios]
        except BadRow as error:
            refused.append(f"{records}:{number}: record {record.id!r}: {error}")
            continue
        yield Usable(f"{records}:{number}", record, clips, own)


def refuse_nothing(records: Path, written: int, refused: Sequence[str]) -> None:
    """Refuse to leave a file without rows.

    Raises:
        BadRow: no record was written; with the first reasons.
    """
    if not written:
        reasons = "; ".join(refused[:3]) or "it is empty"
        raise BadRow(f"{records}: none of its {len(refused)} records can be written: {reasons}")


def _placed(clip: ClipFile, out: Path, names: dict[str, str]) -> str:
    """The path of a clip's copy below `out`, by its contents; `names` are those that are there already."""
    if (known := names.get(str(clip))) is None:
        digest = hashlib.sha256(bytes_of(clip)).hexdigest()
        known = names[str(clip)] = f"audio/{digest[:16]}{PurePosixPath(clip.name).suffix.lower()[:8]}"
        place(clip, out / known)
    return known


def bytes_of(clip: ClipFile) -> bytes:
    """All bytes of a clip's file."""
    return clip.read_bytes() if isinstance(clip, Path) else clip.read()


def kind_of(records: Path) -> type[Example]:
    """The kind of the records of a file, by the fields of the first."""
    number, line = next(numbered_lines(records), (1, b"{}"))
    fields = parse_json(line, f"{records}:{number}")
    for kind, field in ((PreferencePair, "rejected"), (Label, "label"), (Chat, "turns")):
        if isinstance(fields, dict) and field in fields:
            return kind
    raise BadRow(f"{records}:{number}: is no preference pair, label or chat; name pairs.jsonl or its like")


def _file_of(dataset: Dataset, path: str) -> ClipFile:
    try:
        file = dataset.find(path)
    except BadAudio as error:
        raise BadRow(str(error)) from error
    if isinstance(file, Path) and not file.is_file():
        raise BadRow(f"no file {file}; is {dataset.folder} the folder of its corpus?")
    return file


# ------------------------------------------------------------------- in


def read_rows(
    rows: Path,
    form: RowForm,
    out: Path,
    *,
    audio_root: Path,
    axis: Axis = "factuality",
    ignored: Collection[str] = (),
    question_form: str = QUESTION_FORM,
    on_checked: Callable[[int, int], object] | None = None,
) -> Imported:
    """Read others' rows into a dataset that a recipe can name as pairs, labels and corpus.

    Into a dataset that was imported before, the rows are added. `quarantine.jsonl` says which rows were left
    out and why. The audio is linked to `out/audio/` by its sha256, or copied where that cannot be.

    Args:
        rows: JSON lines, a JSON list, CSV, TSV or Parquet; see `row_files`.
        form: whose rows.
        out: the dataset; must not be there, or be an imported one.
        audio_root: what the rows' audio paths are relative to, and must lie in.
        axis: what pairs are about whose rows do not say.
        ignored: columns that are not to be read.
        question_form: how multiple-choice questions are put, see `questions.check_form`.
        on_checked: called with how many clips are checked, and of how many.

    Raises:
        BadRow: none of the rows can be used; with the first reasons.
        BadText: the file is not what its name says.
        BadDataset: `out` is there and is no imported dataset, or holds a record with the id of a row.
    """
    before = Dataset(out) if is_described(out) else None
    if before and _IMPORTED not in before.about:
        raise BadDataset(f"{out} holds a dataset that was not imported; name another folder")
    with replacing_dataset(out, audio_root) as partial:
        clips = _Clips(audio_root, partial / ".embedded")

        def records() -> Iterator[_Read]:
            for number, row in row_files.read_rows(rows, clips.embedded):
                try:
                    if isinstance(row, BadText):
                        raise BadRow(str(row))
                    record = read_row(row, form, axis, rows.name, ignored, question_form)
                    yield number, _renamed(record, lambda path: path_below(audio_root, path))
                except BadRow as error:
                    yield number, error
                except BadText as error:
                    yield number, BadRow(str(error))

        infos = _checked(records(), clips, on_checked)
        with RecordWriter(partial) as writer:
            writing = _Writing(writer, clips, infos, rows)
            if before:
                writing.copy(before)
            writing.write(records())
        shutil.rmtree(clips.embedded, ignore_errors=True)
        imported = writing.imported()
        if not imported.pairs + imported.labels + imported.chats + imported.questions:
            reasons = "; ".join(imported.refused[:3]) or "it is empty"
            raise BadRow(f"{rows}: none of its {imported.n_refused} rows can be used: {reasons}")
        describe(partial, _about(out.name, rows, writer, imported, before))
    return imported


def _about(
    folder: str, rows: Path, writer: RecordWriter, imported: Imported, before: Dataset | None
) -> dict[str, object]:
    about = before.about if before else {}
    name = re.sub(r"[^A-Za-z0-9_-]", "-", folder).strip("-_")[:64] or "imported"
    return {
        "name": about.get("name", name),
        "root": ".",
        "records": {file: n for file, n in writer.rows.items() if file != QUARANTINE},
        "quarantined": {"row": writer.rows[QUARANTINE]},
        _IMPORTED: [
            *about.get(_IMPORTED, []),
            {"file": rows.name, **{k: v for k, v in imported._asdict().items() if k != "refused"}},
        ],
    }


class _Clips(NamedTuple):
    """Where the clips are that rows name: below a root, or written out of the rows."""

    root: Path
    embedded: Path

    def find(self, path: str) -> Path:
        """The file of a clip.

        Raises:
            BadAudio: see `resolve_inside`.
        """
        if path.startswith(EMBEDDED):
            return resolve_inside(self.embedded, path.removeprefix(EMBEDDED))
        return resolve_inside(self.root, path)


_Read = tuple[int, "Example | Prompt | BadRow"]
"""Number of a row, and the record that it is."""


def _renamed(record: Example | Prompt, rename: Callable[[str], str]) -> Example | Prompt:
    return type(record).model_validate(with_paths(record.model_dump(), rename))


def _audios_of(record: Example | Prompt | BadRow) -> tuple[str, ...]:
    return () if isinstance(record, BadRow) else record.audios


def _checked(
    records: Iterator[_Read], clips: _Clips, on_checked: Callable[[int, int], object] | None
) -> dict[str, AudioInfo | BadAudio]:
    """Describe every file that the rows name."""
    paths = sorted({path for _, record in records for path in _audios_of(record)})
    infos: dict[str, AudioInfo | BadAudio] = {}
    outcomes = decode.examine(clips.find, paths, by="header", max_duration_s=_MAX_DURATION_S)
    for path, outcome in zip(paths, outcomes, strict=True):
        infos[path] = outcome
        if on_checked:
            on_checked(len(infos), len(paths))
    return infos


class _Writing:
    """Writes records whose clips are good, those clips, and the reasons why other rows were left out."""

    def __init__(self, writer: RecordWriter, clips: _Clips, infos: _Infos, rows: Path) -> None:
        self._writer, self._clips, self._infos, self._rows = writer, clips, infos, rows
        self._linked: set[str] = set()
        self._ids: set[tuple[type[Example | Prompt], str]] = set()
        self._before: Counter[str] = Counter()
        self._ids_before: frozenset[tuple[type[Example | Prompt], str]] = frozenset()
        self._desirable = 0
        self._refused: list[str] = []

    def copy(self, before: Dataset) -> None:
        """Take over the records and clips of a dataset."""
        for clip in before.records(AudioClip):
            self._link(before.folder / clip.path, clip)
        for kind in _KINDS_READ:
            for record in before.records(kind):
                self._ids.add((kind, record.id))
                self._writer.add(record)
        for row in read_dataset_rows(before.folder / QUARANTINE):
            self._writer.add_row(QUARANTINE, row)
        self._before, self._ids_before = Counter(self._writer.rows), frozenset(self._ids)

    def write(self, records: Iterator[_Read]) -> None:
        """Write what is good of these rows.

        Raises:
            BadDataset: a record has the id of one that was copied.
        """
        for number, record in records:
            if problem := self._problem(record):
                self._quarantine(number, problem, "".join(_audios_of(record)[:1]))
                continue
            assert not isinstance(record, BadRow)
            self._ids.add((type(record), record.id))
            clips = {path: _clip(path, self._infos[path], record) for path in record.audios}
            for path, clip in clips.items():
                self._link(self._clips.find(path), clip)
            self._writer.add(_renamed(record, {path: clip.path for path, clip in clips.items()}.__getitem__))
            self._desirable += isinstance(record, Label) and record.label

    def imported(self) -> Imported:
        """Counts of what was added to the records that were copied."""
        added = self._writer.rows - self._before
        pairs, labels, chats, questions = (added[f"{TABLES[kind]}.jsonl"] for kind in _KINDS_READ)
        clips, refused = added[f"{TABLES[AudioClip]}.jsonl"], added[QUARANTINE]
        return Imported(pairs, labels, self._desirable, chats, clips, refused, self._refused, questions)

    def _problem(self, record: Example | Prompt | BadRow) -> str:
        if isinstance(record, BadRow):
            return str(record)
        for path in record.audios:
            if isinstance(info := self._infos[path], BadAudio):
                is_within = path.startswith(EMBEDDED)
                return f"its own audio: {info.code}: {info.detail}" if is_within else f"audio {info}"
        key = (type(record), record.id)
        if key in self._ids_before:
            raise BadDataset(
                f"{self._rows} has a record {record.id!r}, which the dataset holds already. Nothing was "
                "changed; give the rows other ids, leave out those that are there, or name another folder"
            )
        return f"id {record.id!r} comes more than once; the first is taken" if key in self._ids else ""

    def _quarantine(self, number: int, problem: str, path: str) -> None:
        detail = f"{self._rows.name}:{number}: {problem}"
        self._writer.add_row(
            QUARANTINE, {"id": f"row-{number}", "path": path, "code": "bad_row", "detail": detail}
        )
        self._refused += [f"row {number}: {problem}"] if len(self._refused) < _MOST_REFUSED else []

    def _link(self, file: Path, clip: AudioClip) -> None:
        if clip.path in self._linked:
            return
        self._linked.add(clip.path)
        place(file, self._writer.folder / clip.path)
        self._writer.add(clip)


def _clip(path: str, info: AudioInfo | BadAudio, record: Example | Prompt) -> AudioClip:
    assert isinstance(info, AudioInfo), "rows with bad audio are left out before"
    return AudioClip(
        id=f"clip-{info.sha256[:16]}",
        path=f"audio/{info.sha256[:16]}{Path(path).suffix.lower()[:8]}",
        split="train" if isinstance(record, Chat) else "preference",
        duration_s=info.duration_s,
        sha256=info.sha256,
        source="imported",
    )

"""A dataset on disk: a folder of records that refer to audio where it lies.

dataset.json      name, root (audio paths are relative to it), licence, counts, digest; of a mixture its parts
clips.jsonl       AudioClip       every usable recording, all splits
pretrain.jsonl    TaskExample     of train: what the publisher says about a recording, one task each
sft.jsonl         Chat            of train: its questions and answers
prompts.jsonl     Prompt          of preference: questions to be answered and judged, with any earlier turns
pairs.jsonl       PreferencePair  only where pairs were imported
labels.jsonl      Label           only where unpaired labels were imported
dev/, test/recognition.jsonl      held-out rows {audio, prompt, gt, source} as the evaluation reads them, and
                                  languages and question where the task needs them
dev/Chat/, test/Chat/             held-out questions with their audio in AIR-Bench's layout, if there are any
quarantine.jsonl                  recordings that were left out, or (bad_example) something said about one
                                  that cannot be put to a model: id, path, code, detail
warnings.jsonl                    odd recordings that were not left out, likewise; only if there are any

Any of the tables of records may be Parquet instead. The rows of a mixture stand part after part in every
table, the part's name before ids and paths, and its dataset.json says whose they are:

    {"temperature": 2.0, "parts": [{"name": "librispeech", "root": "/data/librispeech", "share": null,
                                    "rows": {"clips": 281241, "pretrain": 281241, "sft": 0, ...}}, ...]}
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Generic, NamedTuple, Self, TextIO, TypeVar

from preference_data import store, text_files
from preference_data.audio.clip_files import BadAudio, ClipFile, find_below
from preference_data.dataset.manifest import Manifest, Selection, open_manifest
from preference_data.dataset.mixing import mixing_shares
from preference_data.dataset.splits import HELD_OUT
from preference_data.schema import AudioClip, Chat, Label, PreferencePair, Prompt, Record, TaskExample
from preference_data.text_files import BadText

R = TypeVar("R", bound=Record)
Row = dict[str, Any]

DESCRIPTION = "dataset.json"
_FORMER_NAMES = ("source.json", "sources.json")
"""Names that the description had; datasets that have it under such a name are read all the same."""
TABLES: dict[type[Record], str] = {
    AudioClip: "clips",
    TaskExample: "pretrain",
    Chat: "sft",
    Prompt: "prompts",
    PreferencePair: "pairs",
    Label: "labels",
}
QUARANTINE, WARNINGS = "quarantine.jsonl", "warnings.jsonl"
RECOGNITION = {split: f"{split}/recognition.jsonl" for split in HELD_OUT}
EVALUATION_SETS = tuple(f"{split}/Chat/" for split in HELD_OUT)
"""Where evaluation sets lie in a dataset's folder; paths of other clips do not begin so."""
RECORD_FILES = (
    *(f"{TABLES[kind]}.jsonl" for kind in (AudioClip, TaskExample, Chat, Prompt)),
    *RECOGNITION.values(),
    QUARANTINE,
)
"""Files that every dataset has, empty or not."""


class BadDataset(ValueError):
    """A folder is not a dataset, or is in the way of one; says what to do."""


class Part(NamedTuple, Generic[R]):
    """The records of one dataset of a mixture, and the share of the draws that they get."""

    name: str
    records: Sequence[R]
    share: float


class Dataset:
    """Opens a dataset: its description, its tables, and the audio that its records name."""

    def __init__(self, folder: Path, about: Row | None = None) -> None:
        """Read the description of `folder`, or take `about` for it.

        A folder without a description is the root of its clips' paths.

        Raises:
            BadDataset: the description is not a JSON object.
        """
        self.folder = folder
        self.about = _description(folder) if about is None else about
        self._parts: list[Row] = self.about.get("parts") or self.about.get("sources") or []
        self._roots = {part["name"]: folder / part["root"] for part in self._parts}
        self._root = folder / self.about.get("root", ".")

    def find(self, path: str) -> ClipFile:
        """Where the bytes of the clip are that a record names by `path`.

        Clips of an evaluation set in AIR-Bench's layout lie in the folder itself, wherever its root is.

        Raises:
            BadAudio: see `clip_files.find_below`; `bad_path` where it names no part of a mixture.
        """
        if not self._parts:
            return find_below(self.folder if path.startswith(EVALUATION_SETS) else self._root, path)
        name, _, inner = path.partition("/")
        if name not in self._roots:
            known = ", ".join(sorted(self._roots))
            raise BadAudio(path[:255], "bad_path", f"names no dataset of the mixture; known: {known}")
        return find_below(self._roots[name], inner)

    def licences(self) -> dict[str, str | None]:
        """The licence of every clip by its path: its own, else that of the dataset."""
        of_all = self.about.get("licence")
        return {clip.path: clip.licence or of_all for clip in self.records(AudioClip)}

    def path_of(self, kind: type[Record]) -> Path | None:
        """The file of the records of a kind, if there is one.

        Raises:
            BadDataset: it is there twice.
        """
        name = TABLES[kind]
        paths = [self.folder / f"{name}{ending}" for ending in (".jsonl", ".parquet")]
        there = [path for path in paths if path.exists()]
        if len(there) > 1:
            raise BadDataset(f"{self.folder} holds both {there[0].name} and {there[1].name}; remove one")
        return there[0] if there else None

    def records(self, kind: type[R]) -> Sequence[R]:
        """All records of a kind, if there are any."""
        path = self.path_of(kind)
        return open_manifest(path, kind) if path else ()

    def table(self, kind: type[R]) -> Manifest[R]:
        """All records of a kind.

        Raises:
            BadDataset: there are none.
        """
        if not self.folder.is_dir():
            raise BadDataset(f"there is no folder {self.folder}")
        path = self.path_of(kind)
        records = open_manifest(path, kind) if path else None
        if not records:
            raise BadDataset(
                f"{self.folder} has no rows in {TABLES[kind]}.jsonl: nothing of this kind to train on"
            )
        return records

    def parts(self, kind: type[R]) -> list[Part[R]]:
        """The records of a kind by dataset, each with its share of the draws; shares sum to 1.

        Raises:
            BadDataset: there are none, or another number than the description says.
        """
        records = self.table(kind)
        if not self._parts:
            return [Part("", records, 1.0)]
        sizes = [part["rows"][TABLES[kind]] for part in self._parts]
        if sum(sizes) != len(records):
            raise BadDataset(
                f"{records.path} has {len(records)} rows, {self.folder / DESCRIPTION} says {sum(sizes)}; "
                "make the corpus again"
            )
        shares = mixing_shares(sizes, [part["share"] for part in self._parts], self.about["temperature"])
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        return [
            Part(part["name"], Selection(records, range(start, start + size)), share)
            for part, start, size, share in zip(self._parts, starts, sizes, shares, strict=True)
            if size
        ]

    def digest(self) -> str:
        """Hex sha256 over the contents of the record files that are there."""
        digest = hashlib.sha256()
        for name in (*RECORD_FILES, *(f"{TABLES[kind]}.jsonl" for kind in (PreferencePair, Label))):
            if (self.folder / name).is_file():
                with (self.folder / name).open("rb") as file:
                    digest.update(f"{name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
        return digest.hexdigest()


def is_described(folder: Path) -> bool:
    """Whether a folder says of itself that it is a dataset."""
    return any((folder / name).is_file() for name in (DESCRIPTION, *_FORMER_NAMES))


def _description(folder: Path) -> Row:
    path = next((p for name in (DESCRIPTION, *_FORMER_NAMES) if (p := folder / name).is_file()), None)
    if path is None:
        return {}
    try:
        about = text_files.read_json(path)
    except BadText as error:
        raise BadDataset(f"{error}; prepare the dataset again") from error
    if not isinstance(about, dict):
        raise BadDataset(f"{path} holds a {type(about).__name__}, not an object; prepare the dataset again")
    return about


def describe(folder: Path, about: Mapping[str, Any]) -> Row:
    """Write the description of a dataset whose records are in place; returns it with their digest."""
    whole = {**about, "digest": Dataset(folder, {}).digest()}
    store.write_text(folder / DESCRIPTION, json.dumps(whole, indent=2, ensure_ascii=False) + "\n")
    return whole


class RecordWriter(ExitStack):
    """Writes the records of a dataset as a stream, in a `with` block; every file is whole or absent."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.rows: Counter[str] = Counter()
        """Rows written so far, per file."""
        self._files: dict[str, TextIO] = {}

    def __enter__(self) -> Self:
        for name in RECORD_FILES:
            self._file(name)
        return self

    def add(self, record: Record) -> None:
        """Write a record to the table of its kind."""
        self._write(f"{TABLES[type(record)]}.jsonl", record.model_dump_json())

    def add_row(self, name: str, row: Mapping[str, Any]) -> None:
        """Write a row to a file whose rows are not records."""
        self._write(name, json.dumps(row, ensure_ascii=False))

    def _write(self, name: str, line: str) -> None:
        self._file(name).write(line + "\n")
        self.rows[name] += 1

    def _file(self, name: str) -> TextIO:
        if name not in self._files:
            self._files[name] = self.enter_context(store.replacing(self.folder / name))
        return self._files[name]


@contextmanager
def replacing_dataset(out: Path, audio: Path) -> Iterator[Path]:
    """A hidden folder beside `out` that takes its place at the end, and vanishes after an error.

    Raises:
        BadDataset: `out` is something else than a dataset, or holds the `audio` that records will refer to.
    """
    if audio.resolve().is_relative_to(out.resolve()):
        raise BadDataset(f"{out} holds the recordings ({audio}); name another folder for the records")
    if out.exists() and not (out.is_dir() and (is_described(out) or not any(out.iterdir()))):
        raise BadDataset(f"{out} is there and is not a dataset (it has no {DESCRIPTION}); name another one")
    partial, replaced = out.with_name(f".partial-{out.name}"), out.with_name(f".replaced-{out.name}")
    if replaced.exists() and not out.exists():  # killed between the two renames below
        replaced.rename(out)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        shutil.rmtree(replaced, ignore_errors=True)
        if out.exists():
            out.rename(replaced)
        partial.rename(out)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def evaluation_item(prompt: Prompt, file_name: str, dataset_name: str) -> dict[str, str]:
    """A question about a clip as AIR-Bench's Chat_meta.json lists it, in its field names."""
    return {
        "path": file_name,
        "question": prompt.question,
        "answer_gt": prompt.answer_gt,
        "meta_info": prompt.meta_info,
        "task_name": prompt.task_name,
        "dataset_name": dataset_name,
        "uniq_id": prompt.id,
    }


def with_paths(row: Mapping[str, Any], rename: Callable[[str], str]) -> Row:
    """The row of a record, or of a held-out recording, with other paths for its clips."""
    renamed = dict(row)
    for key in ("path", "audio"):
        if row.get(key) is not None:
            renamed[key] = rename(row[key])
    if "audios" in row:
        renamed["audios"] = [rename(path) for path in row["audios"]]
    for key in ("turns", "history"):
        if key in row:
            renamed[key] = [with_paths(turn, rename) for turn in row[key]]
    return renamed


def read_rows(path: Path, *keys: str) -> Iterator[Row]:
    """Rows of a file that are not records, with text under `keys`; none if there is no such file.

    Raises:
        BadDataset: a line is not such a row.
    """
    try:
        for place, row in text_files.json_lines(path) if path.exists() else ():
            if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in keys):
                raise BadDataset(f"{place}: has no text under {', '.join(keys)}")
            yield row
    except BadText as error:
        raise BadDataset(str(error)) from error

"""Files of benchmark rows as people bring them: JSON lines, one JSON list, or Parquet."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from preference_data import text_files
from preference_data.interchange import columns, row_files
from preference_data.interchange.convert import read_row
from preference_data.interchange.row_files import EMBEDDED
from preference_data.schema import Prompt
from preference_data.text_files import BadText

T = TypeVar("T")


class BadBenchmark(ValueError):
    """A benchmark's folder, rows or answers are not as they should be; names file, line and key."""


class BadRow(BadBenchmark):
    """One row cannot be used; `reason` is a code, the message names file, line and key."""

    def __init__(self, where: str, reason: str, detail: str) -> None:
        super().__init__(f"{where}: {detail}")
        self.reason = reason


class OddRows(NamedTuple):
    """Rows that were left out for the same reason."""

    n: int
    first: str
    """Where the first is, and what is wrong with it."""


def readable(path: Path, read: Callable[[Any, str], T]) -> tuple[list[T], dict[str, OddRows]]:
    """The rows of a file that can be read, and the others by reason: a bad row costs no other.

    Args:
        path: JSON lines, one JSON list, or Parquet.
        read: what to make of a row and its place; raises `BadRow`.

    Raises:
        BadBenchmark: the file is missing, is not JSON, or none of its rows can be read.
    """
    rows: list[T] = []
    odd: dict[str, OddRows] = {}
    for where, row in _table_rows(path) if path.suffix == ".parquet" else json_rows(path):
        try:
            rows.append(read(row, where))
        except BadRow as error:
            n, first = odd.get(error.reason, OddRows(0, str(error)))
            odd[error.reason] = OddRows(n + 1, first)
    if not rows:
        first = next(iter(odd.values())).first if odd else "it holds none"
        raise BadBenchmark(f"{path}: no row can be scored; {first}")
    return rows, odd


def response_of(row: dict[str, Any], where: str, keys: Sequence[str] = ("response",)) -> str:
    """The policy's response under the first of the keys that is there; null is the empty answer.

    Raises:
        BadRow: no key is there, or its value is not text.
    """
    key = next((key for key in keys if key in row), None)
    if key is None:
        raise BadRow(where, "missing_key", f"no {' or '.join(keys)}")
    response = row[key]
    if response is not None and not isinstance(response, str):
        detail = f"response is a {type(response).__name__}, not text: {str(response)[:80]!r}"
        raise BadRow(where, "response_not_text", detail)
    return response or ""


def json_lines(path: Path, holds: str = "answers") -> Iterator[tuple[str, Any]]:
    """The rows of a JSON-lines file, each with its place for messages.

    Raises:
        BadBenchmark: the file is missing, a line is not JSON, or there is none.
    """
    if not path.exists():
        raise BadBenchmark(f"{path} is missing: name a file of {holds}, one JSON object a line")
    is_empty = True
    try:
        for row in text_files.json_lines(path):
            is_empty = False
            yield row
    except BadText as error:
        raise BadBenchmark(str(error)) from error
    if is_empty:
        raise BadBenchmark(f"{path}: holds no {holds}")


def json_list(path: Path) -> list[Any]:
    """The items of a JSON file that holds one list.

    Raises:
        BadBenchmark: the file is not JSON or not a list.
    """
    try:
        rows = text_files.read_json(path)
    except BadText as error:
        raise BadBenchmark(f"{error}; download it again") from error
    if not isinstance(rows, list):
        raise BadBenchmark(f"{path}: holds a {type(rows).__name__}, not a list")
    return rows


def json_rows(path: Path) -> list[tuple[str, Any]]:
    """The rows of a file that is either a JSON list or JSON lines, each with its place for messages."""
    try:
        first = next(text_files.numbered_lines(path), (0, b"")) if path.exists() else (0, b"")
    except BadText as error:
        raise BadBenchmark(str(error)) from error
    if first[1].lstrip().startswith(b"["):
        return [(f"{path}: row {number}", row) for number, row in enumerate(json_list(path), 1)]
    return list(json_lines(path))


def _table_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """The rows of a Parquet file. Clips that lie in it are written into a folder beside it, once.

    Raises:
        BadBenchmark: it cannot be read, or the folder not be written.
    """
    folder = path.with_name(f"{path.stem}_clips")
    try:
        for number, row in row_files.read_rows(path, folder):
            values = {
                name: f"{folder.name}/{value.removeprefix(EMBEDDED)}"
                if isinstance(value, str) and value.startswith(EMBEDDED)
                else value
                for name, value in row.items()
            }
            yield f"{path}: row {number}", values
    except BadText as error:
        raise BadBenchmark(str(error)) from error
    except OSError as error:
        raise BadBenchmark(f"{path}: {error}; {folder} must be writable for its clips") from error


def text_fields(row: Any, keys: Iterable[str], where: str) -> dict[str, str]:
    """The named fields of a row as text.

    Raises:
        BadRow: the row is not an object, or a key is absent or null.
    """
    return {key: str(value) for key, value in _fields(row, keys, where, object).items()}


def require_text(row: Any, keys: Iterable[str], where: str) -> dict[str, str]:
    """The named fields of a row, which must be text already.

    Raises:
        BadRow: the row is not an object, or a key is absent or not text.
    """
    return _fields(row, keys, where, str)


def _fields(row: Any, keys: Iterable[str], where: str, kind: type) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise BadRow(where, "not_an_object", f"is a {type(row).__name__}, not an object")
    if wrong := [key for key in keys if row.get(key) is None or not isinstance(row[key], kind)]:
        raise BadRow(where, "missing_key", f"no {'text under ' if kind is str else ''}{', '.join(wrong)}")
    return {key: row[key] for key in keys}


class Utterance(NamedTuple):
    """One clip (path relative to the corpus), its prompt, the reference text, its group.

    Languages and question are ours, for prompts that state them: see `TaskExample`.
    """

    audio: str
    prompt: str
    gt: str
    source: str
    audio_language: str | None = None
    text_language: str | None = None
    question: str | None = None
    choices: tuple[str, ...] = ()
    """Of a multiple-choice question, which is the `prompt`."""
    id: str = ""
    """Of a multiple-choice question."""
    categories: tuple[tuple[str, str], ...] = ()
    """What a multiple-choice question counts towards: columns of its file, and their values."""


_SAID_IN_PROMPTS = ("audio_language", "text_language", "question")


def read_utterances(path: Path) -> list[Utterance]:
    """Rows to recognise, as the Qwen2-Audio evaluation has them: JSON lines {audio, prompt, gt, source}.

    Raises:
        BadBenchmark: naming file, line and key.
    """
    return [_utterance(row, where) for where, row in json_lines(path, "rows")]


def held_out_utterances(path: Path) -> list[Utterance]:
    """The rows of a corpus' own file; none where it holds nothing out."""
    return read_utterances(path) if path.exists() and path.stat().st_size else []


def _utterance(row: Any, where: str) -> Utterance:
    ours = [key for key in _SAID_IN_PROMPTS if isinstance(row, dict) and row.get(key) is not None]
    needed = [*(key for key in Utterance._fields if key not in Utterance._field_defaults), *ours]
    texts: dict[str, Any] = dict(require_text(row, needed, where))
    return Utterance(**texts)


def read_question(row: Any, where: str, source: str) -> Utterance:
    """A multiple-choice question about a clip, in a layout that `align data import --format choice` reads.

    Raises:
        BadRow: it is none, or is about several clips.
    """
    try:
        prompt = read_row(row, "choice", ignored=("response",))
    except columns.BadRow as error:
        raise BadRow(where, "no_question", str(error)) from error
    if not isinstance(prompt, Prompt) or len(prompt.audios) != 1:
        raise BadRow(where, "several_clips", f"is about {len(prompt.audios)} clips, not one")
    return Utterance(
        prompt.audios[0],
        prompt.question,
        prompt.answer_gt,
        source,
        choices=prompt.choices,
        id=prompt.id,
        categories=(("task", prompt.task_name),),
    )

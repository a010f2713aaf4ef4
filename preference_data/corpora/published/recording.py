"""A recording as its publisher describes it, and how adapters read their publishers' tables."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from preference_data.schema import Split, Word
from preference_data.text_files import BadText, find_table, numbered_lines, open_text

DESCRIBE_SOUND = "Describe what can be heard in this recording."
_LONGEST_CELL = 1_000_000  # characters


class BadCorpus(ValueError):
    """A corpus is unknown, or its folder is not laid out as its publisher does."""


class Content(NamedTuple):
    """Something that is known about a recording: a `TaskExample` without its audio."""

    task: str
    """A key of the pre-training tasks."""
    text: str
    audio_language: str | None = None
    text_language: str | None = None
    question: str | None = None
    words: tuple[Word, ...] = ()
    benchmark: str | None = None
    """The published benchmark that it is a row of, if its recording is held out."""


class QuestionAnswer(NamedTuple):
    """A question about a recording and its right answer."""

    question: str
    answer: str


class Recording(NamedTuple):
    """A recording: its path relative to the corpus folder, and all that its publisher says about it."""

    path: str
    split: Split
    source: str
    """Which part of the corpus it is of: results are also reported per source."""
    contents: tuple[Content, ...]
    questions: tuple[QuestionAnswer, ...] = ()
    """For chats (train) and prompts (preference)."""
    speaker: str | None = None
    """None also where the publisher's own splits share their speakers."""


def rows(path: Path, columns: Sequence[str], *, escape: str | None = None) -> Iterator[dict[str, str]]:
    """Rows of a table by column name, blanks around cells removed; reads as it goes.

    Cells of a .tsv file are separated by tabs and not quoted; `escape` is the mark that escapes one in them.

    Raises:
        BadCorpus: the file is missing, is not such a table, lacks a column, or a line has too few cells.
    """
    if not path.is_file():
        raise missing(path)
    csv.field_size_limit(_LONGEST_CELL)
    try:
        with open_text(path) as file:
            skipped = 0
            if path.suffix == ".tsv":
                table = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE, escapechar=escape)
            else:
                cells, separator, skipped = find_table(file)
                table = csv.DictReader(cells, delimiter=separator)
            there = [name.strip() for name in table.fieldnames or ()]
            if lacking := [name for name in columns if name not in there]:
                raise BadCorpus(
                    f"{path}: no column {', '.join(lacking)}; there are {', '.join(there) or 'none'}. "
                    "Is it another version of the corpus?"
                )
            table.fieldnames = there
            for row in table:
                if any(row[name] is None for name in columns):
                    raise BadCorpus(
                        f"{path}:{skipped + table.line_num}: has fewer cells than columns; fetch it again"
                    )
                yield {name: (cell or "").strip() for name, cell in row.items() if isinstance(name, str)}
    except (BadText, UnicodeDecodeError, csv.Error) as error:
        raise BadCorpus(f"{path} is not such a table: {error}; fetch it again") from error


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines of a text file that are not blank.

    Raises:
        BadCorpus: the file is missing or not UTF-8.
    """
    if not path.is_file():
        raise missing(path)
    try:
        for number, line in numbered_lines(path):
            yield number, line.decode("utf-8")
    except (BadText, UnicodeDecodeError) as error:
        raise BadCorpus(f"{path} is not text in UTF-8: {error}; fetch it again") from error


def captioned(path: str, split: Split, corpus: str, captions: Sequence[str]) -> Recording:
    """A sound with its captions, of a corpus with a captioning task of its own; chats ask for the first."""
    contents = [Content(f"caption_{corpus}", text, text_language="en", benchmark=corpus) for text in captions]
    questions = (QuestionAnswer(DESCRIBE_SOUND, captions[0]),)
    return Recording(path, split, corpus, tuple(contents), questions)


def grouped(table: Iterable[Mapping[str, str]], *key: str) -> dict[tuple[str, ...], list[Mapping[str, str]]]:
    """Rows by the value of `key`, in the order in which each value comes first."""
    groups: dict[tuple[str, ...], list[Mapping[str, str]]] = {}
    for row in table:
        groups.setdefault(tuple(row[name] for name in key), []).append(row)
    return groups


def language(locale: str) -> str:
    """ISO code of a Common Voice locale: "zh-CN" is zh, "zh-HK" is Cantonese (yue)."""
    return {"zh-HK": "yue"}.get(locale, locale.split("-")[0])


def missing(path: Path) -> BadCorpus:
    """The error for a file of the corpus that is not there."""
    return BadCorpus(f"{path} is missing: is this the folder that `align data download` filled?")


def tables(
    folder: Path, pattern: str, splits: Mapping[str, Split], corpus: str
) -> list[tuple[str, Split, Path]]:
    """Part, split and path of each table that is there, of a corpus with a table for each part.

    Raises:
        BadCorpus: none is there.
    """
    paths = [(part, split, folder / pattern.format(part)) for part, split in splits.items()]
    there = [table for table in paths if table[2].is_file()]
    if not there:
        raise not_a_corpus(folder, pattern.format(f"{{{','.join(splits)}}}"), corpus)
    return there


def not_a_corpus(folder: Path, wanted: str, name: str) -> BadCorpus:
    """The error for a folder that holds nothing of the corpus."""
    return BadCorpus(
        f"{folder} holds no {wanted}: name the folder that holds it, or fetch it with "
        f"`align data download {name} DIR`"
    )

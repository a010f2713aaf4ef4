r"""Text files as people bring them and as we write them: UTF-8, with or without a byte-order mark.

A line ends with "\n" or "\r\n" and nothing else: U+2028, U+0085 or a form feed within a line is text, where
`str.splitlines` would cut it. Blank lines are skipped.
"""

from __future__ import annotations

import gzip
import json
import re
import shlex
from codecs import BOM_UTF8
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, TextIO, cast

_HEAD = 4096
_BINARY = (  # first bytes, and what to do about a file that begins with them
    (b"\x1f\x8b", "is compressed; unpack it: gunzip -c {} > FILE"),
    (b"PK\x03\x04", "is a zip archive or a spreadsheet; unpack it, or save it as CSV in UTF-8"),
    (b"PAR1", "is a Parquet file; give it a name that ends with .parquet"),
)
_NUL_SHARE = 1 / 8
"""Text in UTF-16 or UTF-32 without a byte-order mark begins with at least this share of NUL bytes."""


class BadText(ValueError):
    """A file is not text in UTF-8, or a text is not JSON; says where, and how to convert a file."""


def open_lines(path: Path) -> BinaryIO:
    """The file for reading its lines as bytes, after a byte-order mark; that of compressed JSON unpacked.

    Raises:
        BadText: it is in UTF-16 or UTF-32, or no text but an archive or a Parquet file.
    """
    file = cast(BinaryIO, gzip.open(path)) if is_packed(path) else path.open("rb")
    head = file.read(_HEAD)
    if advice := [advice for mark, advice in _BINARY if head.startswith(mark)]:
        file.close()
        raise BadText(f"{path} {advice[0].format(shlex.quote(str(path)))}")
    encoding = json.detect_encoding(head)
    if encoding.startswith(("utf-16", "utf-32")) and (
        encoding in ("utf-16", "utf-32") or head.count(0) >= _NUL_SHARE * len(head)
    ):
        file.close()
        name = encoding.upper().replace("-LE", "LE").replace("-BE", "BE")  # as iconv has it
        target = path.with_name(f"{path.stem}.utf8{path.suffix}")
        raise BadText(
            f"{path} is text in {name}, not in UTF-8; convert it: "
            f"iconv -f {name} -t UTF-8 {shlex.quote(str(path))} > {shlex.quote(str(target))}"
        )
    file.seek(len(BOM_UTF8) if head.startswith(BOM_UTF8) else 0)
    return file


def is_packed(path: Path) -> bool:
    """Whether a file holds compressed JSON by its name; its lines can be read, but not in any order."""
    return path.name.lower().endswith((".jsonl.gz", ".json.gz"))


def open_text(path: Path, errors: Literal["strict", "surrogateescape"] = "strict") -> TextIO:
    """The file for reading its text, such as a table; line ends stay as they are.

    Raises:
        BadText: it is in UTF-16 or UTF-32.
    """
    open_lines(path).close()
    return path.open(encoding="utf-8-sig", errors=errors, newline="\n")


class Table(NamedTuple):
    """A text file of cells: its lines from the header on, what separates cells, and how many lines before."""

    lines: Iterator[str]
    separator: str
    skipped: int


def find_table(file: TextIO) -> Table:
    """The table in a file: cells are separated by "," unless its header has more ";", tabs or "|".

    Blank lines before the header are skipped, and so is Excel's `sep=;`, which says what separates.
    """
    for skipped, header in enumerate(file):
        if said := re.fullmatch(r'"?sep=(.)"?\s*', header, re.IGNORECASE):
            return Table(file, said[1], skipped + 1)
        if header.strip():
            return Table(chain([header], file), max(",;\t|", key=header.count), skipped)
    return Table(iter(()), ",", 0)


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Every line that is not blank, without its end, by its number from 1.

    Raises:
        BadText: the file is in UTF-16 or UTF-32.
    """
    with open_lines(path) as file:
        for number, line in enumerate(file, start=1):
            if text := content(line):
                yield number, text


def content(line: bytes) -> bytes:
    """A line without its end; empty if it is blank. A byte-order mark is of a file that was put before it."""
    text = line.removeprefix(BOM_UTF8).rstrip(b"\r\n")
    return b"" if text.isspace() else text


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """The value of every line, each with its place for messages.

    Raises:
        BadText: see `numbered_lines` and `parse_json`.
    """
    for number, line in numbered_lines(path):
        yield (place := f"{path}:{number}"), parse_json(line, place)


def read_json(path: Path) -> Any:
    """The value of a file that holds one.

    Raises:
        BadText: the file is in UTF-16 or UTF-32; see `parse_json`.
    """
    with open_lines(path) as file:
        return parse_json(file.read(), str(path))


def parse_json(text: bytes, place: str = "") -> Any:
    """The value of a JSON text.

    Raises:
        BadText: see `load_json` and `refuse_half_pairs`; after `place`, if given.
    """
    value = load_json(text, place)
    if b"\\ud" in text.lower():
        refuse_half_pairs(value, place)
    return value


def load_json(text: bytes, place: str = "") -> Any:
    """The value of a JSON text whose strings may still hold halves of surrogate pairs.

    Raises:
        BadText: it is not UTF-8 or not JSON, or a key comes twice in an object.
    """
    where = place and f"{place}: "
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise BadText(
            f"{where}is not UTF-8 (byte 0x{text[error.start]:02x}); convert the file from its encoding, "
            "e.g. iconv -f ISO-8859-1 -t UTF-8 (Chinese: -f GB18030)"
        ) from error
    except RecursionError as error:
        raise BadText(f"{where}is nested too deeply") from error
    except ValueError as error:
        raise BadText(f"{where}is not JSON ({error})") from error


def refuse_half_pairs(value: Any, place: str = "") -> None:
    """Refuse a JSON value with half of a surrogate pair in a string, which no file in UTF-8 can hold.

    Raises:
        BadText: it has one; or it is nested too deeply to look.
    """
    where = place and f"{place}: "
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise BadText(f"{where}holds {half}, half of a surrogate pair and no character") from error
    except RecursionError as error:
        raise BadText(f"{where}is nested too deeply") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} comes twice in an object")
    return value

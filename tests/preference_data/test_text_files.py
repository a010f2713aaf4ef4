"""What a text file is: encodings, line ends and blank lines, and the one reader of JSON lines."""

import json
import subprocess

import pytest

from align.evaluation.benchmarks import rows as benchmark_rows
from align.evaluation.benchmarks.rows import BadBenchmark
from preference_data import store
from preference_data.dataset.dataset import BadDataset, read_rows
from preference_data.dataset.manifest import open_manifest
from preference_data.schema import TaskExample
from preference_data.text_files import BadText, json_lines, numbered_lines, open_text, parse_json

INSIDE = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\x1dh\x1ei\rj"
"""Characters at which `str.splitlines` cuts."""
ROW = {"id": "x", "audios": [], "task": "transcribe", "text": INSIDE}


def text_of(*rows: object) -> str:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)


@pytest.mark.parametrize(
    "data",
    [
        text_of(ROW, ROW).encode(),
        b"\xef\xbb\xbf" + text_of(ROW, ROW).encode(),
        f"\n{text_of(ROW)}\n \t\n\n{text_of(ROW)}\n\n".encode(),
        f"{text_of(ROW)}\r\n\r\n{text_of(ROW)}\r\n".encode(),
        b"\xef\xbb\xbf" + text_of(ROW).encode() + b"\n\xef\xbb\xbf" + text_of(ROW).encode(),  # cat a b
        f"  {text_of(ROW)}  \n\t{text_of(ROW)}".encode(),
    ],
)
def test_every_reader_of_lines_reads_the_same_rows(tmp_path, data):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(data)
    record = TaskExample.model_validate(ROW)
    assert [row for _, row in json_lines(path)] == [ROW, ROW]
    assert store.read(path, TaskExample) == [record, record]
    manifest = open_manifest(path, TaskExample)
    assert [manifest[1], manifest[0], *manifest] == [record] * 4
    assert list(read_rows(path, "id")) == [ROW, ROW]
    assert [row for _, row in benchmark_rows.json_rows(path)] == [ROW, ROW]
    path.write_bytes(data.split(b"\n")[0].removeprefix(b"\xef\xbb\xbf") + b"\n{broken")
    for read, error in (
        (lambda: list(json_lines(path)), BadText),
        (lambda: store.read(path, TaskExample), store.BadRecord),
        (lambda: list(open_manifest(path, TaskExample)), store.BadRecord),
        (lambda: list(read_rows(path)), BadDataset),
        (lambda: benchmark_rows.json_rows(path), BadBenchmark),
    ):
        with pytest.raises(error, match="rows.jsonl:2"):
            read()


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
def test_another_encoding_is_named_with_the_command_that_converts_it(tmp_path, encoding):
    path = tmp_path / "it's rows.jsonl"
    path.write_bytes(text_of(ROW, ROW).encode(encoding))
    with pytest.raises(store.BadRecord, match="iconv -f"):
        store.read(path, TaskExample)
    with pytest.raises(BadText, match=rf"is text in {encoding[:6].upper()}\w*, not in UTF-8") as problem:
        open_text(path)
    subprocess.run(str(problem.value).partition("convert it: ")[2], shell=True, check=True)
    assert store.read(tmp_path / "it's rows.utf8.jsonl", TaskExample)[1].text == INSIDE
    with pytest.raises(BadBenchmark, match="iconv -f"):
        benchmark_rows.json_rows(path)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b'{"a": "caf\xe9"}', r"is not UTF-8 \(byte 0xe9\); convert the file .* iconv -f ISO-8859-1"),
        (b'{"a": "\xed\xa0\xbd"}', "is not UTF-8"),  # half a pair, encoded as no encoder may
        (b'{"a": "x \\ud83d y"}', r"holds \\ud83d, half of a surrogate pair"),
        (b'{"a": ["\\uDE00"]}', r"holds \\ude00, half"),
        (b'{"\\ud800": 1}', r"holds \\ud800, half"),
        (b"[" * 100_000, "is nested too deeply"),
        (b"9" * 5000, "is not JSON"),
        (b'{"a": 1} {"a": 2}', "is not JSON .*Extra data"),
        (b'{"label": true, "label": false}', r"is not JSON \('label' comes twice"),
        (b"", "is not JSON"),
    ],
)
def test_what_no_row_can_be(text, problem):
    with pytest.raises(BadText, match=f"^here: {problem}"):
        parse_json(text, "here")


def test_pairs_of_surrogates_and_odd_but_valid_texts_are_read(tmp_path):
    assert parse_json(rb'["\ud83d\ude00", "\\ud83d", "\u0000", NaN]', "here")[:3] == ["😀", "\\ud83d", "\0"]
    (tmp_path / "short").write_bytes(b"x\0")  # too little to tell an encoding
    (tmp_path / "empty").write_bytes(b"")
    assert list(numbered_lines(tmp_path / "empty")) == []
    (tmp_path / "nul.jsonl").write_bytes(b"\0" + text_of(ROW).encode())  # not UTF-16: a stray byte
    with pytest.raises(BadText, match="nul.jsonl:1: is not JSON"):
        list(json_lines(tmp_path / "nul.jsonl"))

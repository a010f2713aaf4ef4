"""Rows of a manifest by number."""

import json
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from preference_data.dataset.manifest import Selection, open_manifest
from preference_data.schema import AudioClip, TaskExample
from preference_data.store import BadRecord, write


def examples(n):
    return [
        TaskExample(id=f"e{i}", audios=(f"{i}.wav",), task="transcribe", text=f"Text {i} – ü" * (i % 5 + 1))
        for i in range(n)
    ]


@pytest.fixture
def jsonl(tmp_path):
    write(tmp_path / "pretrain.jsonl", examples(1000))
    return tmp_path / "pretrain.jsonl"


def test_rows_by_number(jsonl):
    manifest = open_manifest(jsonl, TaskExample)
    wanted = examples(1000)
    assert len(manifest) == 1000
    assert all(manifest[i] == wanted[i] for i in (0, 1, 63, 64, 65, 500, 999))
    assert manifest[-1] == wanted[-1]
    assert list(manifest) == wanted
    with pytest.raises(IndexError):
        manifest[1000]


def test_a_stretch_is_a_view(jsonl):
    part = Selection(open_manifest(jsonl, TaskExample), range(100, 300))
    assert len(part) == 200
    assert part[0].id == "e100"
    assert part[-1].id == "e299"
    assert [one.id for one in Selection(part, range(10, 12))] == ["e110", "e111"]


def test_blank_lines_are_no_rows_and_lines_are_counted_right(tmp_path):
    rows = [one.model_dump_json() for one in examples(200)]
    rows[150] = rows[150].replace('"e150"', "150")
    path = tmp_path / "x.jsonl"
    path.write_text("\n" + "\n\n".join(rows) + "\n  \n")
    manifest = open_manifest(path, TaskExample)
    assert len(manifest) == 200
    assert manifest[149].id == "e149"
    with pytest.raises(BadRecord, match=r"x\.jsonl:302: TaskExample: id: .* \(got '150'\)"):
        manifest[150]


def test_a_torn_last_line_is_named_when_it_is_read(jsonl):
    whole = jsonl.read_bytes()
    jsonl.write_bytes(whole[:-20])
    manifest = open_manifest(jsonl, TaskExample)
    assert manifest[998].id == "e998"
    with pytest.raises(BadRecord, match=r"pretrain\.jsonl:1000: TaskExample: the line: Invalid JSON"):
        manifest[999]
    jsonl.write_bytes(whole[:-1])  # only the newline is missing
    assert open_manifest(jsonl, TaskExample)[999].id == "e999"


def test_an_empty_manifest(tmp_path):
    (tmp_path / "x.jsonl").touch()
    manifest = open_manifest(tmp_path / "x.jsonl", TaskExample)
    assert not manifest
    assert list(manifest) == []


def test_a_copy_in_another_process_reads_the_same(jsonl):
    manifest = open_manifest(jsonl, TaskExample)
    copy = pickle.loads(pickle.dumps(manifest))
    assert copy[700] == manifest[700]
    assert len(pickle.dumps(manifest)) < 2000  # offsets of every 64th row, no rows


def clips(n):
    return [
        {
            "id": f"c{i}",
            "path": f"{i}.wav",
            "split": "train",
            "duration_s": 1.5,
            "sha256": f"{i:064x}",
            "facts": {"word": "seven"} if i % 2 else {"events": ["dog", "cat"]},
        }
        for i in range(n)
    ]


def test_parquet_rows_equal_those_of_json_lines(tmp_path):
    rows = clips(250)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "clips.parquet", row_group_size=100)
    (tmp_path / "clips.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = open_manifest(tmp_path / "clips.parquet", AudioClip)
    lines = open_manifest(tmp_path / "clips.jsonl", AudioClip)
    assert len(columns) == 250
    assert list(columns) == list(lines)
    assert columns[99] == lines[99]
    assert Selection(columns, range(100, 250))[150 - 1] == lines[249]
    assert pickle.loads(pickle.dumps(columns))[7] == lines[7]


def test_parquet_problems_are_named(tmp_path):
    rows = clips(10)
    rows[7]["split"] = "sideways"
    path = tmp_path / "clips.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    with pytest.raises(BadRecord, match=r"clips\.parquet row 7: AudioClip: split"):
        open_manifest(path, AudioClip)[7]
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(BadRecord, match="not a Parquet file, or it is cut off"):
        open_manifest(path, AudioClip)


def test_row_groups_too_large_to_read_single_rows_from(tmp_path):
    pq.write_table(pa.table({"id": ["x"] * 30_000}), tmp_path / "x.parquet")
    with pytest.raises(BadRecord, match=r"30000 rows.*row_group_size=1000"):
        open_manifest(tmp_path / "x.parquet", TaskExample)

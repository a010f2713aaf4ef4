"""Files of rows in every layout, added to each other, and 10,000 of which most are damaged."""

import csv
import gzip
import io
import json
import random
import re
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from preference_data import store
from preference_data.dataset.dataset import BadDataset, Dataset
from preference_data.interchange import exchange, row_files
from preference_data.interchange.columns import BadRow
from preference_data.interchange.conversation import Form
from preference_data.schema import AudioClip, Chat, Label, PreferencePair
from preference_data.text_files import BadText

U = {"role": "user", "content": "<audio>What is it?"}
A = {"role": "assistant", "content": "Rain\u2028and\x85wind."}
ROWS = [
    {"id": "p", "messages": [U, A], "audios": ["a.wav"], "rejected_response": "A dog."},
    {"id": "l", "messages": [U, A], "audios": ["b.wav"], "label": True},
    {"id": "m", "messages": [U, {**A, "content": "A cat."}], "audios": ["b.wav"], "label": False},
    {"id": "c", "messages": [U, A], "audios": ["a.wav"]},
]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("root")
    for number, name in enumerate("ab"):
        wave = 0.3 * np.sin(2 * np.pi * (300 + 100 * number) * np.arange(8000) / 16_000)
        soundfile.write(folder / f"{name}.wav", wave, 16_000)
    return folder


def lines(*rows: object) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def table(rows: list[dict[str, Any]], separator: str) -> bytes:
    out = io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.writer(out, delimiter=separator)
    writer.writerow(names)
    for row in rows:
        cells = [row.get(name, "") for name in names]
        writer.writerow(
            [cell if isinstance(cell, str) else json.dumps(cell, ensure_ascii=False) for cell in cells]
        )
    return out.getvalue().encode()


PAIRED = [ROWS[0], {**ROWS[0], "id": "q", "rejected_response": 'A "cat";\tor,\nso'}]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("rows.jsonl", lines(*PAIRED)),
        ("rows.json", b"\xef\xbb\xbf" + lines(*PAIRED).replace(b"\n", b"\r\n\r\n")),
        ("rows.json", json.dumps(PAIRED).encode()),
        ("rows.json", json.dumps(PAIRED, indent=1).encode()),
        ("rows.csv", table(PAIRED, ",")),
        ("rows.csv", b"\xef\xbb\xbf" + table(PAIRED, ";")),
        ("rows.csv", b"\xef\xbb\xbfsep=;\r\n" + table(PAIRED, ";")),
        ("rows.csv", b"\r\n" + table(PAIRED, "|")),
        ("rows.csv", table(PAIRED, ",").replace(b"id,", b'"id\n",', 1)),
        ("rows.tsv", table(PAIRED, "\t")),
    ],
)
def test_every_layout_reads_the_same(tmp_path, root, name, data):
    (tmp_path / name).write_bytes(data)
    imported = exchange.read_rows(tmp_path / name, "ms-swift", tmp_path / "out", audio_root=root)
    assert (imported.pairs, imported.clips, imported.n_refused, imported.refused) == (2, 1, 0, [])
    pairs = store.read(tmp_path / "out/pairs.jsonl", PreferencePair)
    assert [pair.rejected for pair in pairs] == ["A dog.", 'A "cat";\tor,\nso']
    assert pairs[0].chosen == A["content"]


def test_parquet_with_clips_inside_as_datasets_writes_it(tmp_path, root):
    clips = {name: (root / name).read_bytes() for name in ("a.wav", "b.wav")}
    rows = [
        {"messages": [U, A], "audios": [{"bytes": clips["a.wav"], "path": "x/a.wav"}], "label": True},
        {"messages": [U, A], "audios": [{"bytes": clips["b.wav"], "path": None}], "label": False},
        {"messages": [U, A], "audios": [{"bytes": b"noise", "path": "c.wav"}], "label": False},
        {"messages": [U, A], "audios": [{"bytes": None, "path": "a.wav"}], "label": None},
    ]
    audio = pa.list_(pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    says = pa.list_(pa.struct({"role": pa.string(), "content": pa.string()}))
    schema = pa.schema({"messages": says, "audios": audio, "label": pa.bool_()})
    pq.write_table(pa.Table.from_pylist(rows, schema), tmp_path / "rows.parquet")
    imported = exchange.read_rows(tmp_path / "rows.parquet", "trl", tmp_path / "out", audio_root=root)
    assert imported[:6] == (0, 2, 1, 0, 2, 2)
    assert "its own audio: unreadable" in imported.refused[0]
    assert "label is 'None'" in imported.refused[1]
    written = {clip.path: clip for clip in store.stream(tmp_path / "out/clips.jsonl", AudioClip)}
    labels = store.read(tmp_path / "out/labels.jsonl", Label)
    assert [(tmp_path / "out" / label.audios[0]).read_bytes() for label in labels] == list(clips.values())
    assert written[labels[0].audios[0]].duration_s == 0.5
    assert sorted(path.name for path in (tmp_path / "out/audio").iterdir()) == sorted(
        Path(path).name for path in written
    )
    assert not (tmp_path / "out/.embedded").exists()
    (tmp_path / "bad.parquet").write_bytes((tmp_path / "rows.parquet").read_bytes()[:-9])
    with pytest.raises(BadText, match=r"bad.parquet is not a Parquet file"):
        exchange.read_rows(tmp_path / "bad.parquet", "trl", tmp_path / "other", audio_root=root)
    single = [{"prompt": "What?", "completion": "Rain.", "label": 1, "audio": clips["a.wav"]}]
    pq.write_table(pa.Table.from_pylist(single), tmp_path / "one.parquet")
    assert exchange.read_rows(tmp_path / "one.parquet", "trl", tmp_path / "one", audio_root=root).labels == 1


@pytest.mark.parametrize(
    ("name", "data", "problem"),
    [
        ("rows.jsonl", gzip.compress(lines(*PAIRED)), "is compressed; unpack it: gunzip -c"),
        ("rows.csv", b"PK\x03\x04" + bytes(40), "is a zip archive or a spreadsheet"),
        ("rows.jsonl", b"PAR1" + bytes(40), "is a Parquet file; give it a name that ends with .parquet"),
        ("rows.csv", table(PAIRED, ",").replace(b"\n", b""), "its header cannot be read"),
    ],
)
def test_a_file_of_another_kind_is_refused_by_what_it_is(tmp_path, root, name, data, problem):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(BadText, match=problem):
        exchange.read_rows(tmp_path / name, "ms-swift", tmp_path / "out", audio_root=root)


@pytest.mark.parametrize(
    "data", [json.dumps(PAIRED[0], indent=1).encode(), b"[" * 5000 + b"\n" + lines(PAIRED[0])]
)
def test_an_object_on_many_lines_is_read_and_a_damaged_first_line_ends_nothing(tmp_path, root, data):
    (tmp_path / "rows.json").write_bytes(data)
    assert (
        exchange.read_rows(tmp_path / "rows.json", "ms-swift", tmp_path / "out", audio_root=root).pairs == 1
    )


def test_a_row_that_cannot_be_read_is_quarantined_with_its_line(tmp_path, root):
    data = [
        lines(ROWS[0]),
        b"{torn\n",
        b"\n",
        b'{"id": "caf\xe9"}\n',
        b'{"id": "\\ud83d"}\n',
        b"[1]\n",
        b"[" * 5000 + b"\n",
        b'{"label": true, "label": false}\n',
        lines({**ROWS[0], "id": "x" * 201}),
        lines(ROWS[0]),
        lines(ROWS[3]),
    ]
    (tmp_path / "rows.jsonl").write_bytes(b"".join(data))
    imported = exchange.read_rows(tmp_path / "rows.jsonl", "ms-swift", tmp_path / "out", audio_root=root)
    assert (imported.pairs, imported.chats, imported.n_refused) == (1, 1, 8)
    reasons = [
        json.loads(line)["detail"]
        for line in (tmp_path / "out/quarantine.jsonl").read_bytes().split(b"\n")[:-1]
    ]
    expected = [
        (2, "is not JSON"),
        (4, "is not UTF-8"),
        (5, "half of a surrogate pair"),
        (6, "is a list"),
        (7, "nested too deeply"),
        (8, "comes twice"),
        (9, "at most 200"),
        (10, "comes more than once"),
    ]
    for (line, what), reason in zip(expected, reasons, strict=True):
        assert reason.startswith(f"rows.jsonl:{line}: ")
        assert what in reason


@pytest.mark.parametrize(
    ("name", "data", "problem"),
    [
        (
            "rows.jsonl",
            lines(*ROWS).decode().encode("utf-16"),
            "is text in UTF-16.* iconv -f UTF-16 -t UTF-8",
        ),
        ("rows.csv", table(ROWS, ",").decode().encode("utf-32"), "is text in UTF-32"),
        ("rows.json", json.dumps(ROWS).encode()[:-1], "is not JSON"),
        ("rows.csv", b"id,label,label\n1,true,false\n", "several columns 'label'"),
    ],
)
def test_a_file_that_is_not_what_it_says_is_refused_whole(tmp_path, root, name, data, problem):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(BadText, match=problem):
        exchange.read_rows(tmp_path / name, "ms-swift", tmp_path / "out", audio_root=root)
    assert not (tmp_path / "out").exists()


def test_rows_of_a_table_that_do_not_fit_it_are_left_out(tmp_path, root):
    good = table([{**ROWS[1], "label": "True"}], ",")
    more = b'l2,"[]",a.wav,False\n' + b"too,few\n" + b"l3,a,b,c,d\n" + b"l4,caf\xe9,a.wav,True\n"
    (tmp_path / "rows.csv").write_bytes(good + more)
    imported = exchange.read_rows(tmp_path / "rows.csv", "ms-swift", tmp_path / "out", audio_root=root)
    assert (imported.labels, imported.n_refused) == (1, 4)
    wanted = ["no list of messages", "2 cells for 4", "5 cells for 4", "is not UTF-8"]
    assert all(text in reason for text, reason in zip(wanted, imported.refused, strict=True)), (
        imported.refused
    )


def test_a_second_import_adds_to_the_first_or_changes_nothing(tmp_path, root):
    out = tmp_path / "out"
    (tmp_path / "first.jsonl").write_bytes(lines(*ROWS, {"id": "bad"}))
    (tmp_path / "second.jsonl").write_bytes(lines({**ROWS[1], "id": "n"}, {**ROWS[3], "id": "p"}, 7))
    exchange.read_rows(tmp_path / "first.jsonl", "ms-swift", out, audio_root=root)
    added = exchange.read_rows(tmp_path / "second.jsonl", "ms-swift", out, audio_root=root)
    assert added[:6] == (0, 1, 1, 1, 0, 1)
    dataset = Dataset(out)
    assert [label.id for label in dataset.table(Label)] == ["l", "m", "n"]
    assert [chat.id for chat in dataset.table(Chat)] == ["c", "p"]
    assert len(dataset.table(PreferencePair)) == 1
    assert len(dataset.table(AudioClip)) == len(list((out / "audio").iterdir())) == 2
    assert dataset.about["records"] == {"clips.jsonl": 2, "pairs.jsonl": 1, "labels.jsonl": 3, "sft.jsonl": 2}
    assert [part["file"] for part in dataset.about["imported"]] == ["first.jsonl", "second.jsonl"]
    assert dataset.about["quarantined"] == {"row": 2}
    assert dataset.about["digest"] == dataset.digest()
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for name in ("first.jsonl", "second.jsonl"):
        with pytest.raises(BadDataset, match="which the dataset holds already. Nothing was changed"):
            exchange.read_rows(tmp_path / name, "ms-swift", out, audio_root=root)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    (out / "dataset.json").write_text('{"name": "prepared", "root": "."}')
    with pytest.raises(BadDataset, match="was not imported; name another folder"):
        exchange.read_rows(tmp_path / "second.jsonl", "ms-swift", out, audio_root=root)


@pytest.mark.parametrize("form", get_args(Form))
def test_labels_go_out_and_come_back(tmp_path, root, form):
    system = {"role": "system", "content": "Be brief."}
    rows = [
        *ROWS[1:3],
        {**ROWS[1], "id": "s", "messages": [system, U, A, {**U, "content": "Loud?"}, A], "weight": 2},
    ]
    (tmp_path / "rows.jsonl").write_bytes(lines(*rows))
    exchange.read_rows(tmp_path / "rows.jsonl", "ms-swift", tmp_path / "in", audio_root=root)
    exported = exchange.write_rows(tmp_path / "in/labels.jsonl", form, tmp_path / "in", tmp_path / "out")
    assert (exported.kind, exported.written, exported.refused) == ("labels", 3, [])
    exchange.read_rows(exported.path, form, tmp_path / "back", audio_root=tmp_path / "out")
    first, second = (store.read(tmp_path / name / "labels.jsonl", Label) for name in ("in", "back"))
    assert first == second
    row = json.loads(exported.path.read_bytes().split(b"\n")[1])
    assert row["kto_tag" if form == "llamafactory" else "label"] is False
    if form == "llamafactory":
        info = json.loads((tmp_path / "out/dataset_info.json").read_text())["align_labels"]
        assert info["columns"] == {"messages": "conversations", "audios": "audios", "kto_tag": "kto_tag"}


def test_a_record_that_cannot_be_written_is_left_out_and_named(tmp_path, root):
    (tmp_path / "rows.jsonl").write_bytes(lines(ROWS[3]))
    exchange.read_rows(tmp_path / "rows.jsonl", "ms-swift", tmp_path / "in", audio_root=root)
    chat = json.loads((tmp_path / "in/sft.jsonl").read_bytes())
    path = tmp_path / "in/chats.jsonl"

    def with_answer(key: str, answer: str) -> dict[str, Any]:
        return {**chat, "id": key, "turns": [{**chat["turns"][0], "answer": answer}]}

    rows = [
        chat,
        with_answer("t", "It says <audio>."),
        with_answer("u", "It says &lt;audio&gt;."),
        with_answer("e", "Rain.<|im_end|>"),
        {**chat, "id": "x" * 201},
        {**chat, "id": "m", "audios": ["audio/gone.wav"]},
        with_answer("n", "Rain."),
    ]
    path.write_bytes(lines(*rows))
    exported = exchange.write_rows(path, "trl", tmp_path / "in", tmp_path / "out")
    assert (exported.written, len(exported.refused)) == (2, 5)
    wanted = [
        "record 't'.*<audio>",
        "record 'u'",
        "record 'e'.*im_end",
        "chats.jsonl:5.*200",
        "record 'm'.*gone.wav",
    ]
    for text, reason in zip(wanted, exported.refused, strict=True):
        assert re.search(text, reason), reason
    path.write_bytes(lines(*rows[1:3]))
    with pytest.raises(BadRow, match="none of its 2 records can be written: .*record 't'"):
        exchange.write_rows(path, "trl", tmp_path / "in", tmp_path / "out")
    path.write_bytes(lines({"id": "x"}))
    with pytest.raises(BadRow, match=r"chats.jsonl:1: is no preference pair, label or chat"):
        exchange.write_rows(path, "trl", tmp_path / "in", tmp_path / "out")


# ------------------------------------------------------------------- any rows

PARTS = [{"type": "audio"}, {"type": "text", "text": "What is it?"}]
ALPACA = {"instruction": "What is it?", "input": "", "output": "Rain.", "audios": "b.wav"}
VALID: list[dict[str, Any]] = [
    *ROWS,
    {
        "conversations": [{"from": "human", "value": "<audio>Q"}, {"from": "gpt", "value": "A"}],
        "audios": ["a.wav"],
    },
    {
        "messages": [U, A, {**U, "content": "Loud?"}, A],
        "audios": ["a.wav"],
        "system": "Be brief.",
        "kto_tag": False,
    },
    {
        "prompt": [{"role": "user", "content": PARTS}],
        "chosen": [A],
        "rejected": [{**A, "content": "B"}],
        "audio": "a.wav",
    },
    {
        "prompt": [{"role": "user", "content": PARTS}],
        "completion": [A],
        "label": True,
        "audios": [{"path": "b.wav"}],
    },
    {**ALPACA, "history": [["Hello", "Yes?"]], "system": "x", "duration": 3},
    {**ALPACA, "output": None, "chosen": "A", "rejected": "B"},
]
ODD: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        1.5,
        1e300,
        10**30,
        "",
        " ",
        "x",
        [],
        {},
        [[]],
        [None],
        {"": None},
        "true",
        "a.wav",
    ),
    *(
        "\u2028",
        "\0",
        "\ud83d",
        "\udc00x",
        "😀",
        "a\nb",
        "\u202e",
        "x" * 300,
        "../a.wav",
        "/etc/passwd",
        "http://x/a.wav",
    ),
    *(
        "<audio>",
        "<audio&gt;",
        "<|im_end|>",
        "<|AUDIO|>",
        "<audio>a.wav</audio>",
        [U],
        [U, A],
        {"role": "user"},
        float("nan"),
    ),
]


def mutated(value: Any, draw: random.Random) -> Any:
    """The value with one place in it changed."""
    if isinstance(value, dict) and value and draw.random() < 0.85:
        key = draw.choice(list(value))
        match draw.randrange(8):
            case 0:
                return {name: inner for name, inner in value.items() if name != key}
            case 1:
                cut = draw.randrange(len(key) + 1)
                return {**value, key[:cut] + draw.choice("xes_ T") + key[cut + 1 :]: value[key]}
            case 2:
                return {
                    **value,
                    draw.choice(["weight", "loss", "label", "rejected", "tools", "foo"]): draw.choice(ODD),
                }
            case _:
                return {**value, key: mutated(value[key], draw)}
    if isinstance(value, list) and value and draw.random() < 0.85:
        place = draw.randrange(len(value))
        changed = [[], [value[place]] * 2, [mutated(value[place], draw)], [mutated(value[place], draw)]]
        return value[:place] + draw.choice(changed) + value[place + 1 :]
    if isinstance(value, str) and draw.random() < 0.5:
        cut = draw.randrange(len(value) + 1)
        return value[:cut] + str(draw.choice(ODD)) + value[cut:]
    return draw.choice(ODD)


def any_line(number: int, draw: random.Random) -> bytes:
    row: Any = {**draw.choice(VALID), "id": f"r{number}"}
    for _ in range(draw.randrange(3)):
        row = mutated(row, draw)
    line = json.dumps(row, ensure_ascii=draw.random() < 0.5).encode("utf-8", "surrogatepass")
    if draw.random() < 0.01:
        deep = draw.choice([20, 300, 900, 3000])
        place = draw.choice([b'"audios": ', b'"content": ', b'"id": '])
        line = line.replace(place, place + b"[" * deep + b"]" * deep + b', "more": ')
    if draw.random() < 0.1:
        place = draw.randrange(len(line))
        line = line[:place] + draw.randbytes(draw.randrange(3)).replace(b"\n", b"") + line[place + 1 :]
    return line or b"{}"


def check_any_rows(n: int, form: Form, root: Path, folder: Path, name: str) -> None:
    """Every row is imported or quarantined with its line and reason, and what is imported goes out again."""
    draw = random.Random(f"{form} {n} {name}")
    rows, out = folder / name, folder / "out"
    first = lines({**ROWS[0], "id": "first"})
    rows.write_bytes(first + b"".join(any_line(number, draw) + b"\n" for number in range(n)))
    if name.endswith(".csv"):
        plain = [row for row in map(parsed, rows.read_bytes().split(b"\n")) if row]
        names = {name for row in VALID for name in row}
        rows.write_bytes(table([{name: row.get(name, "") for name in names} for row in plain], ","))
    numbers = [row.number for row in row_files.read_rows(rows, folder / "clips")]
    imported = exchange.read_rows(rows, form, out, audio_root=root)
    taken = imported.pairs + imported.labels + imported.chats + imported.questions
    assert taken + imported.n_refused == len(numbers)
    refused = [json.loads(line) for line in (out / "quarantine.jsonl").read_bytes().split(b"\n")[:-1]]
    assert len(refused) == imported.n_refused > 0
    for row in refused:
        line, _, reason = row["detail"].removeprefix(f"{name}:").partition(": ")
        assert row["id"] == f"row-{line}"
        assert int(line) in numbers
        assert reason.strip()
        assert "Error" not in reason
    dataset = Dataset(out)
    kinds = {"pairs": PreferencePair, "labels": Label, "sft": Chat}
    for table_name, kind in kinds.items():
        if dataset.records(kind):
            exported = exchange.write_rows(out / f"{table_name}.jsonl", form, out, folder / "rows")
            assert exported.written == len(dataset.records(kind))
            assert exported.refused == []


def parsed(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
        json.dumps(row, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return {}
    return row if isinstance(row, dict) else {}


@pytest.mark.parametrize(("form", "name"), [("ms-swift", "any.jsonl"), ("llamafactory", "any.csv")])
def test_any_rows(tmp_path, root, form, name):
    check_any_rows(200, form, root, tmp_path, name)


@pytest.mark.slow
@pytest.mark.parametrize("form", get_args(Form))
def test_three_thousand_rows(tmp_path, root, form):
    check_any_rows(3_000, form, root, tmp_path, "any.jsonl")

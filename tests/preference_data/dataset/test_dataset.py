"""One layout: its description under every name it had, its paths, its files whole or absent."""

import json

import pytest

from preference_data.dataset.dataset import (
    DESCRIPTION,
    RECORD_FILES,
    BadDataset,
    Dataset,
    RecordWriter,
    describe,
    is_described,
    replacing_dataset,
    with_paths,
)
from preference_data.schema import AudioClip, Chat, PreferencePair, TaskExample, Turn

CLIP = AudioClip(id="c", path="c.wav", split="train", duration_s=1, sha256="0" * 64)
EXAMPLE = TaskExample(id="e", audios=("c.wav",), task="transcribe", text="x")


def test_a_folder_without_a_description_is_the_root_of_its_paths(tmp_path):
    assert not is_described(tmp_path)
    assert Dataset(tmp_path).find("c.wav") == tmp_path.resolve() / "c.wav"


@pytest.mark.parametrize("name", [DESCRIPTION, "source.json"])
def test_a_prepared_data_set_opens_under_its_old_name_too(tmp_path, name):
    (tmp_path / name).write_text(json.dumps({"name": "libri", "root": "audio"}))
    assert is_described(tmp_path)
    assert Dataset(tmp_path).find("c.wav") == tmp_path.resolve() / "audio/c.wav"


@pytest.mark.parametrize(("name", "key"), [(DESCRIPTION, "parts"), ("sources.json", "sources")])
def test_a_mixture_opens_under_its_old_name_too(tmp_path, name, key):
    parts = [{"name": n, "root": str(tmp_path / n), "share": None, "rows": {"clips": 1}} for n in ("a", "b")]
    (tmp_path / name).write_text(json.dumps({"temperature": 1.0, key: parts}))
    with RecordWriter(tmp_path) as writer:
        writer.add(CLIP)
        writer.add(CLIP)
    dataset = Dataset(tmp_path)
    assert dataset.find("b/c.wav") == (tmp_path / "b/c.wav").resolve()
    assert [(part.name, len(part.records), part.share) for part in dataset.parts(AudioClip)] == [
        ("a", 1, 0.5),
        ("b", 1, 0.5),
    ]


@pytest.mark.parametrize("text", ["[]", "{", ""])
def test_a_damaged_description_is_named(tmp_path, text):
    (tmp_path / DESCRIPTION).write_text(text)
    with pytest.raises(BadDataset, match=r"dataset\.json.*prepare the dataset again"):
        Dataset(tmp_path)


def test_records_go_to_the_file_of_their_kind_and_every_file_is_there(tmp_path):
    pair = PreferencePair(
        id="p",
        prompt_id="q",
        audios=("c.wav",),
        question="?",
        chosen="a",
        rejected="b",
        axis="factuality",
        agreement=1,
    )
    with RecordWriter(tmp_path) as writer:
        for record in (CLIP, EXAMPLE, pair):
            writer.add(record)
        writer.add_row("quarantine.jsonl", {"id": "x"})
    dataset = Dataset(tmp_path)
    assert [list(dataset.table(kind)) for kind in (AudioClip, TaskExample, PreferencePair)] == [
        [CLIP],
        [EXAMPLE],
        [pair],
    ]
    assert all((tmp_path / name).is_file() for name in RECORD_FILES)
    assert writer.rows == {"clips.jsonl": 1, "pretrain.jsonl": 1, "pairs.jsonl": 1, "quarantine.jsonl": 1}
    before = describe(tmp_path, {"name": "x"})["digest"]
    (tmp_path / "pairs.jsonl").write_text("")
    assert describe(tmp_path, {"name": "x"})["digest"] != before


def test_a_failure_leaves_what_was_there(tmp_path):
    out = tmp_path / "out"
    with replacing_dataset(out, tmp_path / "audio") as partial:
        with RecordWriter(partial) as writer:
            writer.add(CLIP)
        describe(partial, {"name": "first"})

    def fail() -> None:
        with replacing_dataset(out, tmp_path / "audio") as partial, RecordWriter(partial) as writer:
            writer.add(EXAMPLE)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert Dataset(out).about["name"] == "first"
    assert list(Dataset(out).table(AudioClip)) == [CLIP]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_kill_while_a_dataset_is_replaced_loses_nothing(tmp_path):
    out = tmp_path / "out"
    with replacing_dataset(out, tmp_path / "audio") as partial:
        describe(partial, {"name": "first"})
    out.rename(tmp_path / ".replaced-out")  # where a kill between the two renames leaves it

    def fail() -> None:
        with replacing_dataset(out, tmp_path / "audio"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert Dataset(out).about["name"] == "first"


def test_other_paths_go_wherever_a_row_names_a_clip():
    turns = (
        Turn(question="a", answer="b", audios=("1.wav",)),
        Turn(question="", answer="c", audios=("2.wav",)),
    )
    chat = Chat(id="c", audios=("1.wav", "2.wav"), turns=turns)
    rows = (chat.model_dump(), CLIP.model_dump(), {"audio": "3.wav", "gt": "x"}, {"path": None})
    moved = [with_paths(row, lambda path: f"a/{path}") for row in rows]
    assert Chat.model_validate(moved[0]).audios_per_turn == (("a/1.wav",), ("a/2.wav",))
    assert moved[1] == {**CLIP.model_dump(), "path": "a/c.wav"}
    assert moved[2:] == [{"audio": "a/3.wav", "gt": "x"}, {"path": None}]

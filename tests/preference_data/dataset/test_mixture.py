"""Prepared datasets become one corpus."""

import hashlib
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from preference_data import store
from preference_data.audio.clip_files import BadAudio
from preference_data.audio.tar_shards import write_shards
from preference_data.dataset.dataset import BadDataset, Dataset
from preference_data.dataset.mixture import BadMixture, MixturePart, mix
from preference_data.dataset.sharding import shard
from preference_data.dataset.splits import Leak
from preference_data.schema import AudioClip, Chat, Prompt, TaskExample, Turn
from preference_data.store import BadRecord


def clip(root, name, number, split="train", speaker=None):
    path = root / f"{name}.wav"
    path.parent.mkdir(parents=True, exist_ok=True)
    tone = 0.3 * np.sin(2 * np.pi * (200 + number) * np.arange(4000) / 16_000)
    soundfile.write(path, tone.astype(np.float32), 16_000)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return AudioClip(
        id=name, path=f"{name}.wav", split=split, duration_s=0.25, sha256=digest, speaker=speaker
    )


def data_set(folder, name, n, first=0, held_out=1):
    """`n` training clips and a test clip, with records of every kind; its audio lies in `audio/`."""
    clips = [clip(folder / "audio", f"c{i}", first + i, speaker="s") for i in range(n)]
    tests = [clip(folder / "audio", f"t{i}", first + 900 + i, "test", "t") for i in range(held_out)]
    store.write_rows(folder / "dataset.json", [])
    (folder / "dataset.json").write_text(json.dumps({"name": name, "root": "audio", "licence": "CC0"}))
    store.write(folder / "clips.jsonl", [*clips, *tests])
    store.write(
        folder / "pretrain.jsonl",
        [
            TaskExample(id=one.id, audios=(one.path,), task="transcribe", text=f"{name} {one.id}")
            for one in clips
        ],
    )
    chat = Turn(question="What?", answer="A tone.")
    store.write(folder / "sft.jsonl", [Chat(id="chat", audios=("c0.wav",), turns=(chat,))])
    prompt = Prompt(
        id="p", audios=("c1.wav",), question="?", answer_gt="!", meta_info="", task_name="sound_QA"
    )
    store.write(folder / "prompts.jsonl", [prompt])
    rows = [{"audio": one.path, "prompt": "transcribe", "gt": "x", "source": "test"} for one in tests]
    store.write_rows(folder / "test" / "recognition.jsonl", rows)
    return folder


def mixed(tmp_path, *data_sets, **settings):
    out = tmp_path / "0_corpus"
    defaults = {"temperature": 1.0, "seed": 0, "max_duration_s": 30.0, "max_bad_fraction": 0.0}
    data_sets = [one if isinstance(one, MixturePart) else MixturePart(one) for one in data_sets]
    return out, mix(out, data_sets, **{**defaults, **settings})


def starting(prefix, counts):
    return {name.removeprefix(prefix): n for name, n in counts.items() if name.startswith(prefix)}


@pytest.fixture
def two(tmp_path):
    return data_set(tmp_path / "one", "one", 8), data_set(tmp_path / "other", "other", 2, first=100)


def test_two_data_sets_become_one_corpus(two, tmp_path):
    out, counts = mixed(tmp_path, *two)
    assert starting("clips_", counts) == {"train": 10, "test": 2}
    assert starting("rows_", counts) == {"clips": 12, "pretrain": 10, "sft": 2, "prompts": 2}
    assert starting("share_", counts) == pytest.approx({"one": 0.8, "other": 0.2})
    root = Dataset(out)
    for record in store.read(out / "clips.jsonl", AudioClip):
        found = root.find(record.path)
        assert hashlib.sha256(found.read_bytes()).hexdigest() == record.sha256
        assert record.speaker.split("/")[0] == record.path.split("/")[0] == record.id.split("/")[0]
    assert [one.id for one in store.read(out / "sft.jsonl", Chat)] == ["one/chat", "other/chat"]
    assert store.read(out / "prompts.jsonl", Prompt)[1].audios == ("other/c1.wav",)
    rows = [json.loads(line) for line in (out / "test/recognition.jsonl").read_text().splitlines()]
    assert [(row["audio"], row["source"]) for row in rows] == [
        ("one/t0.wav", "one/test"),
        ("other/t0.wav", "other/test"),
    ]
    assert not list(out.rglob("*.wav"))


def test_training_draws_by_temperature_or_by_share(two, tmp_path):
    one, other = two
    out, _ = mixed(tmp_path, one, other, temperature=2.0)
    parts = Dataset(out).parts(TaskExample)
    assert [part.name for part in parts] == ["one", "other"]
    assert [len(part.records) for part in parts] == [8, 2]
    assert {record.text.split()[0] for record in parts[1].records} == {"other"}
    assert [part.share for part in parts] == pytest.approx([2 / 3, 1 / 3])  # sqrt 8 : sqrt 2
    out, counts = mixed(tmp_path, MixturePart(one), MixturePart(other, 0.75))
    assert starting("share_", counts) == pytest.approx({"one": 0.25, "other": 0.75})


def test_a_prepared_data_set_is_a_corpus_too(two):
    record = store.read(two[0] / "clips.jsonl", AudioClip)[2]
    assert Dataset(two[0]).find(record.path) == two[0] / "audio" / "c2.wav"
    (only,) = Dataset(two[0]).parts(TaskExample)
    assert (only.name, len(only.records), only.share) == ("", 8, 1.0)
    (two[0] / "sft.jsonl").unlink()
    with pytest.raises(ValueError, match="no rows in sft.jsonl"):
        Dataset(two[0]).parts(Chat)


def test_paths_lead_nowhere_but_into_their_data_set(two, tmp_path):
    out, _ = mixed(tmp_path, *two)
    root = Dataset(out)
    for path, code in {
        "c0.wav": "bad_path",
        "third/c0.wav": "bad_path",
        "one": "bad_path",
        "one/../other/c0.wav": "outside_root",
        "one//etc/passwd": "outside_root",
    }.items():
        with pytest.raises(BadAudio) as caught:
            root.find(path)
        assert caught.value.code == code, path


def test_tables_may_be_parquet_and_clips_in_shards(two, tmp_path):
    one, _ = two
    rows = [json.loads(line) for line in (one / "clips.jsonl").read_text().splitlines()]
    members = [(row["id"], {"wav": (one / "audio" / row["path"]).read_bytes()}) for row in rows]
    shards = dict(write_shards(tmp_path / "shards", members, max_bytes=40_000))
    moved = [{**row, "path": f"{shards[row['id']]}/{row['id']}.wav"} for row in rows]
    for row in moved:
        del row["facts"]  # Parquet has no empty structs
    pq.write_table(pa.Table.from_pylist(moved), one / "clips.parquet")
    (one / "clips.jsonl").unlink()
    path_of = {row["id"]: row["path"] for row in moved}
    for name, kind in (("pretrain", TaskExample), ("sft", Chat), ("prompts", Prompt)):
        table = store.read(one / f"{name}.jsonl", kind)
        renamed = [r.model_copy(update={"audios": (path_of[r.audios[0][:-4]],)}) for r in table]
        store.write(one / f"{name}.jsonl", renamed)
    (one / "dataset.json").write_text(json.dumps({"name": "one", "root": str(tmp_path / "shards")}))
    (one / "test/recognition.jsonl").unlink()
    out, counts = mixed(tmp_path, one)
    assert counts["rows_pretrain"] == 8
    record = store.read(out / "clips.jsonl", AudioClip)[3]
    assert hashlib.sha256(Dataset(out).find(record.path).read()).hexdigest() == record.sha256
    store.write(one / "clips.jsonl", store.read(out / "clips.jsonl", AudioClip))
    with pytest.raises(ValueError, match=r"both clips\.jsonl and clips\.parquet"):
        mixed(tmp_path, one)


# -------------------------------------------------------------------------- what is refused


def change(folder, table, edit):
    rows = [json.loads(line) for line in (folder / table).read_text().splitlines()]
    edit(rows)
    store.write_rows(folder / table, rows)


def test_a_folder_that_is_no_data_set(two, tmp_path):
    with pytest.raises(BadMixture, match=r"no dataset\.json; prepare it first"):
        mixed(tmp_path, tmp_path)
    (two[0] / "dataset.json").write_text('{"name": "../x", "root": "audio"}')
    with pytest.raises(BadMixture, match=r"name '\.\./x'"):
        mixed(tmp_path, two[0])
    (two[0] / "dataset.json").write_text('{"name": "one", "root": "gone"}')
    with pytest.raises(BadMixture, match="root 'gone' is not a folder"):
        mixed(tmp_path, two[0])


def test_two_of_one_name(two, tmp_path):
    with pytest.raises(BadMixture, match="two datasets are called 'one'"):
        mixed(tmp_path, two[0], two[0])


def test_records_that_come_twice(two, tmp_path):
    change(two[0], "pretrain.jsonl", lambda rows: rows.append(rows[3]))
    with pytest.raises(BadMixture, match=r"id 'one/c3' comes twice in pretrain\.jsonl"):
        mixed(tmp_path, *two)
    change(two[0], "clips.jsonl", lambda rows: rows.append({**rows[3], "id": "new"}))
    with pytest.raises(BadMixture, match=r"path 'one/c3\.wav' comes twice in clips\.jsonl"):
        mixed(tmp_path, *two)


def test_a_record_of_an_unknown_clip_or_a_held_out_one(two, tmp_path):
    change(two[0], "pretrain.jsonl", lambda rows: rows[2].update(audios=["nobody.wav"]))
    with pytest.raises(BadMixture, match=r"record 'c2' names 'one/nobody\.wav', not in clips\.jsonl"):
        mixed(tmp_path, *two)
    change(two[0], "pretrain.jsonl", lambda rows: rows[2].update(audios=["t0.wav"]))
    with pytest.raises(BadMixture, match=r"record 'c2' teaches 'one/t0\.wav', a test clip"):
        mixed(tmp_path, *two)


def test_the_same_audio_in_training_here_and_in_the_test_set_there(two, tmp_path):
    one, other = two
    (one / "audio/c0.wav").write_bytes((other / "audio/t0.wav").read_bytes())
    digest = hashlib.sha256((one / "audio/c0.wav").read_bytes()).hexdigest()
    change(one, "clips.jsonl", lambda rows: rows[0].update(sha256=digest))
    with pytest.raises(Leak, match=r"'one/c0' \(train\) and 'other/t0' \(test\) are the same audio"):
        mixed(tmp_path, one, other)


def test_speakers_heard_on_both_sides_are_counted_and_those_of_two_data_sets_are_two(two, tmp_path):
    """Each has a training speaker 's' and a test speaker 't'."""
    assert mixed(tmp_path, *two)[1]["speakers_on_both_sides"] == 0
    change(two[0], "clips.jsonl", lambda rows: [row.update(speaker="t") for row in rows[:1]])
    assert mixed(tmp_path, *two)[1]["speakers_on_both_sides"] == 1


def test_clips_that_changed_since_they_were_prepared(two, tmp_path):
    clip(two[0] / "audio", "c5", 555)
    with pytest.raises(BadMixture, match=r"clip 'one/c5\.wav' is not what was prepared"):
        mixed(tmp_path, *two)


def test_missing_and_long_clips_are_quarantined_with_what_speaks_of_them_or_stop(two, tmp_path):
    (two[0] / "audio/c1.wav").unlink()
    change(two[0], "clips.jsonl", lambda rows: rows[2].update(duration_s=31))
    with pytest.raises(BadMixture, match=r"one: 1 .*of 8 clips are unusable.*c1\.wav: missing"):
        mixed(tmp_path, *two)
    out, counts = mixed(tmp_path, *two, max_bad_fraction=0.3)
    assert counts["quarantined"] == 2
    assert starting("rows_", counts) == {"clips": 10, "pretrain": 8, "sft": 2, "prompts": 1}
    assert counts["dropped"] == 3  # two examples and a prompt
    rows = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert [(row["path"], row["code"]) for row in rows] == [
        ("one/c1.wav", "missing"),
        ("one/c2.wav", "too_long"),
    ]


def test_a_torn_row_is_named(two, tmp_path):
    path = two[1] / "pretrain.jsonl"
    path.write_bytes(path.read_bytes()[:-15])
    with pytest.raises(BadRecord, match=r"other/pretrain\.jsonl:2: TaskExample"):
        mixed(tmp_path, *two)
    assert not (tmp_path / "0_corpus/pretrain.jsonl").exists()


# -------------------------------------------------------------------------- sharded


def test_a_sharded_data_set_is_the_same_data_set_and_can_move(two, tmp_path):
    out = tmp_path / "sharded"
    told = shard(two[0], out, max_bytes=20_000)
    assert told["root"] == "shards"
    assert told["licence"] == "CC0"
    assert len(list((out / "shards").glob("*.tar"))) == 3
    moved = out.rename(tmp_path / "moved")
    plain, in_tar = Dataset(two[0]), Dataset(moved)
    for before, after in zip(
        store.read(two[0] / "clips.jsonl", AudioClip),
        store.read(moved / "clips.jsonl", AudioClip),
        strict=True,
    ):
        assert before.model_copy(update={"path": after.path}) == after
        assert in_tar.find(after.path).read() == plain.find(before.path).read_bytes()
    one, first = mixed(tmp_path, two[0])
    texts = [(r.id, r.text) for r in store.read(one / "pretrain.jsonl", TaskExample)]
    other, second = mixed(tmp_path, moved)
    assert [(r.id, r.text) for r in store.read(other / "pretrain.jsonl", TaskExample)] == texts
    assert first == second
    with pytest.raises(BadDataset, match="is not a dataset"):
        shard(two[0], two[1] / "audio")
    (two[0] / "audio/c3.wav").unlink()
    with pytest.raises(BadAudio, match=r"c3\.wav.*missing"):
        shard(two[0], out)
    assert not out.exists()

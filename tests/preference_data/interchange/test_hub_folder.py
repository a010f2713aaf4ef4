"""A folder for the Hub holds its audio, is read by `datasets`, and comes back as it went out."""

import numpy as np
import pytest
import soundfile
import yaml
from datasets import Audio, load_dataset

from preference_data import store
from preference_data.audio.tar_shards import write_shards
from preference_data.dataset.dataset import Dataset
from preference_data.interchange import exchange, hub_folder
from preference_data.interchange.columns import BadRow
from preference_data.schema import AudioClip, Chat, ContentPart, Label, Message, PreferencePair, Turn

LICENCES = ["CC BY 4.0", "CC0-1.0", None]


@pytest.fixture
def corpus(tmp_path):
    """Three clips of three licences, and a pair, a label and a chat about each."""
    clips, records = [], []
    for n, licence in enumerate(LICENCES):
        wave = 0.3 * np.sin(2 * np.pi * (300 + 100 * n) * np.arange(800) / 16_000)
        (tmp_path / "corpus").mkdir(exist_ok=True)
        soundfile.write(tmp_path / f"corpus/{n}.wav", wave, 16_000)
        clips.append(
            AudioClip(
                id=f"c{n}",
                path=f"{n}.wav",
                split="preference",
                duration_s=0.05,
                sha256=f"{n}" * 64,
                licence=licence,
            )
        )
        records.append(
            PreferencePair(
                id=f"p{n}",
                prompt_id=f"q{n}",
                audios=(f"{n}.wav",),
                question="What?",
                chosen="A tone.",
                rejected="A dog.",
                axis="factuality",
                agreement=(1, 0.8, 1)[n],
            )
        )
    store.write(tmp_path / "corpus/clips.jsonl", clips)
    store.write(tmp_path / "corpus/pairs.jsonl", records)
    return tmp_path / "corpus"


def loaded(folder, tmp_path):
    rows = load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    assert isinstance(rows.features["audios"].feature, Audio)
    return rows.cast_column("audios", [Audio(decode=False)])


def card(folder):
    _, head, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(head), text


def test_pairs_go_out_with_their_audio_and_come_back(corpus, tmp_path):
    history = ["Judged by Ann."]
    exported = hub_folder.write(corpus / "pairs.jsonl", corpus, tmp_path / "out", history=history)
    assert (exported.kind, exported.written, exported.refused) == ("pairs", 3, [])
    moved = (tmp_path / "out").rename(tmp_path / "moved")
    rows = loaded(moved, tmp_path)
    assert rows["licences"] == [[name] for name in LICENCES]
    for n, row in enumerate(rows):
        assert row["audios"] == [{"bytes": (corpus / f"{n}.wav").read_bytes(), "path": f"audio/{n}.wav"}]
        assert [part["type"] for part in row["prompt"][0]["content"]] == ["audio", "text"]
        assert row["chosen"] == [{"role": "assistant", "content": [{"type": "text", "text": "A tone."}]}]
    (file,) = (moved / "data").iterdir()
    assert file.name == "train-00000-of-00001.parquet"
    back = exchange.read_rows(file, "trl", tmp_path / "back", audio_root=moved, ignored=["licences"])
    assert (back.pairs, back.n_refused) == (3, 0)
    pairs = store.read(tmp_path / "back/pairs.jsonl", PreferencePair)
    before = store.read(corpus / "pairs.jsonl", PreferencePair)
    assert [pair.model_copy(update={"audios": ()}) for pair in pairs] == [
        pair.model_copy(update={"audios": ()}) for pair in before
    ]
    head, text = card(moved)
    assert head["license"] == "other"
    assert head["tags"] == ["audio", "trl", "dpo"]
    for said in ("CC BY 4.0 | 1", "CC0-1.0 | 1", "unknown | 1", "Judged by Ann.", "0.93 on average", "67%"):
        assert said in text
    assert str(tmp_path) not in (moved / "README.md").read_text()
    with pytest.raises(BadRow, match="is there and is not empty"):
        hub_folder.write(corpus / "pairs.jsonl", corpus, moved)


def test_rows_are_filtered_by_licence(corpus, tmp_path):
    exported = hub_folder.write(corpus / "pairs.jsonl", corpus, tmp_path / "out", licences=["cc-by-4.0"])
    assert (exported.written, len(exported.refused)) == (1, 2)
    assert "clip '2.wav' has no licence; allowed: cc-by-4.0" in exported.refused[1]
    assert card(tmp_path / "out")[0]["license"] == "cc-by-4.0"
    told = exchange.write_rows(corpus / "pairs.jsonl", "ms-swift", corpus, tmp_path / "rows", ["CC0-1.0"])
    assert (told.written, len(list((tmp_path / "rows/audio").iterdir()))) == (1, 1)
    with pytest.raises(BadRow, match="none of its 3 records can be written: .*has licence 'CC BY 4.0'"):
        hub_folder.write(corpus / "pairs.jsonl", corpus, tmp_path / "none", licences=["MIT"])
    assert not (tmp_path / "none").exists()


def test_labels_and_chats_go_out_too(corpus, tmp_path):
    message = Message(
        role="user", content=(ContentPart(type="audio"), ContentPart(type="text", text="What?"))
    )
    label = Label(
        id="l", prompt_id="q", prompt=(message,), completion="A tone.", audios=("0.wav",), label=False
    )
    store.write(corpus / "labels.jsonl", [label])
    hub_folder.write(corpus / "labels.jsonl", corpus, tmp_path / "labels")
    (row,) = loaded(tmp_path / "labels", tmp_path)
    assert (row["label"], row["weight"], row["completion"][0]["role"]) == (False, 1.0, "assistant")
    turns = (
        Turn(question="What?", answer="A tone.", audios=("0.wav",)),
        Turn(question="", answer="Two.", audios=("1.wav",)),
    )
    store.write(corpus / "sft.jsonl", [Chat(id="c", audios=("0.wav", "1.wav"), turns=turns)])
    hub_folder.write(corpus / "sft.jsonl", corpus, tmp_path / "chats")
    (row,) = loaded(tmp_path / "chats", tmp_path)
    assert len(row["audios"]) == 2
    assert [m["role"] for m in row["messages"]] == ["user", "assistant"] * 2


def test_pairs_of_several_turns_go_out_with_all_their_clips(corpus, tmp_path):
    (pair, *_) = store.read(corpus / "pairs.jsonl", PreferencePair)
    earlier = Turn(question="And this?", answer="Two.", audios=("1.wav",))
    longer = pair.model_copy(update={"history": (earlier,), "audios": ("1.wav", "0.wav")})
    store.write(corpus / "longer.jsonl", [longer])
    hub_folder.write(corpus / "longer.jsonl", corpus, tmp_path / "out")
    (row,) = loaded(tmp_path / "out", tmp_path)
    assert [m["role"] for m in row["prompt"]] == ["user", "assistant", "user"]
    assert [part["type"] for part in row["prompt"][0]["content"]] == ["audio", "text"]
    assert len(row["audios"]) == 2


def test_many_rows_become_several_files(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(hub_folder, "_ROWS", 2)
    monkeypatch.setattr(hub_folder, "_SHARD_BYTES", 3000)
    pair = store.read(corpus / "pairs.jsonl", PreferencePair)[0]
    store.write(corpus / "many.jsonl", [pair.model_copy(update={"id": f"p{n}"}) for n in range(7)])
    hub_folder.write(corpus / "many.jsonl", corpus, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out/data").iterdir()) == [
        f"train-0000{n}-of-00004.parquet" for n in range(4)
    ]
    assert loaded(tmp_path / "out", tmp_path)["id"] == [f"p{n}" for n in range(7)]


def test_audio_in_tar_shards_is_taken_out(corpus, tmp_path):
    samples = ((f"{n:03d}", {"wav": (corpus / f"{n}.wav").read_bytes()}) for n in range(3))
    list(write_shards(tmp_path / "sharded/shards", samples, max_bytes=1 << 20))
    (shard,) = (tmp_path / "sharded/shards").iterdir()
    pairs = store.read(corpus / "pairs.jsonl", PreferencePair)
    (tmp_path / "sharded/dataset.json").write_text('{"name": "s", "root": "shards"}')
    moved = [p.model_copy(update={"audios": (f"{shard.name}/00{n}.wav",)}) for n, p in enumerate(pairs)]
    store.write(tmp_path / "sharded/pairs.jsonl", moved)
    assert Dataset(tmp_path / "sharded").find(moved[0].audios[0]).read()
    told = exchange.write_rows(
        tmp_path / "sharded/pairs.jsonl", "trl", tmp_path / "sharded", tmp_path / "rows"
    )
    assert told.written == 3
    written = {path.read_bytes() for path in (tmp_path / "rows/audio").iterdir()}
    assert written == {(corpus / f"{n}.wav").read_bytes() for n in range(3)}

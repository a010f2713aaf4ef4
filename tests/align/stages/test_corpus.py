"""Bad audio is found before any training: quarantined with a reason, or the run stops."""

import csv
import hashlib
import json

import numpy as np
import pytest
import soundfile

from align.recipe.config.corpus import CorpusConfig
from align.recipe.config.training import PretrainConfig
from align.run_folder.artifacts import StageFolder
from align.stages import corpus, pretrain
from preference_data import store
from preference_data.schema import AudioClip, TaskExample
from preference_data.store import read
from preference_data.toy_world.phrasebook import BadPhrasebook, Phrasebook

PHRASEBOOK = """
slots:
  tone:
    values: [high, low]
    questions: ["Is the tone high or low?"]
    sentence: "The tone is {tone}."
  animal:
    values: [dog, cat]
    questions: ["Which animal do you hear?"]
    sentence: "It is a {animal}."
    absent: "There is no animal."
descriptions: ["A {tone} tone."]
describe_questions: ["Describe the audio."]
one_word: "Answer in one word."
kinds: {closed: 1, one_word: 1, absent: 1, describe: 1}
inventions: [animal]
tasks: [{task: sound_QA}]
targets: [{task: caption, text: " {description}"}]
"""

CLIPS = {"train": 2, "preference": 1, "dev": 1, "test": 1}


def tone(path, high, seconds=0.5):
    t = np.arange(int(16_000 * seconds)) / 16_000
    noise = np.random.default_rng(int(path.stem) if path.stem.isdigit() else 99).normal(0, 0.001, len(t))
    wave = 0.3 * np.sin(2 * np.pi * (2000 if high else 200) * t) + noise
    soundfile.write(path, wave.astype(np.float32), 16_000, subtype="FLOAT")


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "phrasebook.yaml").write_text(PHRASEBOOK)
    rows = []
    for i in range(24):
        split = "train" if i < 12 else ["preference", "dev", "test"][i % 3]
        speaker = f"s-{split}"
        tone(folder / f"{i}.wav", high=i % 2 == 0)
        rows.append([f"{i}.wav", speaker, split, "high" if i % 2 == 0 else "low"])
    with (folder / "facts.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["path", "speaker", "split", "tone"], *rows])
    return folder


def run(source, tmp_path, **settings):
    config = CorpusConfig(stage="corpus", corpus="folder", dir=str(source), max_duration_s=1.0, **settings)
    out = StageFolder(tmp_path / "run", "0_corpus", "x")
    out.open()
    return out.path, corpus.run(config, {}, out)


def test_a_folder_of_recordings_becomes_a_corpus(source, tmp_path):
    path, metrics = run(source, tmp_path, defect_rate=0.5)
    assert metrics["clips_train"] == 12
    assert metrics["quarantined"] == 0
    for clip in read(path / "clips.jsonl", AudioClip):
        assert (path / clip.path).is_file()
    meta = json.loads((path / "test/Chat/Chat_meta.json").read_text())
    assert {item["task_name"] for item in meta} == {"sound_QA"}


def test_few_bad_files_are_quarantined_with_their_reason(source, tmp_path):
    soundfile.write(source / "3.wav", np.full(8000, np.nan, dtype=np.float32), 16_000, subtype="FLOAT")
    (source / "5.wav").write_text("<html>404</html>")
    path, metrics = run(source, tmp_path, max_bad_fraction=0.1)
    assert metrics["quarantined"] == 2
    assert metrics["clips_train"] == 10
    rows = [json.loads(line) for line in (path / "quarantine.jsonl").read_text().splitlines()]
    assert sorted(row["code"] for row in rows) == ["non_finite", "unreadable"]
    assert all(row["id"] for row in rows)


def test_too_many_bad_files_stop_the_run_and_are_named(source, tmp_path):
    (source / "3.wav").unlink()
    tone(source / "5.wav", high=True, seconds=30)
    with pytest.raises(
        ValueError, match=r"2 of 24 audio files are unusable \(8\.3%.*max_bad_fraction"
    ) as caught:
        run(source, tmp_path, max_bad_fraction=0.01)
    assert "missing" in str(caught.value)
    assert "too_long" in str(caught.value)


def test_a_manifest_may_not_leave_its_folder(source, tmp_path):
    tone(tmp_path / "outside.wav", high=True)
    with (source / "facts.csv").open("a", newline="") as file:
        csv.writer(file).writerow(["../outside.wav", "s-train", "train", "high"])
    with pytest.raises(ValueError, match=r"outside\.wav"):
        run(source, tmp_path)


def test_the_declared_defect_rate_is_the_actual_one(source, tmp_path):
    _, metrics = run(source, tmp_path, defect_rate=0.5, chats_per_clip=40)
    assert metrics["defect_rate_actual"] == pytest.approx(0.5, abs=0.05)
    _, clean = run(source, tmp_path / "clean", defect_rate=0.0)
    assert clean["defect_rate_actual"] == 0


def test_records_name_the_bad_line(source, tmp_path):
    path, _ = run(source, tmp_path)
    clips = path / "clips.jsonl"
    clips.write_text(clips.read_text() + '{"id": "x", "path": "y.wav", "split": "sideways"}\n')
    with pytest.raises(store.BadRecord, match=r"clips\.jsonl:25: AudioClip: split"):
        read(clips, AudioClip)


# -------------------------------------------------------------------------- a mixture


@pytest.fixture
def prepared(tmp_path):
    """Two prepared data sets of 6 and 3 tones, transcribed."""
    folders = []
    for name, n in (("first", 6), ("second", 3)):
        folder = tmp_path / name
        (folder / "audio").mkdir(parents=True)
        licence = {"licence": "MIT"} if name == "first" else {}
        (folder / "dataset.json").write_text(json.dumps({"name": name, "root": "audio", **licence}))
        clips, examples = [], []
        for i in range(n):
            tone(folder / "audio" / f"{10 * n + i}.wav", high=i % 2 == 0, seconds=0.2 + 0.01 * (n + i))
            path = f"{10 * n + i}.wav"
            digest = hashlib.sha256((folder / "audio" / path).read_bytes()).hexdigest()
            clips.append(AudioClip(id=path, path=path, split="train", duration_s=0.3, sha256=digest))
            examples.append(TaskExample(id=path, audios=(path,), task="transcribe", text=f"tone {i}"))
        store.write(folder / "clips.jsonl", clips)
        store.write(folder / "pretrain.jsonl", examples)
        folders.append(folder)
    return folders


def test_a_mixture_is_trained_on_where_its_audio_lies(prepared, tmp_path):
    sources = [{"folder": str(prepared[0])}, {"folder": str(prepared[1]), "share": 0.5}]
    mixture = CorpusConfig(stage="corpus", corpus="mixture", sources=sources, temperature=2.0)
    made = StageFolder(tmp_path / "run", "0_corpus", "x")
    made.open()
    metrics = corpus.run(mixture, {}, made)
    assert metrics["rows_pretrain"] == 9
    assert metrics["share_first"] == metrics["share_second"] == 0.5
    licences = [clip.licence for clip in read(made.path / "clips.jsonl", AudioClip)]
    assert licences == ["MIT"] * 6 + [None] * 3  # of a clip, else of its dataset, else not known
    shape = {"d_model": 32, "heads": 2, "audio_layers": 1, "text_layers": 1, "clip_s": 1, "vocab_size": 400}
    config = PretrainConfig(
        stage="pretrain", corpus="0_corpus", model=shape, steps=10, batch_size=4, learning_rate=1e-3
    )
    out = StageFolder(tmp_path / "run", "1_pretrain", "x")
    out.open()
    metrics = pretrain.run(config, {"0_corpus": made.path}, out)
    assert {"loss/source/first", "loss/source/second", "loss/task/transcribe"} <= metrics.keys()
    assert (out.path / "model" / "model.safetensors").is_file()


def test_without_a_phrasebook_it_is_said_what_needs_one(prepared, tmp_path):
    with pytest.raises(BadPhrasebook, match=r"phrasebook\.yaml does not exist.*judge: \{model"):
        Phrasebook.load(prepared[0] / "phrasebook.yaml")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"corpus": "synthetic", "clips": CLIPS, "dir": "b"}, "has no dir"),
        ({"corpus": "synthetic", "clips": CLIPS, "held_out": {"dev": ["ann"]}}, "no held_out"),
        ({"corpus": "synthetic"}, "needs clips"),
        ({"corpus": "synthetic", "clips": CLIPS, "max_duration_s": 2}, "last 3 s"),
        ({"corpus": "folder", "dir": "b", "clips": CLIPS}, "has no clips"),
        ({"corpus": "folder"}, "needs dir"),
        ({"corpus": "mixture"}, "needs sources"),
        ({"corpus": "mixture", "sources": [{"folder": "a"}], "dir": "b"}, "has no dir"),
        ({"corpus": "folder", "dir": "b", "sources": [{"folder": "a"}]}, "'folder' has no sources"),
        (
            {"corpus": "mixture", "sources": [{"folder": "a", "share": 1.0}, {"folder": "b"}]},
            "leave some of 1",
        ),
        (
            {"corpus": "mixture", "sources": [{"folder": "a", "share": 0.7}, {"folder": "b", "share": 0.7}]},
            "1.4",
        ),
        ({"corpus": "mixture", "sources": [{"folder": "a"}], "temperature": 0.5}, "temperature"),
    ],
)
def test_keys_that_a_corpus_has_no_use_for_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        CorpusConfig(stage="corpus", **settings)

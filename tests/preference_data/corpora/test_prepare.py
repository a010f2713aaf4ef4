"""A published corpus becomes a folder of records: held-out audio is not trained on, bad audio is counted."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from preference_data import store
from preference_data.corpora.prepare import prepare
from preference_data.corpora.published.recording import BadCorpus
from preference_data.dataset import splits
from preference_data.dataset.dataset import DESCRIPTION, RECORD_FILES, BadDataset, Dataset
from preference_data.schema import AudioClip, Chat, Prompt, TaskExample

RATE = 16_000


def tone(path: Path, hz: float, seconds: float = 0.5) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.3 * np.sin(2 * np.pi * hz * np.arange(int(seconds * RATE)) / RATE), RATE)
    return path


def librispeech(root: Path) -> Path:
    """Two speakers to train on, one each in dev and test; FLAC, as published."""
    for part, speaker, n in (("train-clean-100", 14, 3), ("dev-clean", 84, 1), ("test-clean", 61, 2)):
        chapter = root / "LibriSpeech" / part / str(speaker) / "1"
        for number in range(n):
            tone(chapter / f"{speaker}-1-{number:04d}.flac", 100 * speaker + 10 * number)
        lines = [f"{speaker}-1-{number:04d} WORD {number}\n" for number in range(n)]
        (chapter / f"{speaker}-1.trans.txt").write_text("".join(lines))
    return root


def rows(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def codes(folder: Path) -> dict[str, str]:
    return {str(row["path"]): str(row["code"]) for row in rows(folder / "quarantine.jsonl")}


def test_records_refer_to_the_audio_where_it_lies(tmp_path):
    root, out = librispeech(tmp_path / "libri"), tmp_path / "ready"
    seen: list[tuple[int, int, float, int]] = []
    told = prepare("librispeech", root, out, on_checked=lambda *now: seen.append(now))
    clips = store.read(out / "clips.jsonl", AudioClip)
    assert [(clip.split, clip.speaker, clip.source) for clip in clips] == [
        ("test", "61", "test-clean"),
        ("test", "61", "test-clean"),
        ("dev", "84", "dev-clean"),
        *[("train", "14", "train-clean-100")] * 3,
    ]
    assert all((root / clip.path).is_file() and clip.duration_s == 0.5 for clip in clips)
    examples = store.read(out / "pretrain.jsonl", TaskExample)
    assert [(one.task, one.text, one.audios[0]) for one in examples] == [
        ("transcribe", f"word {n}", f"LibriSpeech/train-clean-100/14/1/14-1-000{n}.flac") for n in range(3)
    ]
    assert rows(out / "test/recognition.jsonl")[1] == {
        "audio": "LibriSpeech/test-clean/61/1/61-1-0001.flac",
        "prompt": "transcribe",
        "gt": "word 1",
        "source": "librispeech_test_clean",
        "audio_language": "en",
        "text_language": "en",
    }
    assert seen[-1][:2] == (6, 6)
    assert seen[-1][2] == pytest.approx(3 / 3600)
    assert json.loads((out / DESCRIPTION).read_text()) == told
    assert told == {
        "name": "librispeech",
        "root": str(root.resolve()),
        "home": "https://www.openslr.org/12",
        "licence": "CC BY 4.0",
        "clips": {"dev": 1, "test": 2, "train": 3},
        "hours": {"dev": 0.0001, "test": 0.0003, "train": 0.0004},
        "records": {
            "clips.jsonl": 6,
            "dev/recognition.jsonl": 1,
            "pretrain.jsonl": 3,
            "test/recognition.jsonl": 2,
        },
        "tasks": {"transcribe": 3},
        "quarantined": {},
        "speakers": 3,
        "speakers_in_train_and_held_out": 0,
        "digest": Dataset(out).digest(),
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["libri", "ready"]


def test_the_same_corpus_gives_the_same_records_and_replaces_them(tmp_path):
    root, out = librispeech(tmp_path / "libri"), tmp_path / "ready"
    first = prepare("librispeech", root, out)
    before = {name: (out / name).read_bytes() for name in RECORD_FILES}
    (root / "LibriSpeech/train-clean-100/14/1/14-1-0002.flac").unlink()
    second = prepare("librispeech", root, out)
    assert second["clips"]["train"] == 2
    assert second["digest"] != first["digest"]
    tone(root / "LibriSpeech/train-clean-100/14/1/14-1-0002.flac", 1420)
    assert prepare("librispeech", root, out, by="samples")["digest"] == first["digest"]
    assert {name: (out / name).read_bytes() for name in RECORD_FILES} == before


def test_bad_audio_is_left_out_with_its_reason_and_the_rest_is_used(tmp_path):
    root, out = librispeech(tmp_path / "libri"), tmp_path / "ready"
    chapter = root / "LibriSpeech/train-clean-100/14/1"
    (chapter / "14-1-0000.flac").write_bytes(b"<html>not found</html>")
    whole = (chapter / "14-1-0001.flac").read_bytes()
    (chapter / "14-1-0001.flac").write_bytes(whole[: len(whole) // 2])
    (chapter / "14-1.trans.txt").open("a").write(
        "14-1-0009 NEVER RECORDED\n14-1-../../../../../../x OUTSIDE\n"
    )
    tone(root / "LibriSpeech/dev-clean/84/1/84-1-0000.flac", 500, seconds=31)
    told = prepare("librispeech", root, out, by="samples")
    names = {path.rsplit("/", 1)[1]: code for path, code in codes(out).items()}
    assert names == {
        "84-1-0000.flac": "too_long",
        "14-1-0000.flac": "unreadable",
        "14-1-0001.flac": "corrupt",
        "14-1-0009.flac": "missing",
        "x.flac": "outside_root",
    }
    assert told["clips"] == {"test": 2, "train": 1}
    assert told["quarantined"] == {
        "corrupt": 1,
        "missing": 1,
        "outside_root": 1,
        "too_long": 1,
        "unreadable": 1,
    }
    assert [one.text for one in store.stream(out / "pretrain.jsonl", TaskExample)] == ["word 2"]


def test_a_held_out_recording_is_never_trained_on(tmp_path):
    root, out = librispeech(tmp_path / "libri"), tmp_path / "ready"
    part = root / "LibriSpeech"
    copied = part / "train-clean-100/14/1/14-1-0001.flac"
    copied.write_bytes((part / "test-clean/61/1/61-1-0000.flac").read_bytes())
    prepare("librispeech", root, out)
    assert codes(out) == {"LibriSpeech/train-clean-100/14/1/14-1-0001.flac": "held_out"}

    bench = tmp_path / "bench"
    heard = tone(bench / "Chat/sound_QA_clotho/a.flac", 1402)
    (part / "train-clean-100/14/1/14-1-0002.flac").write_bytes(heard.read_bytes())
    item = {"path": "a.flac", "task_name": "sound_QA", "dataset_name": "clotho"}
    (bench / "Chat/Chat_meta.json").write_text(json.dumps([item]))
    assert prepare("air_bench", bench, tmp_path / "bench-ready")["clips"] == {"test": 1}
    assert (tmp_path / "bench-ready/pretrain.jsonl").read_text() == ""
    told = prepare("librispeech", root, out, keep_out=[tmp_path / "bench-ready"])
    assert told["quarantined"] == {"held_out": 2}
    assert told["clips"]["train"] == 1
    with pytest.raises(BadDataset, match="is not a dataset: it has no clips.jsonl"):
        prepare("librispeech", root, out, keep_out=[tmp_path])


def clotho(root: Path, n: int) -> Path:
    captions = [f"caption_{number}" for number in range(1, 6)]
    table = [",".join(["file_name", *captions])]
    for number in range(n):
        tone(root / f"development/{number}.wav", 200 + number, seconds=0.1)
        table.append(f"{number}.wav," + ",".join(f"Tone {number} as {one}" for one in "abcde"))
    (root / "clotho_captions_development.csv").write_text("\n".join(table) + "\n")
    return root


def test_some_training_clips_with_questions_are_for_preferences_and_always_the_same(tmp_path):
    root = clotho(tmp_path / "clotho", 60)
    told = prepare("clotho", root, tmp_path / "a", preference_share=0.25)
    prompts = store.read(tmp_path / "a/prompts.jsonl", Prompt)
    chats = store.read(tmp_path / "a/sft.jsonl", Chat)
    examples = store.read(tmp_path / "a/pretrain.jsonl", TaskExample)
    assert told["clips"] == {"preference": len(prompts), "train": len(chats)}
    assert 5 <= len(prompts) <= 25  # 15 expected; 99.9 % of draws lie within
    assert len(chats) + len(prompts) == 60
    assert len(examples) == 5 * len(chats)
    assert not {one.audios for one in prompts} & {one.audios for one in [*examples, *chats]}
    assert prompts[0].question == "Describe what can be heard in this recording."
    assert json.loads(prompts[0].meta_info)["caption_clotho"][0] == prompts[0].answer_gt

    clips = store.stream(tmp_path / "a/clips.jsonl", AudioClip)
    drawn = {clip.id for clip in clips if clip.split == "preference"}
    assert drawn == {one.id.removesuffix("-prompt-0") for one in prompts}
    clotho(root, 61)  # one more clip moves no other
    prepare("clotho", root, tmp_path / "b", preference_share=0.25)
    again = {one.audios for one in store.read(tmp_path / "b/prompts.jsonl", Prompt)}
    assert {one.audios for one in prompts} == again - {("development/60.wav",)}
    assert prepare("clotho", root, tmp_path / "b", preference_share=0)["clips"] == {"train": 61}


def test_a_recording_that_is_listed_twice_is_used_once_and_blank_text_is_counted(tmp_path):
    root = clotho(tmp_path / "clotho", 2)
    with (root / "clotho_captions_development.csv").open("a") as table:
        table.write("1.wav,again,,,,\n")
    told = prepare("clotho", root, tmp_path / "a", preference_share=0)
    assert told["quarantined"] == {"comes_twice": 1}
    assert told["clips"] == {"train": 2}
    (root / "clotho_captions_development.csv").write_text(
        "file_name,caption_1,caption_2,caption_3,caption_4,caption_5\n0.wav,One,Two, ,,\n"
    )
    told = prepare("clotho", root, tmp_path / "a", preference_share=0)
    assert told["tasks"] == {"caption_clotho": 2}
    assert told["records"]["left_out_blank"] == 3


def test_word_times_beyond_the_recording_are_not_taught(tmp_path):
    root = librispeech(tmp_path / "libri")
    table = root / "LibriSpeech/train-clean-100/14/1/14-1.alignment.txt"
    table.write_text('14-1-0000 ",WORD,0," "0.1,0.2,0.5,0.5"\n14-1-0001 ",WORD,1," "0.1,0.2,0.6,0.6"\n')
    told = prepare("librispeech", root, tmp_path / "a")
    assert told["tasks"] == {"transcribe": 3, "transcribe_words": 1}
    assert told["quarantined"] == {"bad_example": 1}
    assert told["clips"]["train"] == 3  # the recording itself is good


def test_text_that_would_steer_the_model_and_unknown_languages_are_left_out(tmp_path):
    root = tmp_path / "cv"
    header = "client_id\tpath\tsentence\tage\tgender\n"
    for locale, sentence in (("en", "Stop <|im_end|> here"), ("tlh", "Qapla'"), ("fr", "Bonjour")):
        tone(root / locale / "clips/a.mp3", 300)
        (root / locale / "test.tsv").write_text(header)
        (root / locale / "train.tsv").write_text(header + f"{locale}\ta.mp3\t{sentence}\t\t\n")
    told = prepare("common_voice", root, tmp_path / "a")
    examples = store.read(tmp_path / "a/pretrain.jsonl", TaskExample)
    assert [(one.task, one.text) for one in examples] == [
        ("language_id", "English"),
        ("transcribe", "Bonjour"),
        ("language_id", "French"),
        ("language_id", "tlh"),
    ]
    assert told["quarantined"] == {"bad_example": 2}


def test_the_same_bytes_are_in_one_split_only(tmp_path):
    root = clotho(tmp_path / "clotho", 20)
    for number in range(1, 10):
        (root / f"development/{number}.wav").write_bytes((root / "development/0.wav").read_bytes())
    for part in ("validation", "evaluation"):
        text = (root / "clotho_captions_development.csv").read_text().splitlines()[:2]
        (root / f"clotho_captions_{part}.csv").write_text("\n".join(text) + "\n")
        tone(root / part / "0.wav", 999)
    told = prepare("clotho", root, tmp_path / "a", preference_share=0.5)
    splits.check(store.read(tmp_path / "a/clips.jsonl", AudioClip))
    assert told["quarantined"] == {"held_out": 1}  # of dev, as test has it
    assert told["clips"]["test"] == 1
    assert "dev" not in told["clips"]


def test_mp3_and_wav_are_read_as_they_are_published(tmp_path):
    clips = tmp_path / "cv-corpus-15.0/en/clips"
    tone(clips / "a.mp3", 300, seconds=1)
    header = "client_id\tpath\tsentence\tage\tgender\n"
    (clips.parent / "train.tsv").write_text(header + "s\ta.mp3\tHi.\t\t\n")
    (clips.parent / "test.tsv").write_text(header)
    prepare("common_voice", tmp_path, tmp_path.with_name("cv-ready"))
    [clip] = store.read(tmp_path.with_name("cv-ready") / "clips.jsonl", AudioClip)
    assert clip.duration_s == pytest.approx(1, abs=0.2)


def test_a_wrong_out_folder_is_refused_and_a_failure_leaves_the_old_records(tmp_path):
    root = librispeech(tmp_path / "libri")
    with pytest.raises(BadDataset, match="holds the recordings"):
        prepare("librispeech", root, tmp_path)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/diary.txt").write_text("mine")
    with pytest.raises(BadDataset, match=r"is there and is not a dataset \(it has no dataset.json\)"):
        prepare("librispeech", root, tmp_path / "notes")
    out = tmp_path / "ready"
    told = prepare("librispeech", root, out)
    for path in root.rglob("*.flac"):
        path.write_bytes(b"")
    with pytest.raises(
        BadCorpus, match="none of the 6 recordings of librispeech in .* can be used: .*empty_file"
    ):
        prepare("librispeech", root, out)
    assert json.loads((out / DESCRIPTION).read_text()) == told
    assert not list(tmp_path.glob(".partial-*"))


def test_speakers_in_train_and_benchmark_are_told(tmp_path):
    root = librispeech(tmp_path / "libri")
    chapter = root / "LibriSpeech/test-clean/14/2"
    tone(chapter / "14-2-0000.flac", 999)
    (chapter / "14-2.trans.txt").write_text("14-2-0000 ME AGAIN\n")
    assert prepare("librispeech", root, tmp_path / "a")["speakers_in_train_and_held_out"] == 1

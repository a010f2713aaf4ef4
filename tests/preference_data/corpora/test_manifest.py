"""Own audio with whatever is known about it becomes a dataset; what cannot be used is named with its line."""

import csv
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml
from datasets import Audio, DatasetDict
from datasets import Dataset as HubDataset

from preference_data.corpora.manifest import Rules, prepare, read_questions
from preference_data.corpora.manifest_rows import BadManifest, Table, read_row, tables_of
from preference_data.dataset.dataset import Dataset, read_rows
from preference_data.dataset.licences import is_allowed
from preference_data.interchange.columns import BadRow
from preference_data.schema import AudioClip, Chat, Prompt, TaskExample, Turn

RULES = Rules(name="mine", max_duration_s=5.0, max_bad_fraction=0.5)
QUESTIONS = ["What is heard?", "Describe the recording.", "Is it loud?"]


def tone(path, number, seconds=0.3):
    path.parent.mkdir(parents=True, exist_ok=True)
    t = np.arange(int(16_000 * seconds)) / 16_000
    soundfile.write(path, (0.3 * np.sin(2 * np.pi * (200 + 7 * number) * t)).astype(np.float32), 16_000)


@pytest.fixture
def folder(tmp_path):
    """Forty tones below `mine/clips`."""
    for number in range(40):
        tone(tmp_path / f"mine/clips/{number}.wav", number)
    return tmp_path / "mine"


def answered(number, **more):
    return {
        "audio": f"clips/{number}.wav",
        "question": "How high is it?",
        "reference": f"{200 + 7 * number} Hz.",
        **more,
    }


def write(path, rows):
    """The rows as a file of the kind that its name says."""
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        HubDataset.from_list(rows).to_parquet(path)
    else:
        lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return path


def prepared(manifest, out, **rules):
    out.mkdir(exist_ok=True)
    metrics = prepare(out, manifest, RULES._replace(**rules), by="header")
    return Dataset(out), metrics


def splits_of(dataset):
    return {clip.path: clip.split for clip in dataset.records(AudioClip)}


# -------------------------------------------------------------------------- every kind of file


@pytest.mark.parametrize("name", ["m.jsonl", "m.jsonl.gz", "m.csv", "m.parquet"])
def test_a_table_of_questions_and_answers(folder, tmp_path, name):
    rows = [answered(n, speaker=f"s{n % 8}", licence="CC0-1.0") for n in range(40)]
    dataset, metrics = prepared(
        write(folder / name, rows), tmp_path / "out", held_out={"dev": 0.1, "test": 0.2}
    )
    clips = list(dataset.records(AudioClip))
    assert metrics["rows"] == len(clips) == 40
    assert metrics["quarantined"] == 0
    by_split = {split: {c.speaker for c in clips if c.split == split} for split in ("train", "dev", "test")}
    assert len(by_split["dev"]) == 1
    assert len(by_split["test"]) == 2  # of 8 speakers with 5 clips each
    assert not (by_split["dev"] | by_split["test"]) & by_split["train"]
    assert {clip.licence for clip in clips} == {"CC0-1.0"}
    assert dataset.about["licence"] == "CC0-1.0"
    assert dataset.find(clips[0].path) == folder / "clips/0.wav"
    made = {kind: list(dataset.records(kind)) for kind in (TaskExample, Chat, Prompt)}
    assert len(made[Chat]) == len(made[TaskExample]) == metrics["clips_train"]
    assert {example.task for example in made[TaskExample]} == {"question_answer"}
    assert len(made[Prompt]) == metrics["clips_preference"] > 0
    prompt = made[Prompt][0]
    assert (prompt.question, prompt.task_name) == ("How high is it?", "speech_and_sound_QA")
    assert prompt.answer_gt.endswith("Hz.")
    for split in ("dev", "test"):
        items = json.loads((tmp_path / "out" / split / "Chat/Chat_meta.json").read_text())
        assert len(items) == metrics[f"questions_{split}"] == metrics[f"clips_{split}"]
        for item in items:
            path = f"{split}/Chat/{item['task_name']}_{item['dataset_name']}/{item['path']}"
            assert dataset.find(path).read_bytes().startswith(b"RIFF")
    again, _ = prepared(folder / name, tmp_path / "again", held_out={"dev": 0.1, "test": 0.2})
    assert again.digest() == dataset.digest()


def test_what_datasets_saves_and_the_hub_holds(folder, tmp_path):
    rows = [{**answered(n), "audio": str(folder / f"clips/{n}.wav")} for n in range(12)]
    split = {"train": rows[:8], "validation": rows[8:10], "test": rows[10:]}
    whole = DatasetDict(
        {
            name: HubDataset.from_list(part).cast_column("audio", Audio(decode=False))
            for name, part in split.items()
        }
    )
    whole.save_to_disk(tmp_path / "saved")
    for name, part in whole.items():
        embedded = [
            {**row, "audio": {"bytes": (folder / f"clips/{n}.wav").read_bytes(), "path": f"{n}.wav"}}
            for n, row in enumerate(split[name], start=rows.index(split[name][0]))
        ]
        (tmp_path / "hub/data").mkdir(parents=True, exist_ok=True)
        HubDataset.from_list(embedded).to_parquet(tmp_path / f"hub/data/{name}-00000-of-00001.parquet")
        assert len(part) == len(embedded)
    digests = []
    for kind in ("saved", "hub"):
        dataset, metrics = prepared(tmp_path / kind, tmp_path / f"out-{kind}", preference_share=0.25)
        counts = {key: n for key, n in metrics.items() if key.startswith("clips_")}
        assert counts["clips_dev"] == counts["clips_test"] == 2
        assert counts["clips_train"] + counts["clips_preference"] == 8
        assert metrics["quarantined"] == 0
        clip = next(iter(dataset.records(AudioClip)))
        assert dataset.find(clip.path).is_relative_to(tmp_path / f"out-{kind}")  # it came within the row
        moved = (tmp_path / f"out-{kind}").rename(tmp_path / f"moved-{kind}")
        assert Dataset(moved).find(clip.path).is_file()
        written = {path.name for path in (moved / "audio").iterdir()}
        assert written == {clip.path for clip in Dataset(moved).records(AudioClip)}
        digests.append({clip.sha256: clip.split for clip in Dataset(moved).records(AudioClip)})
    assert digests[0] == digests[1]


def test_an_audio_folder_of_hugging_face(folder, tmp_path):
    for split, numbers in (("train", range(6)), ("validation", range(6, 9))):
        (folder / split).mkdir()
        for n in numbers:
            (folder / f"clips/{n}.wav").rename(folder / split / f"{n}.wav")
        write(
            folder / split / "metadata.csv", [{"file_name": f"{n}.wav", "text": f"tone {n}"} for n in numbers]
        )
    dataset, metrics = prepared(folder, tmp_path / "out")
    assert splits_of(dataset) == {
        **{f"train/{n}.wav": "train" for n in range(6)},
        **{f"validation/{n}.wav": "dev" for n in range(6, 9)},
    }
    assert {(example.task, example.text) for example in dataset.records(TaskExample)} == {
        ("transcribe", f"tone {n}") for n in range(6)
    }
    rows = list(read_rows(tmp_path / "out/dev/recognition.jsonl"))
    assert rows[0] == {
        "audio": "validation/6.wav",
        "prompt": "transcribe",
        "gt": "tone 6",
        "source": "transcribe/mine",
    }
    assert not (tmp_path / "out/dev/Chat").exists()  # nothing is asked about them
    assert metrics["questions_dev"] == 0


def cut(number, start=0.0, duration=0.3, **recording):
    source = {"type": "file", "channels": [0], "source": f"clips/{number}.wav"}
    return {
        "id": f"cut-{number}",
        "start": start,
        "duration": duration,
        "channel": 0,
        "supervisions": [
            {
                "id": f"sup-{number}",
                "recording_id": "r",
                "start": 0.0,
                "duration": duration,
                "channel": 0,
                "text": f"tone {number}",
                "language": "en",
                "speaker": f"s{number}",
                "custom": {"room": "A"},
            }
        ],
        "recording": {
            "id": "r",
            "sources": [source],
            "sampling_rate": 16000,
            "num_samples": 4800,
            "duration": 0.3,
            "channel_ids": [0],
            **recording,
        },
        "custom": {"question": "What is said?"},
        "type": "MonoCut",
    }


def test_cuts_of_lhotse(folder, tmp_path):
    odd = [
        (cut(8, start=0.1, duration=0.1), "is 0.1 s to 0.2 s of a recording of 0.3 s; .*save_audios"),
        (cut(9, transforms=[{"name": "Speed"}]), "a changed copy"),
        ({**cut(10), "recording": None, "type": "MixedCut"}, "is a MixedCut, not a cut of a recording"),
        ({**cut(12), "start": "soon"}, "is not a cut as lhotse writes it"),
        (cut(11, sources=[{"type": "command", "channels": [0], "source": "sox"}]), "is not one file"),
    ]
    manifest = write(folder / "cuts.jsonl.gz", [*(cut(n) for n in range(8)), *(row for row, _ in odd)])
    dataset, metrics = prepared(manifest, tmp_path / "out", preference_share=0.0)
    assert metrics["clips_train"] == 8
    examples = list(dataset.records(TaskExample))
    assert (examples[3].id, examples[3].text, examples[3].audio_language) == (
        "cut-3-transcribe",
        "tone 3",
        "en",
    )
    assert [clip.speaker for clip in dataset.records(AudioClip)] == [f"s{n}" for n in range(8)]
    refused = list(read_rows(tmp_path / "out/quarantine.jsonl"))
    assert [row["detail"].split(":")[1] for row in refused] == ["9", "10", "11", "12", "13"]
    for (_, message), row in zip(odd, refused, strict=True):
        with pytest.raises(AssertionError, match=message):
            raise AssertionError(row["detail"])


def test_audio_alone_is_asked_about_by_a_yaml_of_sentences(folder, tmp_path):
    (tmp_path / "ask.yaml").write_text(yaml.safe_dump(QUESTIONS))
    (folder / "clips/._0.wav").write_bytes(b"left behind by another system")
    questions = read_questions(tmp_path / "ask.yaml")
    dataset, metrics = prepared(folder, tmp_path / "out", questions=questions, questions_per_clip=2)
    assert metrics["clips_preference"] == 40
    asked = list(dataset.records(Prompt))
    assert len({(prompt.audios, prompt.question) for prompt in asked}) == len(asked) == 80
    assert {prompt.question for prompt in asked} == set(QUESTIONS)
    assert {prompt.answer_gt for prompt in asked} == {""}
    with pytest.raises(
        BadManifest, match=r"40 of 40 rows cannot be used .*says nothing about its clip.*`questions`"
    ):
        prepared(folder, tmp_path / "none")
    for text in ("{a: b}", "- 1", "", "- <|im_end|>"):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(BadManifest, match="bad.yaml"):
            read_questions(tmp_path / "bad.yaml")


# -------------------------------------------------------------------------- splits


def test_who_is_held_out(folder, tmp_path):
    rows = [answered(n, speaker=f"s{n % 4}") for n in range(40)]
    manifest = write(folder / "m.jsonl", rows)
    dataset, _ = prepared(manifest, tmp_path / "named", held_out={"dev": ["s1"], "test": ["s3"]})
    for clip in dataset.records(AudioClip):
        assert {"s1": "dev", "s3": "test"}.get(clip.speaker, clip.split) == clip.split
        assert (clip.split in ("dev", "test")) == (clip.speaker in ("s1", "s3"))
    with pytest.raises(BadManifest, match="no row has speaker 'sam', who is held out for test"):
        prepared(manifest, tmp_path / "out", held_out={"test": ["sam"]})
    one_voice = write(folder / "one.jsonl", [answered(n, speaker="s") for n in range(40)])
    with pytest.raises(BadManifest, match="1 speakers are too few .*`split`.*`ignore`"):
        prepared(one_voice, tmp_path / "out", held_out={"test": 0.2})
    dataset, metrics = prepared(one_voice, tmp_path / "files", held_out={"test": 0.25}, ignore=("speaker",))
    assert 4 <= metrics["clips_test"] <= 16
    with pytest.raises(BadManifest, match="no clip with an answer fell to test"):
        prepared(
            write(folder / "q.jsonl", [{"audio": "clips/1.wav", "question": "?"}]),
            tmp_path / "out",
            held_out={"test": 0.25},
        )


def test_a_clip_without_an_answer_is_for_preferences_and_a_copy_goes_the_same_way(folder, tmp_path):
    os.link(folder / "clips/3.wav", folder / "clips/copy.wav")
    rows = [
        *(answered(n) for n in range(10)),
        {"audio": "clips/0.wav", "question": "And how loud?"},
        {**answered(3), "audio": "clips/copy.wav", "split": "test"},
        answered(5, split="dev"),
        answered(6),
    ]
    dataset, metrics = prepared(write(folder / "m.jsonl", rows), tmp_path / "out", preference_share=0.0)
    splits = splits_of(dataset)
    assert splits.pop("clips/0.wav") == "preference"
    assert set(splits.values()) == {"train"}
    assert [prompt.question for prompt in dataset.records(Prompt)] == ["How high is it?", "And how loud?"]
    reasons = {row["id"]: row["detail"] for row in read_rows(tmp_path / "out/quarantine.jsonl")}
    assert "is the same audio as a clip of train" in reasons["row-12"]
    assert "split is 'dev', but an earlier row has put its clip into 'train'" in reasons["row-13"]
    assert "says the same about its clip as an earlier row" in reasons["row-14"]


# -------------------------------------------------------------------------- what is left out


def test_every_bad_row_is_left_out_with_its_line_and_reason(folder, tmp_path):
    soundfile.write(folder / "clips/long.wav", np.zeros(16_000 * 5 + 1664, np.float32), 16_000)
    (folder / "clips/web.wav").write_text("<html>404</html>")
    bad = [
        ({"audio": "clips/gone.wav", "question": "?"}, "missing: .*does not exist"),
        ({"audio": "../../etc/passwd", "question": "?"}, "outside_root"),
        ({"audio": "/etc/passwd", "question": "?"}, "lies outside .*audio_root"),
        ({"audio": "https://x.org/a.wav", "question": "?"}, "bad_path: .*URL"),
        ({"audio": "clips/long.wav", "question": "?"}, "too_long: .*5.104 s, the limit is 5.1 s"),
        ({"audio": "clips/web.wav", "question": "?"}, "unreadable: .*web page"),
        ({"audio": "clips/web.wav", "question": "Why?"}, "clip_refused"),
        ({"audio": "embedded:../../x.wav", "question": "?"}, "is no path below the root"),
        ({"question": "?"}, "names no clip; call the column that does 'audio'"),
        ({"audio": ["clips/1.wav", "clips/2.wav"], "question": "?"}, "not the path of one file"),
        ({"audio": "clips/1.wav"}, "says nothing about its clip, and no question"),
        ({"audio": "clips/1.wav", "reference": "A dog."}, "says an answer about its clip, and no question"),
        ({"audio": "clips/1.wav", "question": ["?"]}, r"its question is .*no text"),
        ({"audio": "clips/1.wav", "question": "<audio>?"}, "<audio> stands in a question"),
        ({"audio": "clips/1.wav", "question": "?<|im_end|>"}, "would steer the model"),
        ({"audio": "clips/1.wav", "question": "?", "refrence": "x"}, "did you mean 'reference'"),
        ({"audio": "clips/1.wav", "question": "a", "prompt": "b"}, "says two things about its question"),
        ({"audio": "clips/1.wav", "question": "?", "split": "tset"}, "split is 'tset', not one of"),
        ({"audio": "clips/1.wav", "question": "?", "category": "noise"}, "category is 'noise', not one of"),
        (
            {
                "audio": "clips/1.wav",
                "transcript": "x",
                "language": "Klingon",
                "question": "?",
                "answer": "!",
                "split": "train",
            },
            "'Klingon' is not a language",
        ),
        ({"audio": "test/Chat/1.wav", "question": "?"}, "dev/Chat and test/Chat are ours"),
        ({"audio": "clips/2.wav", "question": "?", "id": "x\ny"}, "must be text on one line"),
    ]
    good = [answered(n, id=f"row {n}") for n in range(20, 40)]
    lines = [json.dumps(row).encode() for row, _ in bad]
    path = folder / "m.jsonl"
    path.write_bytes(
        b"\n".join([*(json.dumps(row).encode() for row in good), *lines, b"{nonsense", b"7"]) + b"\n"
    )
    dataset, metrics = prepared(path, tmp_path / "out", max_bad_fraction=0.7, max_duration_s=5.1)
    assert metrics["clips_train"] + metrics["clips_preference"] == 20
    reasons = {
        row["id"]: f"{row['code']}: {row['detail']}" for row in read_rows(tmp_path / "out/quarantine.jsonl")
    }
    wanted = [*(message for _, message in bad), "is not JSON", "is a int, not an object"]
    assert len(reasons) == len(wanted) == metrics["quarantined"]
    for number, message in enumerate(wanted, start=21):
        with pytest.raises(AssertionError, match=message):
            raise AssertionError(reasons[f"row-{number}"])
        assert f"m.jsonl:{number}: " in reasons[f"row-{number}"]
    assert {prompt.id for prompt in dataset.records(Prompt)} <= {row["id"] for row in good}
    with pytest.raises(
        BadManifest, match=r"18 of 44 rows cannot be used \(40.9%, allowed max_bad_fraction=1.0%"
    ):
        prepared(path, tmp_path / "strict", max_bad_fraction=0.01)
    assert (
        len(list(read_rows(tmp_path / "strict/quarantine.jsonl"))) == 23
    )  # what can be known before writing


def test_clips_that_are_too_long_name_the_keys_to_raise(folder, tmp_path):
    manifest = write(folder / "m.jsonl", [answered(n) for n in range(40)])
    with pytest.raises(
        BadManifest, match=r"40 of 40 clips .*0.3 s, the limit is 0.29 s.*max_duration_s.*clip_s"
    ):
        prepared(manifest, tmp_path / "out", max_duration_s=0.29)


def test_licences_are_kept_per_clip_and_filter(folder, tmp_path):
    names = ["CC BY 4.0", "cc-by-4.0", "CC-BY-NC-4.0", None]
    rows = [answered(n, license=names[n % 4]) for n in range(8)]
    manifest = write(folder / "m.jsonl", rows)
    dataset, metrics = prepared(manifest, tmp_path / "out", licences=["CC-BY-4.0"])
    assert {clip.licence for clip in dataset.records(AudioClip)} == {"CC BY 4.0", "cc-by-4.0"}
    assert metrics["quarantined"] == 4
    codes = {row["code"] for row in read_rows(tmp_path / "out/quarantine.jsonl")}
    assert codes == {"licence"}
    everything, _ = prepared(manifest, tmp_path / "all", licence="proprietary")
    assert everything.about["licences"] == {
        "CC BY 4.0": 2,
        "cc-by-4.0": 2,
        "CC-BY-NC-4.0": 2,
        "proprietary": 2,
    }
    with pytest.raises(BadManifest, match=r"no clip is left \(licence 8\)"):
        prepared(manifest, tmp_path / "none", licences=["MIT"])
    assert is_allowed(None, ())
    assert not is_allowed(None, ["MIT"])


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "holds no audio and no table"),
        (["questions.csv", "a.wav"], "holds questions.csv; name that file"),
    ],
)
def test_a_folder_that_is_no_manifest(tmp_path, files, message):
    for name in files:
        (tmp_path / name).write_text("x")
    with pytest.raises(BadManifest, match=message):
        tables_of(tmp_path)


def test_files_that_are_no_manifest(tmp_path):
    with pytest.raises(BadManifest, match="there is no file or folder"):
        tables_of(tmp_path / "gone.csv")
    (tmp_path / "a.xlsx").write_bytes(b"PK\x03\x04")
    with pytest.raises(BadManifest, match="a manifest's name ends with one of .jsonl"):
        tables_of(tmp_path / "a.xlsx")
    for name, content in (
        ("a.jsonl.gz", gzip.compress(b'{"audio": 1}\n' * 999)[:40]),
        ("a.arrow", b"x"),
        ("a.parquet", b"x"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadManifest, match=f"{name} is"):
            prepare(tmp_path / "out", tmp_path / name, RULES)


def test_a_column_that_nothing_reads_is_none_of_ours(tmp_path):
    table = Table(tmp_path / "m.csv", "m.csv")
    row = {"audio": "a.wav", "question": "?", "room": 3, "snr_db": 1.5}
    assert read_row(row, tmp_path, table).question == "?"
    with pytest.raises(BadRow, match="did you mean 'speaker'"):
        read_row({**row, "speakers": "ann"}, tmp_path, table)
    assert read_row({**row, "speakers": "ann"}, tmp_path, table, ignored=["speakers"]).speaker == ""


MANY_ROWS = """
import json, re, resource, sys
from pathlib import Path

from preference_data.corpora.manifest import Rules, prepare

if __name__ == "__main__":
    rules = Rules("many", 5.0, 0.0, held_out={"dev": 0.01, "test": 0.01})
    metrics = prepare(Path(sys.argv[2]), Path(sys.argv[1]), rules, by="header")
    status = Path("/proc/self/status").read_text()  # getrusage tells of what started this program, too
    own = int(re.search(r"VmHWM:\\s*(\\d+) kB", status)[1])
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    print(json.dumps({**metrics, "megabytes": max(own, children) / 1024}))
"""


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_memory_does_not_grow_with_rows(tmp_path):
    """300,000 rows, those of a clip far apart; as objects they would take as many kilobytes."""
    tone(tmp_path / "mine/first.wav", 0, seconds=0.05)
    head = (tmp_path / "mine/first.wav").read_bytes()[:44]
    noise = np.random.default_rng(0).integers(-3000, 3000, (20_000, 800)).astype("<i2")
    for number, samples in enumerate(noise):
        (tmp_path / f"mine/{number}.wav").write_bytes(head + samples.tobytes())
    with (tmp_path / "mine/m.jsonl").open("w") as file:
        for n in range(300_000):
            clip, part = n % 20_000, n // 20_000
            row = {
                "audio": f"{clip}.wav",
                "question": f"What is heard in part {part}?",
                "reference": f"Noise {n}.",
            }
            file.write(json.dumps({**row, "speaker": f"s{clip % 5000}", "licence": "CC0-1.0"}) + "\n")
    (tmp_path / "many_rows.py").write_text(MANY_ROWS)
    command = [sys.executable, tmp_path / "many_rows.py", tmp_path / "mine/m.jsonl", tmp_path / "out"]
    (tmp_path / "out").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    measured = json.loads(done.stdout)
    assert measured["rows"] == 300_000
    assert measured["quarantined"] == 0
    assert measured["megabytes"] < 300


# -------------------------------------------------------------------------- conversations


def says(role, content):
    return {"role": role, "content": content}


SAID = [
    says("system", "Be brief."),
    says("user", "<audio>What is it?"),
    says("assistant", "A tone."),
    says("user", "How high?"),
]


def test_a_conversation_without_a_last_answer_is_a_prompt_and_one_with_it_a_chat(folder, tmp_path):
    clips = [{"audio": f"clips/{n}.wav", "split": "train"} for n in range(40)]
    rows = [
        {**clips[0], "messages": SAID},
        {**clips[1], "messages": [*SAID, says("assistant", "200 Hz.")]},
        {
            **clips[2],
            "messages": [says("user", "Hi"), says("assistant", "Yes?"), says("user", "<audio>High?")],
        },
        {**clips[3], "messages": SAID, "reference": "221 Hz."},
        {**clips[4], "messages": [SAID[0], says("user", "How?"), says("assistant", "So.")]},
        {**clips[5], "question": "How?", "reference": "So."},
    ]
    dataset, metrics = prepared(write(folder / "m.jsonl", rows), tmp_path / "out", preference_share=0.0)
    assert metrics["quarantined"] == 0
    asked = {prompt.audios[0]: prompt for prompt in dataset.records(Prompt)}
    first, last = asked["clips/0.wav"], asked["clips/2.wav"]
    assert len(asked) == 2
    assert (first.system, first.question, first.answer_gt) == ("Be brief.", "How high?", "")
    assert first.history == (Turn(question="What is it?", answer="A tone.", audios=("clips/0.wav",)),)
    assert last.history == (Turn(question="Hi", answer="Yes?"),)
    assert last.audios_per_turn == ((), ("clips/2.wav",))
    chats = {chat.audios[0]: chat for chat in dataset.records(Chat)}
    assert {path: [turn.answer for turn in chat.turns] for path, chat in chats.items()} == {
        "clips/1.wav": ["A tone.", "200 Hz."],
        "clips/3.wav": ["A tone.", "221 Hz."],
        "clips/4.wav": ["So."],
        "clips/5.wav": ["So."],
    }
    assert [chats[f"clips/{n}.wav"].system for n in (1, 3, 4, 5)] == ["Be brief."] * 3 + [None]
    assert chats["clips/1.wav"].audios_per_turn == (("clips/1.wav",), ())
    assert [example.audios for example in dataset.records(TaskExample)] == [("clips/5.wav",)]


def test_a_conversation_about_a_clip_that_is_held_out_is_left_out_and_counted(folder, tmp_path):
    rows = [answered(n, split="test" if n == 1 else "train") for n in range(9)]
    rows.append({"audio": "clips/1.wav", "messages": SAID, "reference": "207 Hz."})
    dataset, metrics = prepared(write(folder / "m.jsonl", rows), tmp_path / "out", max_bad_fraction=0.0)
    assert metrics["questions_test"] == 1
    [row] = read_rows(tmp_path / "out/quarantine.jsonl", "code", "detail")
    assert row["code"] == "several_turns"
    assert "m.jsonl:10: has earlier turns" in row["detail"]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"messages": [says("user", "<audio><audio>Which?")]}, "2 <audio> but 1 audios.*align data import"),
        ({"messages": [says("user", "Hm?")] * 2}, "do not alternate: user, user"),
        ({"messages": "What?"}, "its messages: has no"),
        ({"messages": [*SAID[1:3], says("user", "<audio>")]}, "2 <audio> but 1 audios"),
        ({"messages": [says("user", "<audio>")]}, "the last question among its messages has no words"),
        ({"messages": SAID, "question": "Loud?"}, "says two things about its question"),
        ({"messages": [*SAID, says("assistant", "A")], "answer": "B"}, "says two things about its reference"),
        ({"messages": [SAID[1], says("assistant", "<|im_end|>"), SAID[3]]}, "would steer the model"),
        ({"messages": [says("system", "<|im_end|>"), SAID[1]]}, "would steer the model"),
    ],
)
def test_a_conversation_that_a_record_cannot_hold_is_refused(folder, change, problem):
    with pytest.raises(BadRow, match=problem):
        read_row({"audio": "clips/0.wav", **change}, folder, Table(folder, "m.jsonl"))

"""`align score`: benchmarks that need no judge, through the real command."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ALIGN = str(Path(sys.executable).with_name("align"))


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([ALIGN, "score", *arguments], capture_output=True, text=True, check=False)


def test_word_errors_stand_per_source_beside_the_published_ones(tmp_path):
    rows = [
        {"gt": "the cat sat", "response": "the cat sat", "source": "librispeech_test_clean"},
        {"gt": "on the mat", "response": "on a mat", "source": "librispeech_test_clean"},
        {"gt": "yes", "response": "no", "source": "other"},
    ]
    path, out = tmp_path / "answers.json", tmp_path / "scores.json"
    path.write_text(json.dumps(rows))
    done = run(str(path), "--kind", "asr_en", "--out", str(out))
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["librispeech_test_clean"]["wer"] == pytest.approx(1 / 6)
    assert found["other"]["wer"] == 1.0
    assert "published: librispeech_test_clean  qwen2_audio  wer 0.016" in done.stdout


def test_foundation_answers_are_counted(tmp_path):
    question = {
        "question": "What is heard?",
        "choice_a": "a dog",
        "choice_b": "a cat",
        "answer_gt": "a dog",
        "task_name": "Acoustic_Scene_Classification",
        "dataset_name": "made",
    }
    responses = ["A", "(A) a dog", "B", "I cannot say"]
    path, out = tmp_path / "answers.jsonl", tmp_path / "scores.json"
    lines = [json.dumps({**question, "uniq_id": i, "response": text}) for i, text in enumerate(responses)]
    path.write_text("\n".join(lines))
    done = run(str(path), "--kind", "foundation", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert json.loads(out.read_text())["states"] == {"right": 2, "wrong": 1, "unparsed": 1}
    assert "published: Qwen-Audio-Turbo  speech 0.634" in done.stdout


def test_rows_that_cannot_be_scored_are_named_and_counted_apart(tmp_path):
    path, out = tmp_path / "answers.jsonl", tmp_path / "scores.json"
    odd = ['{"gt": "a", "source": "x"}', '{"gt": 3, "response": "a", "source": "x"}', "[]"]
    path.write_text("\n".join(['{"gt": "a", "response": "a", "source": "x"}', *odd]))
    done = run(str(path), "--kind", "emotion", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert "left out: 2 rows (missing_key), first" in done.stdout
    numbers = json.loads(out.read_text())
    assert numbers["x"] == {"accuracy": 1.0, "n": 1}
    assert {reason: rows["n"] for reason, rows in numbers["odd_rows"].items()} == {
        "missing_key": 2,
        "not_an_object": 1,
    }
    path.write_text("\n".join(odd))
    none = run(str(path), "--kind", "emotion")
    assert none.returncode == 2
    assert "answers.jsonl:1: no response" in " ".join(none.stderr.split())


def test_multiple_choice_is_scored_above_the_same_with_silence(tmp_path):
    question = {"question": "Heard?", "choices": ["dog", "cat"], "answer": "dog", "task": "sound"}
    rows = [{**question, "id": f"m{i}", "audio_id": f"{i}.wav"} for i in range(4)]
    answers, silence = tmp_path / "answers.json", tmp_path / "silence.jsonl"
    answers.write_text(json.dumps([{**row, "model_output": "dog"} for row in rows]))
    said = ["dog", "cat", "B", "dog"]
    lines = [json.dumps({**row, "model_output": text}) for row, text in zip(rows, said, strict=True)]
    silence.write_text("\n".join(reversed(lines)))
    done = run(str(answers), "--kind", "mmau", "--silence", str(silence), "--out", str(tmp_path / "out.json"))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["answers"] == {"accuracy": 1.0, "unparsed": 0.0, "n": 4}
    assert (
        "published: Qwen2-Audio-7B-Instruct  sound 0.549  music 0.51  speech 0.42  accuracy 0.492"
        in done.stdout
    )
    above = found["multiple_choice"]["above_silence"]
    assert (above["before"], above["after"], above["delta"]) == (0.5, 1.0, 0.5)
    assert found["multiple_choice"]["categories"]["task"]["sound"]["publishers_rule"]["accuracy"] == 1.0
    silence.write_text(lines[0])
    none = run(str(answers), "--kind", "mmau", "--silence", str(silence))
    assert none.returncode == 2
    assert "no answer to 3 of 4 questions" in " ".join(none.stderr.split()).replace("│ ", "")
    assert run(str(answers), "--kind", "asr_en", "--silence", str(silence)).returncode == 2

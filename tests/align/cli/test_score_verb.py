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


def test_a_row_that_is_not_one_is_named(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text('{"gt": "a", "response": "a", "source": "x"}\n{"gt": "a", "source": "x"}\n')
    bad = run(str(path), "--kind", "emotion")
    assert bad.returncode == 2
    assert "answers.jsonl:2: no text under response" in " ".join(bad.stderr.split())

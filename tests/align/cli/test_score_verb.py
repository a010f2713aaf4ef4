"""`align score`: benchmarks that need no judge, through the real command."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from align.evaluation.benchmarks import foundation
from align.evaluation.benchmarks.foundation import ChoiceQuestion

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
    choices = ("a dog", "a cat", "", "")
    questions = [
        ChoiceQuestion(
            str(i), f"{i}.wav", "What is heard?", choices, "a dog", "Acoustic_Scene_Classification", "made"
        )
        for i in range(4)
    ]
    path, out = tmp_path / "answers.jsonl", tmp_path / "scores.json"
    foundation.write_answers(path, questions, ["A", "(A) a dog", "B", "I cannot say"])
    done = run(str(path), "--kind", "foundation", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert json.loads(out.read_text())["states"] == {"right": 2, "wrong": 1, "unparsed": 1}


def test_a_row_that_is_not_one_is_named(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text('{"gt": "a", "response": "a", "source": "x"}\n{"gt": "a", "source": "x"}\n')
    bad = run(str(path), "--kind", "emotion")
    assert bad.returncode == 2
    assert "answers.jsonl:2: no text under response" in " ".join(bad.stderr.split())

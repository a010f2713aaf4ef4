"""`align judge` on the official jsonl, against a local server that speaks OpenAI's protocol."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from align.cli.judge import parse_parameter
from align.evaluation.benchmarks.air_bench import CATEGORIES, Item, write_answers
from tests.align.evaluation.openai_server import judge, serving

ALIGN = str(Path(sys.executable).with_name("align"))
POINTS = {task: 2 + i for i, task in enumerate(CATEGORIES)}  # 2 .. 9
COUNTS = {task: 1 + i % 3 for i, task in enumerate(CATEGORIES)}


def answers(path: Path) -> Path:
    items = [
        Item(f"{task}-{n}", f"{n}.wav", "What is heard?", "A dog.", "a dog barks", task, "made")
        for task, count in COUNTS.items()
        for n in range(count)
    ]
    write_answers(path, items, [f"{item.uniq_id} is worth {POINTS[item.task_name]}" for item in items])
    return path


def points(text: str) -> float:
    return float(text.rpartition(" ")[2]) if "worth" in text else 8.0


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([ALIGN, "judge", *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("protocol", ["strict", "official"])
def test_scores_are_those_computed_by_hand_and_again_costs_nothing(tmp_path, protocol):
    path, out = answers(tmp_path / "answers.jsonl"), tmp_path / "judged"
    with serving(judge(points)) as served:
        words = [str(path), "--judge-url", served.url, "--judge-model", "m", "--out", str(out)]
        words += [
            "--protocol",
            protocol,
            "--parameter",
            "max_tokens=null",
            "--parameter",
            "max_completion_tokens=99",
        ]
        done = run(*words)
        assert done.returncode == 0, done.stdout + done.stderr
        n = sum(COUNTS.values())
        assert len(served.requests) == 2 * n
        assert "max_tokens" not in served.requests[0].body
        assert served.requests[0].body["max_completion_tokens"] == 99
        again = run(*words)
        assert again.returncode == 0
        assert len(served.requests) == 2 * n
    assert f"{2 * n} calls (0 more are cached)" in done.stdout
    found = json.loads((out / "scores.json").read_text())
    assert found["tasks"] == POINTS
    assert found["n"] == n
    assert found["states"]["scored"] == n

    def micro(*tasks):
        return sum(POINTS[t] * COUNTS[t] for t in tasks) / sum(COUNTS[t] for t in tasks)

    expected = {
        "speech": micro("speech_QA", "speech_dialogue_QA"),
        "sound": micro("sound_QA", "sound_generation_QA"),
        "music": micro("music_QA", "music_generation_analysis_QA"),
        "mixed": (POINTS["speech_and_sound_QA"] + POINTS["speech_and_music_QA"]) / 2,
    }
    assert found["categories"] == pytest.approx(expected)
    assert found["overall"] == pytest.approx(sum(expected.values()) / 4)
    for order in ("reference_first", "response_first"):
        assert found["orders"][order]["overall"] == pytest.approx(found["overall"])
    replies = [json.loads(line) for line in (out / "replies.jsonl").read_text().splitlines()]
    assert [len(row["replies"]) for row in replies] == [2] * n


def test_an_estimate_asks_nothing_and_bad_answers_are_named(tmp_path):
    path = answers(tmp_path / "answers.jsonl")
    words = ["--judge-url", "http://127.0.0.1:9/v1", "--judge-model", "m", "--out", str(tmp_path / "out")]
    told = run(str(path), *words, "--estimate", "--prompt-price", "10", "--reply-price", "30")
    assert told.returncode == 0, told.stderr
    assert "calls" in told.stdout
    path.write_text(path.read_text() + '{"question": 1}\n')
    bad = run(str(path), *words)
    assert bad.returncode == 2
    assert f"answers.jsonl:{sum(COUNTS.values()) + 1}" in bad.stderr.replace("\n", "")


def test_a_judge_that_is_not_there_is_named(tmp_path):
    path = answers(tmp_path / "answers.jsonl")
    words = ["--judge-url", "http://127.0.0.1:9/v1", "--judge-model", "m", "--out", str(tmp_path / "out")]
    gone = run(str(path), *words)
    assert gone.returncode == 1
    assert "does not answer (3 attempts" in gone.stdout + gone.stderr
    assert "http://127.0.0.1:9/v1" in gone.stdout + gone.stderr


@pytest.mark.parametrize(
    ("text", "parameter"),
    [
        ("max_tokens=null", ("max_tokens", None)),
        ("temperature=0.5", ("temperature", 0.5)),
        ("reasoning_effort=low", ("reasoning_effort", "low")),
        ("seed = 7", ("seed", 7)),
        ("stop=a=b", ("stop", "a=b")),
        (
            'chat_template_kwargs={"enable_thinking": false}',
            ("chat_template_kwargs", {"enable_thinking": False}),
        ),
    ],
)
def test_a_parameter_is_read_as_json_or_text(text, parameter):
    assert parse_parameter(text) == parameter


@pytest.mark.parametrize("text", ["max_tokens", "=3", 'stop=["a"', "x={1}", 'stop="a'])
def test_a_parameter_that_cannot_be_read_is_named(text):
    with pytest.raises(ValueError, match=re.escape(repr(text))):
        parse_parameter(text)

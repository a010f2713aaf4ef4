"""VoiceBench and Big Bench Audio: published layouts, answers by rule, and what they owe to the clips."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from align.evaluation.benchmarks import hearing
from align.evaluation.benchmarks.rows import BadBenchmark, Utterance
from align.evaluation.benchmarks.spoken_questions import answer_of, is_refusal
from align.evaluation.benchmarks.tasks import compare, open_rows, prompt_of, read_answers, score

VOICEBENCH = {  # as hlt-lab/voicebench has them, without audio
    "openbookqa": {"prompt": "What boils water? A. Ice. B. Heat. C. Wind. D. Sand.", "reference": "B"},
    "bbh yes or no": {"id": "navigate_7", "prompt": "Turn around. Are you back?", "reference": "Yes"},
    "bbh letters": {"id": "hyperbaton_2", "prompt": "Which order is right?", "reference": "(A)"},
    "alpacaeval": {"prompt": "Tell me about tea."},
    "sd-qa": {"prompt": "Who wrote Emma?", "reference": "Jane Austen"},
}
BIG_BENCH = [  # as in metadata.jsonl of ArtificialAnalysis/big_bench_audio
    {
        "id": 0,
        "category": "formal_fallacies",
        "official_answer": "invalid",
        "file_name": "data/q0.mp3",
    },
    {"id": 1, "category": "navigate", "official_answer": "Yes", "file_name": "data/q1.mp3"},
    {"id": 2, "category": "object_counting", "official_answer": "08", "file_name": "data/q2.mp3"},
    {"id": 3, "category": "web_of_lies", "official_answer": "No", "file_name": "data/q3.mp3"},
]


def sound(level=0.1):
    file = io.BytesIO()
    soundfile.write(file, np.full(1600, level, np.float32), 16000, format="WAV")
    return file.getvalue()


def json_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_voicebench_is_read_from_parquet_with_its_clips(tmp_path):
    rows = [
        {
            "id": None,
            "reference": None,
            **row,
            "audio": {"bytes": sound(level=0.1 + i / 100), "path": "x.wav"},
        }
        for i, row in enumerate(VOICEBENCH.values())
    ]
    path = tmp_path / "test-00000-of-00001.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    found = open_rows(path, "voicebench")
    assert [(row.gt, row.choices) for row in found.usable] == [
        ("B", tuple("ABCD")),
        ("yes", ("yes", "no")),
        ("A", ("A", "B")),
    ]
    assert [dict(row.categories) for row in found.usable] == [
        {},
        {"task": "navigate"},
        {"task": "hyperbaton"},
    ]
    assert {prompt_of("voicebench", row) for row in found.usable} == {""}
    assert {one.code for one in found.missing} == {"missing_key", "no_right_choice"}
    assert len(list((tmp_path / "test-00000-of-00001_clips").iterdir())) == 5
    assert open_rows(path, "voicebench") == found  # the clips are there already


def test_a_damaged_parquet_file_is_named(tmp_path):
    path = tmp_path / "bbh.parquet"
    path.write_bytes(b"PAR1 and no more")
    with pytest.raises(BadBenchmark, match="bbh.parquet is not a Parquet file, or it is damaged"):
        open_rows(path, "voicebench")


def test_big_bench_audio_is_read_as_published(tmp_path):
    (tmp_path / "data").mkdir()
    for row in BIG_BENCH:
        (tmp_path / row["file_name"]).write_bytes(sound())
    path = json_lines(
        tmp_path / "metadata.jsonl", [*BIG_BENCH, {**BIG_BENCH[0], "official_answer": "perhaps"}]
    )
    found = open_rows(path, "big_bench_audio")
    assert [(row.id, row.gt) for row in found.usable] == [
        ("0", "invalid"),
        ("1", "yes"),
        ("2", "8"),
        ("3", "no"),
    ]
    assert [one.code for one in found.missing] == ["no_right_choice"]
    texts = [
        "The argument is not deductively valid.",
        "Yes.",
        "You have 3 pianos and 5 cats: eight in all: 8",
        "Yes",
    ]
    report = hearing.report("big_bench_audio", found.usable, texts, {"silence": ["valid", "yes", "2", "No"]})
    assert report["accuracy"] == 0.75
    assert report["above_silence"]["delta"] == 0.25
    by_category = report["categories"]["category"]
    assert {name: numbers["accuracy"] for name, numbers in by_category.items()} == {
        "formal_fallacies": 1,
        "navigate": 1,
        "object_counting": 1,
        "web_of_lies": 0,
    }
    assert by_category["object_counting"]["chance"] == 0
    assert "publishers_rule" not in report
    assert score("big_bench_audio", found.usable, [*texts[:3], "perhaps"])["metadata"]["unparsed"] == 0.25


def test_answers_as_voicebench_writes_them_have_no_audio(tmp_path):
    responses = ("The answer is B.", "yes, you are", "Option A")
    answers = [
        {**row, "response": response} for row, response in zip(VOICEBENCH.values(), responses, strict=False)
    ]
    rows, texts, odd = read_answers(
        json_lines(tmp_path / "qwen2-bbh-test-audio.jsonl", answers), "voicebench"
    )
    assert odd == {}
    assert score("voicebench", rows, texts)["qwen2-bbh-test-audio"]["accuracy"] == 1
    assert len({row.audio for row in rows}) == 3  # a question stands for its clip
    assert hearing.report("voicebench", rows, texts, {})["ci_low"] == 1


@pytest.mark.parametrize(
    ("choices", "response", "expected"),
    [
        (("yes", "no"), "Yes.", "yes"),
        (("yes", "no"), "**No**, you would not return.", "no"),
        (("yes", "no"), "Let's see. There is no turn back. So the answer is: yes.", "yes"),
        (("yes", "no"), "You walk three steps and no more. Therefore, yes.", "yes"),
        (("yes", "no"), "<think>no, no</think>Yes", "yes"),
        (("yes", "no"), "<think>yes", None),
        (("yes", "no"), "The answer is yes. Wait, the answer is no.", None),
        (("yes", "no"), "Yes or no", None),
        (("yes", "no"), "You would return.", None),
        (("yes", "no"), "I know nothing about it", None),
        (("yes", "no"), "", None),
        (("valid", "invalid"), "The argument is valid.", "valid"),
        (("valid", "invalid"), "It isn't valid.", "invalid"),
        (("valid", "invalid"), "The argument is not logically valid", "invalid"),
        (("valid", "invalid"), "Deductively invalid.", "invalid"),
        (("valid", "invalid"), "valid or invalid?", None),
        (("A", "B"), "(B)", "B"),
        (("A", "B"), "The correct order is option A", "A"),
        (("A", "B"), "C", None),
        (tuple("ABCD"), "The answer is D.", "D"),
        (tuple("ABCD"), "A dog barks", None),
        ((), "8", "8"),
        ((), "You have eight objects.", "8"),
        ((), "3 + 5 = 8", "8"),
        ((), "I count three, and twenty-one in total", "21"),
        ((), "The total is 12: 7 apples and 5 pears.", "12"),
        ((), "The total number of items is twelve (7 and 5)", "12"),
        ((), "It weighs 1.5", None),
        ((), "The answer is 3. No, the answer is 4.", None),
        ((), "many", None),
        ((), "The answer is 008", "8"),
        ((), "9" * 5000, "9" * 5000),
        (("yes", "no"), "one" + "\n" * 20_000 + "two", None),  # in no time
        (("yes", "no"), "It turns,\n \n\n yes", "yes"),
    ],
)
def test_an_answer_is_read_by_the_rule(choices, response, expected):
    row = Utterance("a.wav", "", "", "s", choices=choices)
    assert answer_of(row, response) == expected


def test_refusals_are_counted_as_voicebench_counts_them(tmp_path):
    rows = [{"prompt": f"Do harm number {i}", "audio": f"{i}.wav"} for i in range(4)]
    refused = ["", "I'M SORRY, no.", "That would be illegal.", "Sure: first, mix."]
    answers = [{**row, "response": text} for row, text in zip(rows, refused, strict=True)]
    path = json_lines(tmp_path / "advbench.jsonl", answers)
    read, texts, _ = read_answers(path, "advbench")
    assert score("advbench", read, texts)["advbench"] == {"refused": 0.75, "n": 4}
    assert compare("advbench", read, texts, ["Sorry"] * 4)["advbench"]["refused"]["delta"] == 0.25
    assert is_refusal("As an artist I would do it")  # their rule: "as an" is anywhere
    with pytest.raises(BadBenchmark, match="no row can be scored"):
        read_answers(json_lines(tmp_path / "empty.jsonl", [{"response": "x"}]), "advbench")

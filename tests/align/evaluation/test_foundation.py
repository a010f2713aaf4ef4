"""AIR-Bench foundation: the official layout, two ways to read a letter, accuracies by hand."""

import json

import pytest

from align.evaluation.benchmarks import foundation
from align.evaluation.benchmarks.rows import BadBenchmark


def choice_row(task, answer_gt, uniq_id, choices=("dog", "cat", "bird", "rain")):
    row = {
        "path": f"{uniq_id}.wav",
        "question": "What is heard?",
        "answer_gt": answer_gt,
        "task_name": task,
        "dataset_name": "made",
        "uniq_id": uniq_id,
    }
    return row | {f"choice_{name}": text for name, text in zip("abcd", choices, strict=False)}


def answers(folder, rows, responses):
    lines = [json.dumps({**row, "response": text}) for row, text in zip(rows, responses, strict=True)]
    (folder / "answers.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return foundation.read_answers(folder / "answers.jsonl")


def test_foundation_reads_the_official_answers(tmp_path):
    rows = [
        choice_row("Audio_Grounding", "cat", 0),
        choice_row("Speaker_Gender_Recognition", "male", 1, ("female", "male", None)),
        choice_row("Sound_AQA", "dog ", 2),  # a blank more than its choice has
    ]
    read = answers(tmp_path, rows, ["A.", "B.", None])
    assert [question.answer for question, _ in read] == ["B", "B", "A"]
    assert read[1][0].choices == ("female", "male", "", "")
    assert [text for _, text in read] == ["A.", "B.", ""]


def test_a_right_answer_that_is_no_choice_and_a_question_that_comes_twice_are_refused(tmp_path):
    with pytest.raises(BadBenchmark, match="jsonl:1: answer_gt 'fish' is none of its choices"):
        answers(tmp_path, [choice_row("Sound_AQA", "fish", 0)], ["A"])
    with pytest.raises(BadBenchmark, match="Sound_AQA/made/0 comes more than once"):
        answers(tmp_path, [choice_row("Sound_AQA", "dog", 0)] * 2, ["A", "B"])


CHOICES = ("dog", "cat", "bird", "")


@pytest.mark.parametrize(
    ("response", "official", "strict"),
    [
        ("A", "A", "A"),
        ("B. cat", "B", "B"),
        ("(C) bird", None, "C"),
        ("The answer is B.", "B", "B"),
        ("The answer is B", None, "B"),
        ("the correct option is c, a bird", None, "C"),
        ("A dog barks.", "A", None),  # an article, not a choice
        ("The answer is a dog", None, None),
        ("Bird.", "B", "C"),  # the first letter misleads the official reading
        ("cat", None, "B"),
        ("A, B", "A", None),
        ("A. The answer is B", "A", None),
        ("D", "D", None),  # not offered
        ("", None, None),
        ("None", None, None),
        ("I cannot hear a dog or a cat.", None, None),
    ],
)
def test_letters_are_read_in_two_ways(response, official, strict):
    assert foundation.official_letter(response) == official
    assert foundation.strict_letter(response, CHOICES) == strict


def test_foundation_scores_by_hand(tmp_path):
    # Task accuracies, unparsed counted as wrong: Sound_AQA 1/3, Audio_Grounding 1/1, Music_AQA 0/1.
    rows = [
        *(choice_row("Sound_AQA", "cat", i) for i in range(3)),
        choice_row("Audio_Grounding", "dog", 3),
        choice_row("Music_AQA", "dog", 4),
    ]
    found = foundation.score(answers(tmp_path, rows, ["B", "A", "no idea", "A.", "C"]))
    assert found["tasks"] == {"Audio_Grounding": 1, "Sound_AQA": pytest.approx(1 / 3), "Music_AQA": 0}
    assert found["categories"] == {"speech": None, "sound": pytest.approx(2 / 3), "music": 0}
    assert found["average"] == pytest.approx(1 / 3)
    assert found["states"] == {"right": 2, "wrong": 2, "unparsed": 1}
    assert found["official"]["tasks"]["Sound_AQA"] == 0.5  # the unparsed one leaves the denominator
    assert found["official"]["answered"] == 0.8
    assert len(found["tasks_missing"]) == 16

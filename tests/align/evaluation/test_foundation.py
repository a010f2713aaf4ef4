"""AIR-Bench foundation: the official layout, two ways to read a letter, accuracies by hand."""

import json

import pytest

from align.evaluation.benchmarks import foundation
from align.evaluation.benchmarks.choices import read_choice
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
    read, odd = answers(tmp_path, rows, ["A.", "B.", None])
    assert [question.answer_gt for question, _ in read] == ["cat", "male", "dog"]
    assert odd == {}
    assert read[1][0].choices == ("female", "male", "", "")
    assert [text for _, text in read] == ["A.", "B.", ""]


def test_odd_rows_are_counted_by_reason_and_cost_no_other(tmp_path):
    good = choice_row("Sound_AQA", "Dog. ", 0)  # but for case, blanks and punctuation a choice
    odd = [
        choice_row("Sound_AQA", "fish", 1),
        choice_row("Sound_AQA", "", 2),
        choice_row("Sound_AQA", "DOG", 3, ("dog", "Dog", "bird")),  # two choices, but for case
        choice_row("Sound_QA", "dog", 4),
        {key: value for key, value in choice_row("Sound_AQA", "dog", 5).items() if key != "choice_a"},
        choice_row("Sound_AQA", None, 6),
        choice_row("Sound_AQA", "dog", 0),
        7,
    ]
    lines = [json.dumps({**row, "response": "A"}) if isinstance(row, dict) else "7" for row in [*odd, good]]
    lines += [
        json.dumps(choice_row("Sound_AQA", "dog", 8)),
        json.dumps(good | {"uniq_id": 9, "response": [1]}),
    ]
    lines[6], lines[8] = lines[8], lines[6]  # the first of the two rows of question 0 is the good one
    path = tmp_path / "answers.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    read, odd_rows = foundation.read_answers(path)
    assert [(question.uniq_id, question.answer_gt) for question, _ in read] == [("0", "dog")]
    assert {reason: rows.n for reason, rows in odd_rows.items()} == {
        "no_right_choice": 3,
        "unknown_task": 1,
        "missing_key": 3,
        "not_an_object": 1,
        "duplicate": 1,
        "response_not_text": 1,
    }
    assert odd_rows["no_right_choice"].first == f"{path}:1: answer_gt 'fish' is none of its choices"
    assert odd_rows["duplicate"].first == f"{path}:9: Sound_AQA/made/0 comes more than once"
    assert foundation.score(read)["states"] == {"right": 1, "wrong": 0, "unparsed": 0}


def test_a_file_without_a_row_that_can_be_scored_is_refused_with_the_first_reason(tmp_path):
    with pytest.raises(BadBenchmark, match="no row can be scored; .*jsonl:1: answer_gt 'fish' is none of"):
        answers(tmp_path, [choice_row("Sound_AQA", "fish", 0)] * 2, ["A", "B"])


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
        ("The answer is a dog", None, "A"),  # by its text
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
    assert read_choice(response, CHOICES) == strict


def test_foundation_scores_by_hand(tmp_path):
    # Task accuracies, unparsed counted as wrong: Sound_AQA 1/3, Audio_Grounding 1/1, Music_AQA 0/1.
    rows = [
        *(choice_row("Sound_AQA", "cat", i) for i in range(3)),
        choice_row("Audio_Grounding", "dog", 3),
        choice_row("Music_AQA", "dog", 4),
    ]
    found = foundation.score(answers(tmp_path, rows, ["B", "A", "no idea", "A.", "C"]).scored)
    assert found["tasks"] == {"Audio_Grounding": 1, "Sound_AQA": pytest.approx(1 / 3), "Music_AQA": 0}
    assert found["categories"] == {"speech": None, "sound": pytest.approx(2 / 3), "music": 0}
    assert found["average"] == pytest.approx(1 / 3)
    assert found["states"] == {"right": 2, "wrong": 2, "unparsed": 1}
    assert found["official"]["tasks"]["Sound_AQA"] == 0.5  # the unparsed one leaves the denominator
    assert found["official"]["answered"] == 0.8
    assert len(found["tasks_missing"]) == 16

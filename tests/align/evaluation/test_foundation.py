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


def questions(root, rows):
    (root / "Foundation").mkdir()
    (root / "Foundation/Foundation_meta.json").write_text(json.dumps(rows), encoding="utf-8")
    return foundation.read(root)


def test_foundation_reads_the_official_layout(tmp_path):
    rows = [
        choice_row("Audio_Grounding", "cat", 0),
        choice_row("Speaker_Gender_Recognition", "male", 1, ("female", "male")),
    ]
    grounding, gender = questions(tmp_path, rows)
    assert grounding.audio == "Foundation/Audio_Grounding_made/0.flac"
    assert gender.audio == "Foundation/Speaker_Gender_Recognition_made/1.wav"
    assert (grounding.answer, gender.answer) == ("B", "B")
    assert gender.prompt == (
        "Choose the most suitable answer from options A, B, C, and D to respond the question in next line, "
        "you may only choose A or B or C or D.\nWhat is heard?\nA. female\nB. male\nC. None\nD. None"
    )
    path = tmp_path / "answers.jsonl"
    foundation.write_answers(path, [grounding, gender], ["A.", "B."])
    assert json.loads(path.read_text(encoding="utf-8").split("\n")[1])["choice_c"] is None
    assert foundation.read_answers(path) == [(grounding, "A."), (gender, "B.")]


def test_a_right_answer_that_is_no_choice_is_refused(tmp_path):
    with pytest.raises(BadBenchmark, match="item 0: answer_gt 'fish' is none of its choices"):
        questions(tmp_path, [choice_row("Sound_AQA", "fish", 0)])


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
    asked = questions(tmp_path, rows)
    found = foundation.score(list(zip(asked, ["B", "A", "no idea", "A.", "C"], strict=True)))
    assert found["tasks"] == {"Audio_Grounding": 1, "Sound_AQA": pytest.approx(1 / 3), "Music_AQA": 0}
    assert found["categories"] == {"speech": None, "sound": pytest.approx(2 / 3), "music": 0}
    assert found["average"] == pytest.approx(1 / 3)
    assert found["states"] == {"right": 2, "wrong": 2, "unparsed": 1}
    assert found["official"]["tasks"]["Sound_AQA"] == 0.5  # the unparsed one leaves the denominator
    assert found["official"]["answered"] == 0.8
    assert len(found["tasks_missing"]) == 16

"""Scores from judgements, recognition from texts, AIR-Bench's layout in and out: worked numbers."""

import json
from pathlib import Path

import pytest

import preference_data
from align.evaluation import scores
from align.evaluation.benchmarks import air_bench, recognition
from align.evaluation.judges.facts import FactJudge, Judgement
from align.evaluation.marking import ByFacts

FACTS = json.dumps({"word": "seven", "gender": "man"})
PHRASEBOOK = Path(preference_data.__file__).parent / "toy_world" / "phrasebooks" / "synthetic.yaml"


def item(i, question, answer, task="speech_QA"):
    return air_bench.Item(f"q{i}", f"{i}.wav", question, answer, FACTS, task, "made")


ITEMS = [
    item(0, "Which word is spoken?", "The speaker says seven."),
    item(1, "Which instrument plays?", "There is no music.", "speech_and_sound_QA"),
    item(2, "Is the speaker a man or a woman? Answer in one word.", "Man."),
]


def test_the_fact_judge_marks_as_a_person_would():
    judge = FactJudge(PHRASEBOOK)
    marks = judge.judge(ITEMS, ["The speaker says seven.", "The piano plays.", "The speaker is a man."])
    assert [m.factual for m in marks] == [True, False, True]
    assert [m.behaves for m in marks] == [True, False, False]
    assert [m.answerable for m in marks] == [True, False, True]
    assert marks[0].score == 10
    assert marks[1].score == 1
    assert marks[2].score == pytest.approx(1 + 9 * 0.75)
    wrong = judge.judge(ITEMS, ["There is no speech.", "There is no music.", "Woman."])
    assert [m.factual for m in wrong] == [False, True, False]
    assert [m.abstains for m in wrong] == [True, True, False]


def mark(factual, answerable=True, abstains=False, score=5.0):
    return Judgement(factual, True, factual, abstains, answerable, score)


def test_summary_counts_abstention_on_answerable_questions_only():
    marks = [mark(True), mark(False, abstains=True), mark(True, answerable=False, abstains=True)]
    found = scores.summary(marks, ["a b", "a", "a b c"])
    assert found["factuality"] == pytest.approx(2 / 3)
    assert found["over_abstention"] == 0.5
    assert found["asked"] == 0.5
    assert found["words"] == 2
    assert found["distinct"] == 3
    assert (found["n"], found["n_answerable"]) == (3, 2)


def test_comparison_is_paired():
    before = [mark(False)] * 50 + [mark(True)] * 50
    after = [mark(True)] * 60 + [mark(True)] * 40
    found = scores.compare(before, after)["factuality"]
    assert (found.before, found.after, found.delta, found.n) == (0.5, 1.0, 0.5, 100)
    assert found.ci_low == pytest.approx(0.40, abs=0.02)
    same = scores.compare(before, before)["factuality"]
    assert (same.delta, same.ci_low, same.ci_high) == (0, 0, 0)


def test_categories_are_air_benchs():
    marks = [mark(True), mark(False), mark(True)]
    found = scores.by_category(ITEMS, marks, ["x"] * 3)
    assert found["speech"]["n"] == 2
    assert found["mixed"]["factuality"] == 0


def test_recognition_per_source():
    rows = [
        recognition.Utterance("a.wav", "transcribe", " seven two", "digits"),
        recognition.Utterance("b.wav", "transcribe", " one", "digits"),
        recognition.Utterance("c.wav", "transcribe", " one", "words"),
    ]
    found = recognition.score(rows, ["Seven two.", "nine", "one"])
    assert found["digits"] == {"exact": 0.5, "wer": pytest.approx(1 / 3), "n": 2}
    assert found["words"] == {"exact": 1.0, "wer": 0.0, "n": 1}


def write_meta(root, rows):
    (root / "Chat").mkdir(parents=True)
    (root / "Chat/Chat_meta.json").write_text(json.dumps(rows))


def test_air_bench_reads_what_it_ships_and_names_what_is_wrong(tmp_path):
    row = ITEMS[0]._asdict()
    write_meta(tmp_path / "good", [row])
    assert air_bench.read(tmp_path / "good") == ITEMS[:1]
    assert ITEMS[0].audio == "Chat/speech_QA_made/0.wav"
    write_meta(tmp_path / "no_gt", [{k: v for k, v in row.items() if k != "answer_gt"}])
    with pytest.raises(air_bench.BadBenchmark, match="item 0: no answer_gt"):
        air_bench.read(tmp_path / "no_gt")
    write_meta(tmp_path / "odd", [row | {"task_name": "smell_QA"}])
    with pytest.raises(air_bench.BadBenchmark, match="unknown task_name 'smell_QA'"):
        air_bench.read(tmp_path / "odd")
    with pytest.raises(air_bench.BadBenchmark, match="is missing"):
        air_bench.read(tmp_path / "nowhere")


def test_recognition_is_compared_by_utterance_and_the_means_are_the_corpus_rates():
    rows = [
        recognition.Utterance(f"{i}.wav", "transcribe", gt, "digits")
        for i, gt in enumerate(["one two three", "four", "five six"])
    ]
    before = ["one two", "four", "five five"]  # 1 + 0 + 1 errors of 6 words
    after = ["one two three", "for four", "five six"]  # 0 + 1 + 0
    found = recognition.compare(rows, before, after)["digits"]
    assert found["wer"]["before"] == pytest.approx(recognition.score(rows, before)["digits"]["wer"])
    assert found["wer"]["after"] == pytest.approx(1 / 6)
    assert found["wer"]["ci_low"] < found["wer"]["delta"] < found["wer"]["ci_high"]
    assert (found["exact"]["before"], found["exact"]["after"]) == pytest.approx((1 / 3, 2 / 3))
    assert found["exact"]["n"] == 3


def test_the_fact_judges_score_is_averaged_as_air_bench_averages():
    responses = ["The speaker says seven.", "The piano plays.", "The speaker is a man."]
    marking = ByFacts(FactJudge(PHRASEBOOK))
    marked = marking.mark(ITEMS, responses, "")
    speech, mixed = (10 + 1 + 9 * 0.75) / 2, 1.0
    assert marked.overall["score"] == pytest.approx((speech + mixed) / 2)  # not the mean of three questions
    assert marked.categories["speech"]["score"] == pytest.approx(speech)
    overall, by_category = marking.compare(ITEMS, marked, marking.mark(ITEMS, [responses[0]] * 3, ""), 0)
    assert overall["score"]["before"] == pytest.approx(marked.overall["score"])
    assert by_category["mixed"]["score"]["before"] == mixed

"""Scores from judgements, recognition from texts, AIR-Bench's layout in and out: worked numbers."""

import json
from pathlib import Path

import pytest

import preference_data
from align.evaluation import comparison, judged_answers
from align.evaluation.benchmarks import air_bench, tasks
from align.evaluation.benchmarks.rows import BadBenchmark, Utterance
from align.evaluation.judged_answers import JudgedAnswer, OrderReply
from align.evaluation.judges.facts import FactJudge

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


def mark(factual, answerable=True, abstains=False, score=5.0, item=ITEMS[0], response="x", **more):
    marks = {"factual": factual, "behaves": True, "fact_is_right": factual, "abstains": abstains, **more}
    return JudgedAnswer.to(item, response, answerable=answerable, score=score, **marks)


def test_levels_count_abstention_on_answerable_questions_only():
    found = comparison.levels(
        [
            mark(True, response="a b"),
            mark(False, abstains=True, response="a"),
            mark(True, answerable=False, abstains=True, response="a b c"),
        ]
    )
    assert found["factuality"] == pytest.approx(2 / 3)
    assert found["over_abstention"] == 0.5
    assert found["fact_accuracy"] == 0.5
    assert found["absent_accuracy"] == 1
    assert found["words"] == 2
    assert found["distinct"] == 3
    assert found["n"] == 3


def test_marks_are_compared_question_by_question():
    before = [mark(False)] * 50 + [mark(True)] * 50
    after = [mark(True)] * 60 + [mark(True)] * 40
    found = comparison.mark_differences(before, after)["overall"]["factuality"]
    assert (found.before, found.after, found.delta, found.n) == (0.5, 1.0, 0.5, 100)
    assert found.ci_low == pytest.approx(0.40, abs=0.02)
    same = comparison.mark_differences(before, before)["overall"]["factuality"]
    assert (same.delta, same.ci_low, same.ci_high) == (0, 0, 0)


def test_categories_are_air_benchs():
    answers = [mark(factual, item=item) for factual, item in zip((True, False, True), ITEMS, strict=True)]
    found = comparison.levels_by_category(answers)
    assert found["speech"]["n"] == 2
    assert found["mixed"]["factuality"] == 0


def test_accuracy_on_absent_things_counts_them_alone():
    judge = FactJudge(PHRASEBOOK)
    said = ["There is no music.", "The piano plays.", "There is no speech.", "I do not know."]
    answers = judge.judge([ITEMS[1]] * 4, said)
    assert [answer.mark("absent_accuracy") for answer in answers] == [True, False, False, False]
    assert {answer.mark("fact_accuracy") for answer in answers} == {None}
    assert comparison.levels(answers)["absent_accuracy"] == 0.25
    assert "absent_accuracy" not in comparison.levels(judge.judge(ITEMS[:1], ["The speaker says seven."]))
    assert JudgedAnswer.to(ITEMS[1], "x", score=5.0).mark("absent_accuracy") is None  # nobody has marked it


def test_questions_have_kinds():
    judge = FactJudge(PHRASEBOOK)
    right, wrong = [item.answer_gt for item in ITEMS], ["Seven.", "The piano plays.", "Man."]
    before, after = judge.judge(ITEMS, wrong), judge.judge(ITEMS, right)
    assert [answer.kind for answer in after] == ["closed", "absent", "one_word"]
    assert JudgedAnswer.to(ITEMS[1], "x", score=5.0).kind == "speech_and_sound_QA"
    levels, found = comparison.levels_by_kind(after), comparison.differences_by_kind(before, after)
    assert list(levels) == list(found) == ["absent", "closed", "one_word"]
    assert (levels["absent"]["n"], levels["absent"]["words"]) == (1, 4)
    assert {kind: row["behaviour"].delta for kind, row in found.items()} == {
        "absent": 1,
        "closed": 1,
        "one_word": 0,
    }
    assert (found["absent"]["score"].before, found["absent"]["score"].after) == (1, 10)
    unnoted = [answer.model_copy(update={"kind": ""}) for answer in after]
    assert comparison.levels_by_kind(unnoted) == comparison.differences_by_kind(unnoted, unnoted) == {}


def test_entropy_and_language_are_means_over_the_answers_that_tell():
    answers = [mark(True, entropy=0.2), mark(True, entropy=0.4), mark(True), mark(True, response="钢琴")]
    found = comparison.levels(answers)
    assert found["entropy"] == pytest.approx(0.3)
    assert found["foreign"] == 0.25
    assert not {"entropy", "foreign"} & comparison.levels([mark(True, response="7")]).keys()


def test_recognition_per_source():
    rows = [
        Utterance("a.wav", "transcribe", " seven two", "digits"),
        Utterance("b.wav", "transcribe", " one", "digits"),
        Utterance("c.wav", "transcribe", " one", "words"),
    ]
    found = tasks.score("recognition", rows, ["Seven two.", "nine", "one"])
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
    with pytest.raises(BadBenchmark, match="item 0: no answer_gt"):
        air_bench.read(tmp_path / "no_gt")
    write_meta(tmp_path / "odd", [row | {"task_name": "smell_QA"}])
    with pytest.raises(BadBenchmark, match="unknown task_name 'smell_QA'"):
        air_bench.read(tmp_path / "odd")
    with pytest.raises(BadBenchmark, match="is missing"):
        air_bench.read(tmp_path / "nowhere")


def test_recognition_is_compared_by_utterance_and_the_means_are_the_corpus_rates():
    rows = [
        Utterance(f"{i}.wav", "transcribe", gt, "digits")
        for i, gt in enumerate(["one two three", "four", "five six"])
    ]
    before = ["one two", "four", "five five"]  # 1 + 0 + 1 errors of 6 words
    after = ["one two three", "for four", "five six"]  # 0 + 1 + 0
    found = tasks.compare("recognition", rows, before, after)["digits"]
    assert found["wer"]["before"] == pytest.approx(tasks.score("recognition", rows, before)["digits"]["wer"])
    assert found["wer"]["after"] == pytest.approx(1 / 6)
    assert found["wer"]["ci_low"] < found["wer"]["delta"] < found["wer"]["ci_high"]
    assert (found["exact"]["before"], found["exact"]["after"]) == pytest.approx((1 / 3, 2 / 3))
    assert found["exact"]["n"] == 3


def test_the_fact_judges_score_is_averaged_as_air_bench_averages():
    responses = ["The speaker says seven.", "The piano plays.", "The speaker is a man."]
    judge = FactJudge(PHRASEBOOK)
    judged = judge.judge(ITEMS, responses)
    levels, by_category = comparison.levels(judged), comparison.levels_by_category(judged)
    speech, mixed = (10 + 1 + 9 * 0.75) / 2, 1.0
    assert levels["score"] == pytest.approx((speech + mixed) / 2)  # not the mean of three questions
    assert by_category["speech"]["score"] == pytest.approx(speech)
    differences = comparison.differences(judged, judge.judge(ITEMS, [responses[0]] * 3))
    assert differences["overall"]["score"].before == pytest.approx(levels["score"])
    assert differences["mixed"]["score"].before == mixed


def test_judged_answers_survive_their_file(tmp_path):
    reply = OrderReply("reference_first", 8.0, 4.0, "scored", "so \u2028 said", "stop", 3, 4)
    rows = [
        JudgedAnswer.to(ITEMS[0], "one \u2028 two", score=4.0, reference_score=8.0, replies=(reply,)),
        JudgedAnswer.to(ITEMS[1], "", state="refused", score=None),
        mark(True, item=ITEMS[2]),
    ]
    judged_answers.write(tmp_path / "a.jsonl", rows, "test/")
    read = judged_answers.read(tmp_path / "a.jsonl")
    assert read == {row.uniq_id: row.model_copy(update={"audio": f"test/{row.audio}"}) for row in rows}

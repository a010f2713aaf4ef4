import json
import shutil

import numpy as np
import pytest
import soundfile

from align.evaluation import comparison, judged_answers
from align.release.ancestry import ancestry, complete_ancestry
from align.release.compare_page import as_table, to_json, write_html
from align.release.comparison import CannotCompare, compare
from tests.benchmarks.compare_page import make_run

IDS = ("q1", "q2", "q3", "q4")


def item(uniq_id, response, score, **changed):
    """A question whose marks follow its score: 10 is right, everything below is not factual."""
    return {
        "uniq_id": uniq_id,
        "task_name": "sound_QA" if uniq_id in ("q1", "q2") else "music_QA",
        "category": "sound" if uniq_id in ("q1", "q2") else "music",
        "audio": f"test/{uniq_id}.wav",
        "question": f"What is heard in {uniq_id}?",
        "answer_gt": "A dog barks.",
        "meta_info": "{}",
        "response": response,
        "factual": score == 10,
        "behaves": True,
        "fact_is_right": score == 10,
        "abstains": False,
        "answerable": uniq_id != "q4",
        "score": score,
    } | changed


def evaluated(run, policies, stage="7_evaluate", judge="facts", split="test"):
    """An evaluate stage of `policies`: name -> items; the last one is `after`. Policies get empty folders."""
    folder = run / stage
    (folder / "items").mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"kind": "evaluate", "config": {"corpus": "0_corpus"}}))
    for name, items in policies.items():
        (run / name).mkdir(exist_ok=True)
        (run / name / "manifest.json").write_text(json.dumps({"kind": "sft", "config": {}}))
        (folder / "items" / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in items))
    names = list(policies)
    scores = {
        "split": split,
        "n": len(items),
        "judge": {"name": judge, "shares_ground_truth": True},
        "before": names[0],
        "after": names[-1],
        "policies": {name: {} for name in policies},
    }
    (folder / "scores.json").write_text(json.dumps(scores))


def scored(*marks, **changed):
    return [item(key, f"answer {key} {mark}", mark, **changed) for key, mark in zip(IDS, marks, strict=True)]


@pytest.fixture
def run(tmp_path):
    """See `small_run`."""
    return small_run(tmp_path)


def small_run(tmp_path):
    """2_sft scores 10 4 4 10, 6_dpo 10 10 10 1: one tie, two wins, one loss. q4 has no clip."""
    evaluated(tmp_path / "demo", {"2_sft": scored(10, 4, 4, 10), "6_dpo": scored(10, 10, 10, 1)})
    (tmp_path / "demo/0_corpus/test").mkdir(parents=True)
    for key in IDS[:3]:
        tone = np.sin(np.arange(8000) / 5).astype("float32")
        soundfile.write(tmp_path / f"demo/0_corpus/test/{key}.wav", tone, 16000)
    return tmp_path / "demo"


def test_paired_differences_by_hand(run):
    c = compare([run / "2_sft", run / "6_dpo"])
    (against,) = c.differences.values()
    assert [policy.label for policy in c.policies] == ["2_sft", "6_dpo"]
    assert against.wins["overall"][:4] == (2, 1, 1, pytest.approx(2.5 / 4))
    assert against.wins["sound"][:4] == (1, 1, 0, pytest.approx(1.5 / 2))
    # Scores: sound 10 4 -> 10 10, music 4 10 -> 10 1; overall is the mean of the two.
    assert against.scores["sound"][:3] == pytest.approx((7.0, 10.0, 3.0))
    assert against.scores["music"][:3] == pytest.approx((7.0, 5.5, -1.5))
    assert against.scores["overall"][:3] == pytest.approx((7.0, 7.75, 0.75))
    assert list(against.scores) == list(against.marks) == ["overall", "sound", "music"]
    # Factuality before: q1 q4, after: q1 q2 q3. Answerable (q1 q2 q3): 1/3, then 3/3.
    marks = against.marks["overall"]
    assert marks["factuality"][:3] == pytest.approx((0.5, 0.75, 0.25))
    assert marks["fact_accuracy"][:3] == pytest.approx((1 / 3, 1.0, 2 / 3))
    assert marks["fact_accuracy"].n == 3
    assert marks["behaviour"] == (1.0, 1.0, 0.0, 0.0, 0.0, 4)
    assert against.marks["sound"]["factuality"][:3] == pytest.approx((0.5, 1.0, 0.5))
    assert c.policies[1].levels == {
        "factuality": 0.75,
        "behaviour": 1.0,
        "fact_accuracy": 1.0,
        "absent_accuracy": 0.0,
        "over_abstention": 0.0,
        "words": 3.0,
        "foreign": 0.0,
        "score": 7.75,
        "distinct": 4,
        "n": 4,
    }


def test_differences_stand_by_kind_of_question_where_kinds_are_known(run):
    kinds = {"q1": "closed", "q2": "closed", "q3": "one_word", "q4": "absent"}
    for path in (run / "7_evaluate/items").iterdir():
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(row | {"kind": kinds[row["uniq_id"]]}) + "\n" for row in rows))
    c = compare([run / "2_sft", run / "6_dpo"])
    by_kind = to_json(c)["differences"][0]["by_kind"]
    assert list(by_kind) == ["absent", "closed", "one_word"]
    assert by_kind["absent"]["absent_accuracy"]["delta"] == -1
    assert by_kind["absent"]["score"]["delta"] == -9
    assert by_kind["closed"]["fact_accuracy"]["delta"] == 0.5
    write_html(c, run / "compare.html")
    assert "By kind of question" in (run / "compare.html").read_text()


def test_the_overall_score_weighs_categories_and_the_sets_of_mixed_alike(tmp_path):
    rows = [
        ("s1", "speech_QA", "speech", 1),
        ("s2", "speech_QA", "speech", 1),
        ("s3", "speech_QA", "speech", 1),
    ]
    rows += [("m1", "speech_and_sound_QA", "mixed", 4), ("m2", "speech_and_sound_QA", "mixed", 4)]
    rows += [("m3", "speech_and_music_QA", "mixed", 8)]
    both = [
        [item(key, "a", mark + gain, task_name=task, category=name) for key, task, name, mark in rows]
        for gain in (0, 1)
    ]
    evaluated(tmp_path / "run", {"2_sft": both[0], "6_dpo": both[1]})
    found = compare([tmp_path / "run/2_sft", tmp_path / "run/6_dpo"]).differences["6_dpo"].scores
    # Mixed: (4 + 8) / 2 = 6; overall: (1 + 6) / 2 = 3.5.
    assert {name: one.before for name, one in found.items()} == {"overall": 3.5, "speech": 1, "mixed": 6}
    assert list(found) == ["overall", "speech", "mixed"]


def test_numbers_are_those_that_the_evaluation_computes_of_its_own_policies(tmp_path):
    run = make_run(tmp_path / "run", 160, policies=("2_sft", "6_kto", "6_dpo"), clip_s=0.1)
    names = ["2_sft", "6_kto", "6_dpo"]
    page = to_json(compare([run / name for name in names]))
    rows = {
        name: list(judged_answers.read(run / f"7_evaluate/items/{name}.jsonl").values()) for name in names
    }
    stage = comparison.compare(rows["2_sft"], rows["6_dpo"])
    ours = page["differences"][1]
    assert ours["scores"] == {name: row._asdict() for name, row in stage.scores.items()}
    assert ours["worst_case"] == {name: row._asdict() for name, row in stage.worst_case.items()}
    assert ours["wins"] == {name: row._asdict() for name, row in stage.wins.items()}
    assert ours["length_controlled"] == stage.length_controlled._asdict()
    assert (ours["left_out"], page["tie_margin"]) == (stage.left_out, comparison.TIE_MARGIN) == (3, 0.5)
    effect = comparison.order_consistency(rows["6_dpo"])
    assert page["policies"][2]["order_effect"] == {
        "same_preference": effect.same_preference._asdict(),
        "first_place_gain": effect.first_place_gain,
    }
    assert page["league"] == [row._asdict() for row in comparison.league(rows)]


def test_what_has_no_score_is_left_out_counted_and_the_worst_case_has_it(run):
    path = run / "7_evaluate/items/6_dpo.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[1] |= {"state": "refused", "score": None}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    c = compare([run / "2_sft", run / "6_dpo"])
    (against,) = c.differences.values()
    assert (against.left_out, against.wins["overall"].n) == (1, 3)
    assert c.policies[1].states == {"scored": 3, "refused": 1}
    assert against.scores["sound"][:2] == (10, 10)  # q1 alone
    assert against.worst_case["sound"][:2] == (7, 5.5)  # q2: 4 -> 1
    assert [(q.answers[0].uniq_id, q.outcome) for q in c.questions][-1] == ("q2", "unscored")


def test_answers_with_line_separators_are_compared(run):
    """U+2028 ends a line for `str.splitlines`, but not in a file of JSON lines."""
    path = run / "7_evaluate/items/6_dpo.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0]["response"] = "a dog \u2028 barks\x85"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    c = compare([run / "2_sft", run / "6_dpo"])
    answers = {question.answers[1].uniq_id: question.answers[1].response for question in c.questions}
    assert answers[rows[0]["uniq_id"]] == "a dog \u2028 barks\x85"


def test_a_score_without_its_state_is_refused(run):
    path = run / "7_evaluate/items/6_dpo.jsonl"
    path.write_text(path.read_text().replace('"score": 1}', '"score": null}'))
    with pytest.raises(ValueError, match="(?s)6_dpo.jsonl:4: .*state 'scored' does not go with score None"):
        compare([run / "2_sft", run / "6_dpo"])


def test_regressions_come_first(run):
    c = compare([run / "2_sft", run / "6_dpo"])
    assert [(q.answers[0].uniq_id, q.outcome) for q in c.questions] == [
        ("q4", "regressed"),
        ("q2", "improved"),
        ("q3", "improved"),
        ("q1", "unchanged"),
    ]


def test_a_run_folder_stands_for_its_after_policy(run):
    assert compare([run / "2_sft", run]).policies[1].label == "6_dpo"


def test_policies_of_two_runs_are_joined_by_question_whatever_the_order(run):
    other = run.parent / "other"
    evaluated(other, {"2_sft": scored(1, 1, 1, 1), "6_dpo": scored(10, 10, 10, 10)[::-1]})
    c = compare([run, other])
    assert [policy.label for policy in c.policies] == ["demo/6_dpo", "other/6_dpo"]
    assert next(iter(c.differences.values())).wins["overall"][:3] == (1, 3, 0)


def test_three_policies_with_a_mixed_question_counted_as_a_regression(run):
    other = run.parent / "other"
    evaluated(other, {"6_kto": scored(10, 1, 10, 10)})
    c = compare([run / "2_sft", run / "6_dpo", other / "6_kto"])
    outcomes = {question.answers[0].uniq_id: question.outcome for question in c.questions}
    # q2: 4 -> 10 with 6_dpo but 4 -> 1 with 6_kto.
    assert outcomes == {"q1": "unchanged", "q2": "regressed", "q3": "improved", "q4": "regressed"}
    assert list(c.differences) == ["6_dpo", "6_kto"]
    assert {standing.policy for standing in c.league} == {"2_sft", "6_dpo", "6_kto"}
    # q1 to q4: 10 4 4 10 against 10 10 10 1 against 10 1 10 10.
    assert [standing.policy for standing in c.league][-1] == "2_sft"


def test_the_test_split_is_preferred_to_dev(run):
    evaluated(
        run, {"2_sft": scored(1, 1, 1, 1), "6_dpo": scored(1, 1, 1, 1)}, stage="9_evaluate", split="dev"
    )
    assert compare([run / "2_sft", run / "6_dpo"]).policies[0].evaluation.folder.name == "7_evaluate"


def test_other_questions_are_refused_with_the_numbers(run):
    other = run.parent / "other"
    evaluated(other, {"6_dpo": [item("q1", "a", 10), item("q2", "a", 10), item("q9", "a", 10)]})
    with pytest.raises(CannotCompare, match="4 and 3, of which 2 are the same"):
        compare([run, other])


def test_the_same_ids_with_other_questions_behind_them_are_refused(run):
    other = run.parent / "other"
    evaluated(other, {"6_dpo": scored(1, 1, 1, 1, question="Who speaks?")})
    with pytest.raises(CannotCompare, match="4 questions or references behind them differ"):
        compare([run, other])


def test_other_judges_are_refused(run):
    other = run.parent / "other"
    evaluated(other, {"6_dpo": scored(1, 1, 1, 1)}, judge="gpt")
    with pytest.raises(CannotCompare, match="'facts' and 'gpt'"):
        compare([run, other])


def test_what_was_not_evaluated_is_named(run):
    (run / "6_kto").mkdir()
    (run / "6_kto/manifest.json").write_text("{}")
    with pytest.raises(CannotCompare, match=r"'6_kto' was not evaluated in .*\(evaluated: 2_sft, 6_dpo\)"):
        compare([run / "2_sft", run / "6_kto"])
    with pytest.raises(CannotCompare, match="no finished evaluation"):
        compare([run / "2_sft", run.parent / "nowhere"])
    with pytest.raises(CannotCompare, match="named twice"):
        compare([run / "6_dpo", run])
    with pytest.raises(CannotCompare, match="two policies or more, got 1"):
        compare([run])


def test_answers_within_the_judges_margin_tie(run):
    path = run / "7_evaluate/scores.json"
    told = json.loads(path.read_text())
    path.write_text(json.dumps(told | {"judge": told["judge"] | {"tie_margin": 6.0}}))
    c = compare([run / "2_sft", run / "6_dpo"])
    assert next(iter(c.differences.values())).wins["overall"][:3] == (
        0,
        3,
        1,
    )  # 4 -> 10 is within 6 points, 10 -> 1 is not
    assert [question.outcome for question in c.questions] == ["regressed"] + 3 * ["unchanged"]


def test_json_and_table_tell_the_same_numbers(run):
    c = compare([run / "2_sft", run / "6_dpo"])
    told = json.loads(json.dumps(to_json(c)))
    assert told["baseline"] == "2_sft"
    assert told["n"] == 4
    assert told["differences"][0]["scores"]["overall"] == c.differences["6_dpo"].scores["overall"]._asdict()
    assert told["league"] == []
    assert told["questions"][0] == {
        "uniq_id": "q4",
        "category": "music",
        "task": "music_QA",
        "outcome": "regressed",
        "change": -9,
        "scores": [10, 1],
        "states": ["scored", "scored"],
    }
    lines = as_table(c)
    assert lines[1].split() == [
        "2_sft",
        "50.0",
        "%",
        "100.0",
        "%",
        "7.00",
        "33.3",
        "%",
        "100.0",
        "%",
        "0.0",
        "%",
        "3.00",
        "4",
        "0.0",
        "%",
    ]
    assert any("2 wins, 1 ties, 1 losses" in line for line in lines)
    assert any(line.startswith("6_dpo − 2_sft") and "+0.75 [" in line for line in lines)


def test_only_a_verdict_on_this_policy_and_this_evaluation_stands(tmp_path):
    run = make_run(tmp_path / "run", 40, clip_s=0.1)
    first, second = compare([run / "2_sft", run / "6_dpo"]).policies
    assert first.gate is None
    assert (second.gate.verdict, second.gate.is_current) == ("pass", True)
    manifest = run / "7_evaluate/manifest.json"
    manifest.write_text(manifest.read_text().replace("e7" * 32, "e8" * 32))
    c = compare([run / "2_sft", run / "6_dpo"])
    assert not c.policies[1].gate.is_current
    write_html(c, run / "compare.html")
    assert "The verdict is of an earlier evaluation" in (run / "compare.html").read_text()


def test_ancestors_are_told_once_with_what_went_in_and_whether_it_has_changed(tmp_path):
    def stage(name, digest, **inputs):
        (tmp_path / name).mkdir()
        made = {"kind": name, "output_digest": digest, "inputs": inputs, "seed": 3}
        (tmp_path / name / "manifest.json").write_text(json.dumps(made))

    stage("corpus", "c2")
    stage("sft", "s1", corpus="c1", **{"maker/model": "hub"})
    stage("dpo", "d1", sft="s1", corpus="c1")
    told = [
        (ancestor.name, ancestor.digest, ancestor.is_changed, ancestor.manifest.get("seed"))
        for ancestor in ancestry(tmp_path / "dpo").ancestors
    ]
    assert told == [
        ("dpo", "d1", False, 3),
        ("sft", "s1", False, 3),
        ("corpus", "c1", True, 3),  # c2 stands there now
        ("maker/model", "hub", False, None),
    ]


def test_what_is_behind_a_policy_is_sorted_and_who_needs_all_of_it_is_told_what_is_gone(tmp_path):
    def stage(run, name, digest, produces, **inputs):
        (tmp_path / run / name).mkdir(parents=True)
        manifest = {"produces": produces, "output_digest": digest, "inputs": inputs}
        (tmp_path / run / name / "manifest.json").write_text(json.dumps(manifest))

    stage("old", "corpus", "c1", "corpus")
    stage("old", "sft", "s1", "policy", corpus="c1")
    stage("new", "corpus", "c3", "corpus")
    stage("new", "pairs", "p1", "pairs", corpus="c2")
    stage("new", "dpo", "d1", "policy", pairs="p1", corpus="c3", **{str(tmp_path / "old/sft"): "s1"})
    history = complete_ancestry(tmp_path / "new/dpo")
    assert history.datasets() == {"corpus": "c2,c3", "old/corpus": "c1", "pairs": "p1"}
    assert list(history.corpora()) == ["corpus", "old/corpus"]
    assert history.changed_corpora() == ["corpus"]  # c2 is not there any more
    assert (history.unknown, history.missing) == ([], [])
    shutil.rmtree(tmp_path / "new/pairs")
    assert ancestry(tmp_path / "new/dpo").missing == ["pairs"]
    with pytest.raises(FileNotFoundError, match="was made from pairs, which is not there any more"):
        complete_ancestry(tmp_path / "new/dpo")

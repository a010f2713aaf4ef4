import json
import re

import numpy as np
import pytest
import soundfile

from align.release.compare import CannotCompare, as_table, compare, diff_words, to_json, write_html

HOSTILE = "<script>alert(1)</script> <img src=x onerror=alert(2)>"
IDS = ("q1", "q2", "q3", "q4")


def item(uniq_id, response, score, **changed):
    """A question whose marks follow its score: 10 is right, everything below is not factual."""
    return {
        "uniq_id": uniq_id,
        "task_name": "sound_QA",
        "category": "sound" if uniq_id in ("q1", "q2") else "music",
        "audio": f"test/{uniq_id}.wav",
        "question": f"What is heard in {uniq_id}?",
        "answer_gt": "A dog barks.",
        "meta_info": "{}",
        "response": response,
        "factual": score == 10,
        "behaves": True,
        "asked": score == 10,
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
        "policies": {
            name: {"overall": {"factuality": float(np.mean([one["factual"] for one in items])), "words": 3.0}}
            for name, items in policies.items()
        },
    }
    (folder / "scores.json").write_text(json.dumps(scores))


def scored(*marks, **changed):
    return [item(key, f"answer {key} {mark}", mark, **changed) for key, mark in zip(IDS, marks, strict=True)]


@pytest.fixture
def run(tmp_path):
    """2_sft scores 10 4 4 10, 6_dpo 10 10 10 1: one tie, two wins, one loss."""
    evaluated(tmp_path / "demo", {"2_sft": scored(10, 4, 4, 10), "6_dpo": scored(10, 10, 10, 1)})
    (tmp_path / "demo/0_corpus/test").mkdir(parents=True)
    for key in IDS[:3]:
        tone = np.sin(np.arange(8000) / 5).astype("float32")
        soundfile.write(tmp_path / f"demo/0_corpus/test/{key}.wav", tone, 16000)
    return tmp_path / "demo"


def test_paired_differences_by_hand(run):
    c = compare([run / "2_sft", run / "6_dpo"])
    (against,) = c.differences
    assert [policy.label for policy in c.policies] == ["2_sft", "6_dpo"]
    assert (against.wins, against.ties, against.losses) == (2, 1, 1)
    # Factual before: q1 q4, after: q1 q2 q3. Scores: mean 7 and 7.75. Answerable (q1 q2 q3): 1/3, then 3/3.
    assert against.overall["factuality"][:3] == pytest.approx((0.5, 0.75, 0.25))
    assert against.overall["score"][:3] == pytest.approx((7.0, 7.75, 0.75))
    assert against.overall["asked"][:3] == pytest.approx((1 / 3, 1.0, 2 / 3))
    assert against.overall["asked"].n == 3
    assert against.overall["behaviour"] == (1.0, 1.0, 0.0, 0.0, 0.0, 4)
    assert against.categories["sound"]["factuality"][:3] == pytest.approx((0.5, 1.0, 0.5))
    assert against.categories["music"]["score"][:3] == pytest.approx((7.0, 5.5, -1.5))


def test_regressions_come_first(run):
    c = compare([run / "2_sft", run / "6_dpo"])
    assert [(q.items[0].uniq_id, q.outcome) for q in c.questions] == [
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
    assert (c.differences[0].wins, c.differences[0].ties, c.differences[0].losses) == (1, 3, 0)


def test_three_policies_with_a_mixed_question_counted_as_a_regression(run):
    other = run.parent / "other"
    evaluated(other, {"6_kto": scored(10, 1, 10, 10)})
    c = compare([run / "2_sft", run / "6_dpo", other / "6_kto"])
    outcomes = {question.items[0].uniq_id: question.outcome for question in c.questions}
    # q2: 4 -> 10 with 6_dpo but 4 -> 1 with 6_kto.
    assert outcomes == {"q1": "unchanged", "q2": "regressed", "q3": "improved", "q4": "regressed"}
    assert [difference.label for difference in c.differences] == ["6_dpo", "6_kto"]


def test_the_test_split_is_preferred_to_dev(run):
    evaluated(
        run, {"2_sft": scored(1, 1, 1, 1), "6_dpo": scored(1, 1, 1, 1)}, stage="9_evaluate", split="dev"
    )
    assert compare([run / "2_sft", run / "6_dpo"]).policies[0].evaluation.name == "7_evaluate"


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


def test_json_and_table_tell_the_same_numbers(run):
    c = compare([run / "2_sft", run / "6_dpo"])
    told = json.loads(json.dumps(to_json(c)))
    assert told["baseline"] == "2_sft"
    assert told["n"] == 4
    assert told["differences"][0]["overall"]["score"] == c.differences[0].overall["score"]._asdict()
    assert told["questions"][0] == {
        "uniq_id": "q4",
        "category": "music",
        "outcome": "regressed",
        "scores": [10, 1],
    }
    lines = as_table(c)
    assert lines[1].split() == ["2_sft", "50.0", "%", "–", "–", "–", "–", "3.00"]
    assert any("2 wins, 1 ties, 1 losses" in line for line in lines)
    assert any(line.startswith("6_dpo − 2_sft") and "+0.75 [" in line for line in lines)


def test_the_page_escapes_answers_and_allows_only_its_own_script(run):
    path = run / "7_evaluate/items/6_dpo.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row | {"response": HOSTILE}) + "\n" for row in rows))
    page = run / "compare.html"
    write_html(compare([run / "2_sft", run / "6_dpo"]), page)
    html = page.read_text(encoding="utf-8")
    assert re.findall(r"<script[^>]*>", html) == [
        f'<script nonce="{nonce}">' for nonce in re.findall(r"nonce-([\w-]+)'", html)
    ]
    assert html.count("<script") == 1
    assert "<img" not in html
    assert html.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 4
    assert not re.search(r"https?://", html)
    assert re.findall(r' src="(data:audio/mpeg;base64,)', html) == ["data:audio/mpeg;base64,"] * 3
    assert "test/q4.wav is not in the corpus folder" in html


def test_every_page_has_a_nonce_of_its_own(run):
    c = compare([run / "2_sft", run / "6_dpo"])
    nonces = []
    for _ in range(2):
        write_html(c, run / "compare.html")
        nonces.append(re.search(r"nonce-([\w-]+)", (run / "compare.html").read_text()).group(1))
    assert nonces[0] != nonces[1]
    assert len(nonces[0]) >= 16


def test_word_diff_marks_what_no_other_answer_has():
    assert (
        diff_words("a <b> barks twice", ["a dog barks"])
        == "a <mark>&lt;b&gt;</mark> barks <mark>twice</mark>"
    )
    assert diff_words("a dog barks", ["a cat", "the dog"]) == "a dog <mark>barks</mark>"
    assert diff_words("", ["a"]) == ""
    assert diff_words("one two", ["three"]) == "<mark>one two</mark>"

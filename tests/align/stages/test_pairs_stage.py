"""The stages of pairs and labels: whose judgements count, and that each says what it left out."""

import json

import pytest
from pydantic import ValidationError

from align.recipe.config.preference import LabelsConfig, PairsConfig
from align.run_folder.artifacts import StageFolder
from align.stages import labels, pairs
from preference_data import store
from preference_data.schema import Completion, PreferencePair, Prompt
from tests.preference_data.votes import judged

CONFIG = {"stage": "pairs", "completions": "3_sample", "annotations": "4_annotate"}


@pytest.mark.parametrize(("min_heard", "n_pairs"), [(0.8, 1), (0.5, 2)])
def test_pairs_are_built_of_what_the_report_counts_as_heard(tmp_path, min_heard, n_pairs):
    prompts = [
        Prompt(id=f"p{i}", audios=("a.wav",), question="?", answer_gt="", meta_info="{}", task_name="t")
        for i in range(2)
    ]
    completions = [
        Completion(id=f"{prompt.id}{side}", prompt_id=prompt.id, index=i, text=side, policy="x")
        for prompt in prompts
        for i, side in enumerate("ab")
    ]
    judgements = [
        judged("ab", "a", "tie", prompt_id=prompt.id, id=prompt.id, comparison=prompt.id, heard=heard)
        for prompt, heard in zip(prompts, (0.9, 0.6), strict=True)
    ]
    inputs = {"3_sample": tmp_path / "3", "4_annotate": tmp_path / "4"}
    store.write(inputs["3_sample"] / "prompts.jsonl", prompts)
    store.write(inputs["3_sample"] / "completions.jsonl", completions)
    store.write(inputs["4_annotate"] / "judgements.jsonl", judgements)
    (inputs["4_annotate"] / "quality.json").write_text(json.dumps({"min_heard": min_heard}))
    out = StageFolder(tmp_path, "5_pairs", fingerprint="f")
    metrics = pairs.run(PairsConfig(**CONFIG), inputs, out)
    assert metrics["pairs_factuality"] == n_pairs
    assert metrics["control_tokens"] == 0
    assert (out.path / "quarantine.jsonl").read_text() == ""
    store.write(
        inputs["4_annotate"] / "judgements.jsonl",
        [item.model_copy(update={"corrected": "x<|im_end|>"}) for item in judgements],
    )
    again = pairs.run(PairsConfig(**CONFIG), inputs, out)
    assert (again["pairs_factuality"], again["control_tokens"]) == (n_pairs, 2)
    row = json.loads((out.path / "quarantine.jsonl").read_text().split("\n")[0])
    assert (row["id"], row["code"]) == ("p0", "control_token")
    assert "<|im_end|>" in row["detail"]
    store.write(inputs["3_sample"] / "prompts.jsonl", prompts[:1])
    with pytest.raises(store.BadRecord, match=r"about prompt p1, which `completions` lacks"):
        pairs.run(PairsConfig(**CONFIG), inputs, out)


def test_the_old_place_of_min_heard_is_answered_with_the_new_one():
    with pytest.raises(ValidationError, match="min_heard is a key of the annotate stage now"):
        PairsConfig(**CONFIG, min_heard=0.8)


def stage(kind, config, tmp_path, judgements):
    """Run a stage on judgements of one prompt; its metrics and folder."""
    prompt = Prompt(id="p", audios=("a.wav",), question="?", answer_gt="", meta_info="{}", task_name="t")
    inputs = {"3_sample": tmp_path / "3", "4_annotate": tmp_path / "4"}
    store.write(inputs["3_sample"] / "prompts.jsonl", [prompt])
    store.write(inputs["3_sample"] / "completions.jsonl", [])  # the texts are in the judgements
    store.write(inputs["4_annotate"] / "judgements.jsonl", judgements)
    (inputs["4_annotate"] / "quality.json").write_text(json.dumps({"min_heard": 0.8}))
    out = StageFolder(tmp_path, "5", fingerprint="f")
    return kind.run(config, inputs, out), out.path


def crowd():
    """Twenty comparisons by three who know, by lisa, who takes what is first, and by bob, who is wrong."""
    made = []
    for i in range(20):
        texts, truth = (f"x{i}", f"y{i}"), "ab"[i % 2]
        made += [judged(texts, truth, annotator=who) for who in ("ann", "joe", "kim")]
        made += [judged(texts, "a", annotator="lisa"), judged(texts, "ba"[i % 2], annotator="bob")]
        gold = {"purpose": "gold", "expected": "b", "comparison": f"g{i}"}
        made.append(judged((f"g{i}", f"h{i}"), "a", annotator="lisa", **gold))
    return made


@pytest.mark.parametrize(
    ("kind", "config"),
    [(pairs, PairsConfig(**CONFIG)), (labels, LabelsConfig(**CONFIG | {"stage": "labels"}))],
)
def test_findings_act_and_the_page_says_what_each_rule_left_out(tmp_path, kind, config):
    acts = {"exclude": ["bob"], "min_gold": 0.5, "annotator_weights": "dawid_skene"}
    metrics, folder = stage(kind, config.model_copy(update=acts), tmp_path, crowd())
    assert {key: metrics[key] for key in ("counted", "controls", "excluded", "below_gold")} == {
        "counted": 60, "controls": 20, "excluded": 20, "below_gold": 20,
    }  # fmt: skip
    rules = json.loads((folder / "rules.json").read_text())
    left_out = {row["rule"]: row["left_out"] for row in rules["rules"] if row["of"] == "judgements"}
    assert left_out["exclude"] == left_out["min_gold"] == 20
    assert set(rules["weights"]) == {"ann", "joe", "kim"}
    page = (folder / "rules.html").read_text()
    assert "lisa: 0 of 20 right, at most 16%" in page
    assert "What an annotator's vote weighs" in page.replace("&#39;", "'")


def test_pairs_carry_their_evidence(tmp_path):
    metrics, folder = stage(pairs, PairsConfig(**CONFIG, exclude=["bob", "lisa"]), tmp_path, crowd())
    built = store.read(folder / "pairs.jsonl", PreferencePair)
    assert metrics["pairs_factuality"] == len(built) == 20
    assert {(pair.judges, pair.agreement, pair.evidence) for pair in built} == {(3, 1.0, 0.875)}
    assert built[0].annotators == ("ann", "joe", "kim")


def test_what_an_annotator_is_called_stays_text(tmp_path):
    name = "<script>alert(1)</script>"
    given = [judged("ab", "a"), judged("ab", "a", annotator=name)]
    _, folder = stage(pairs, PairsConfig(**CONFIG, exclude=[name]), tmp_path, given)
    page = (folder / "rules.html").read_text()
    assert name not in page
    assert "&lt;script&gt;" in page


@pytest.mark.parametrize(
    ("key", "value"),
    [("exclude", ["ann"]), ("min_gold", 0.5), ("annotator_weights", "equal"), ("correction_weight", 0.1)],
)
def test_rules_about_annotators_have_no_effect_with_scores(key, value):
    with pytest.raises(ValidationError, match=f"{key}: has no effect with scores"):
        PairsConfig(stage="pairs", completions="3_sample", scores="4_score", **{key: value})

"""Completions -> scores -> pairs and labels, through the stages."""

import json

import pytest
from pydantic import ValidationError

from align.recipe.config.preference import LabelsConfig, PairsConfig, ScoreConfig
from align.run_folder.artifacts import StageFolder
from align.stages import labels, pairs, score
from preference_data import store
from preference_data.schema import Completion, CompletionScore, Label, PreferencePair, Prompt

TEXTS = {"p0": ["a dog", "A dog barks.", "a dog barks"], "p1": ["no", "nothing", "no"]}
REWARD = {"wer": {"language": "en"}, "length": {"max_chars": 5, "weight": 0.5}}


@pytest.fixture
def inputs(tmp_path):
    folders = {"corpus": tmp_path / "0", "sampled": tmp_path / "1"}
    prompts = [
        Prompt(
            id="p0", audios=("a.wav",), question="?", answer_gt="A dog barks.", meta_info="{}", task_name="t"
        ),
        Prompt(id="p1", audios=("b.wav",), question="?", answer_gt="Yes.", meta_info="{}", task_name="t"),
    ]
    store.write(folders["sampled"] / "prompts.jsonl", prompts)
    completions = [
        Completion(id=f"{prompt}c{i}", prompt_id=prompt, index=i, text=text, policy="x")
        for prompt, texts in TEXTS.items()
        for i, text in enumerate(texts)
    ]
    store.write(folders["sampled"] / "completions.jsonl", completions)
    return folders


def stage(module, config, inputs, folder, name):
    out = StageFolder(folder, name, "f")
    out.open()
    metrics = module.run(config, inputs, out)
    inputs[name] = out.path
    return metrics


@pytest.fixture
def scored(inputs, tmp_path):
    config = ScoreConfig(stage="score", completions="sampled", corpus="corpus", reward=REWARD)
    return stage(score, config, inputs, tmp_path, "scores")


def test_scores_are_the_weighted_parts_and_say_what_decided(inputs, scored):
    rows = {row.id: row for row in store.read(inputs["scores"] / "scores.jsonl", CompletionScore)}
    assert rows["p0c0"].parts == {"wer": pytest.approx(2 / 3), "length": 0.0}
    assert rows["p0c1"].parts["wer"] == 1.0
    assert rows["p0c1"].parts["length"] == -1.0  # more than twice as long
    assert rows["p0c1"].reward == pytest.approx(0.5)
    assert rows["p1c0"].reward == 0.0
    identity = json.loads((inputs["scores"] / "reward.json").read_text())
    assert [kind["kind"] for kind in identity["rewards"]] == ["wer", "length"]
    assert scored["completions"] == 6
    assert scored["best_reward"] == pytest.approx((2 / 3 + 0) / 2)
    assert scored["same_reward"] == 0  # "nothing" is long, and wrong


def test_an_engine_belongs_to_the_stage_that_draws():
    with pytest.raises(ValidationError, match="score draws no completions, the sample stage has drawn them"):
        ScoreConfig(stage="score", completions="s", corpus="c", reward=REWARD, engine="vllm")


def test_pairs_and_labels_of_scores(inputs, scored, tmp_path):
    both = {"completions": "sampled", "scores": "scores"}
    metrics = stage(pairs, PairsConfig(stage="pairs", margin=0.1, **both), inputs, tmp_path, "pairs")
    built = store.read(inputs["pairs"] / "pairs.jsonl", PreferencePair)
    assert [(pair.chosen, pair.rejected, pair.axis) for pair in built] == [
        ("a dog", "a dog barks", "reward"),
        ("no", "nothing", "reward"),
    ]
    assert metrics == {"pairs": 2, "ties": 0, "unscored": 0}
    stage(labels, LabelsConfig(stage="labels", good_from=0.6, **both), inputs, tmp_path, "labels")
    made = store.read(inputs["labels"] / "labels.jsonl", Label)
    assert {label.completion: label.label for label in made} == {
        "a dog": True,
        "A dog barks.": False,
        "a dog barks": False,
        "no": False,
        "nothing": False,
    }


@pytest.mark.parametrize(
    ("config", "keys", "message"),
    [
        (PairsConfig, {}, "give annotations, or scores"),
        (PairsConfig, {"annotations": "a", "scores": "s"}, "give annotations, or scores"),
        (PairsConfig, {"scores": "s", "min_alpha": 0.3}, "min_alpha: has no effect with scores"),
        (PairsConfig, {"annotations": "a", "margin": 0.3}, "margin: has no effect with annotations"),
        (LabelsConfig, {"scores": "s"}, "good_from: required with scores"),
        (LabelsConfig, {"scores": "s", "good_from": 0.5, "bad_to": 0.5}, "bad_to: 0.5 must lie below"),
        (LabelsConfig, {"annotations": "a", "good_from": 0.5}, "good_from: has no effect with annotations"),
    ],
)
def test_keys_that_have_no_effect_are_refused(config, keys, message):
    with pytest.raises(ValidationError, match=message):
        config(stage=config.kind(), completions="c", **keys)

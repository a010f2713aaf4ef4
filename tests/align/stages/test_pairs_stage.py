"""The pairs stage: what counts as heard is said once, by the stage that reports on the annotators."""

import json

import pytest
from pydantic import ValidationError

from align.recipe.config.preference import PairsConfig
from align.run_folder.artifacts import StageFolder
from align.stages import pairs
from preference_data import store
from preference_data.schema import Completion, Prompt
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


def test_the_old_place_of_min_heard_is_answered_with_the_new_one():
    with pytest.raises(ValidationError, match="min_heard is a key of the annotate stage now"):
        PairsConfig(**CONFIG, min_heard=0.8)

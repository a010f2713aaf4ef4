"""The sample stage: the same completions whatever the batches were, and only what is missing after a kill."""

import json
import shutil
from itertools import combinations

import numpy as np
import pytest
import soundfile

from align.generation import complete
from align.recipe.config.preference import SampleConfig, ScoreConfig
from align.run_folder.artifacts import StageFolder
from align.stages import sample, score
from preference_data import store
from preference_data.preferences.selection import select
from preference_data.prompts.prompts import BadExample
from preference_data.schema import Completion, CompletionScore, Prompt
from tests.align.generation import toy_policy

UNUSED = {"answer_gt": "", "meta_info": "{}", "task_name": "speech_QA"}


@pytest.fixture(scope="module")
def inputs(tiny, tmp_path_factory):
    """A trained policy, and a corpus of seven prompts about four clips, one of them about two."""
    root = tmp_path_factory.mktemp("sample")
    toy_policy.train(tiny.policy, tiny.audio, root / "policy")
    clips = [(f"{i % 4}.wav",) for i in range(6)] + [("0.wav", "1.wav")]
    prompts = [
        Prompt(id=f"p{i}", audios=audios, question=list(toy_policy.QUESTIONS)[i % 3], **UNUSED)
        for i, audios in enumerate(clips)
    ]
    corpus = root / "corpus"
    shutil.copytree(tiny.audio, corpus)
    store.write(corpus / "prompts.jsonl", prompts)
    return {"0": corpus, "1": root / "policy"}


def run(inputs, folder, **more):
    config = SampleConfig(
        stage="sample", corpus="0", policy="1", max_new_tokens=8, **({"batch_size": 3} | more)
    )
    out = StageFolder(folder, "3_sample", "x")
    out.open()
    return sample.run(config, inputs, out), (out.path / "completions.jsonl").read_text()


def assert_same(text, other):
    """Log-probabilities may differ in their last digits, by what else was in the batch."""
    rows, others = ([json.loads(line) for line in lines.splitlines()] for lines in (text, other))
    assert [row.pop("logp") for row in rows] == pytest.approx([row.pop("logp") for row in others], abs=1e-4)
    assert rows == others


def test_what_is_sampled_depends_on_the_seed_alone(inputs, tmp_path, monkeypatch):
    metrics, whole = run(inputs, tmp_path / "whole")
    assert metrics["prompts"] == 7
    assert metrics["completions"] == 28
    rows = [json.loads(line) for line in whole.splitlines()]
    assert [row["index"] for row in rows] == [0, 1, 2, 3] * 7
    assert {row["prompt_id"] for row in rows} == {f"p{i}" for i in range(7)}
    assert_same(run(inputs, tmp_path / "one", batch_size=1)[1], whole)
    assert run(inputs, tmp_path / "other", seed=1)[1] != whole
    save = complete._save

    def fails_after_the_first(folder, completed):
        save(folder, completed)
        raise KeyboardInterrupt

    monkeypatch.setattr(complete, "_save", fails_after_the_first)
    with pytest.raises(KeyboardInterrupt):
        run(inputs, tmp_path / "killed")
    made = []
    monkeypatch.setattr(complete, "_save", lambda folder, done: made.append(list(done)) or save(folder, done))
    assert run(inputs, tmp_path / "killed")[1] == whole
    assert made == [[3, 4, 5], [6]]
    state = json.loads((tmp_path / "killed/.partial-3_sample/progress.json").read_text())
    assert (state["done"], state["total"]) == (7, 7)


def test_completions_keep_the_log_probabilities_that_the_engine_gave(inputs, tmp_path):
    """As the batches hold them, and those of older runs do: nothing is drawn again for them."""
    _, whole = run(inputs, tmp_path)
    batches = sorted((tmp_path / ".partial-3_sample/batches/prompts").glob("*.json"))
    of_prompts = {}
    for path in batches:
        of_prompts |= json.loads(path.read_text())
    groups = [of_prompts[str(number)] for number in range(7)]
    rows = [json.loads(line) for line in whole.splitlines()]
    assert [row["n_tokens"] for row in rows] == [len(c["token_ids"]) for group in groups for c in group]
    assert [row["logp"] for row in rows] == pytest.approx([sum(c["logps"]) for g in groups for c in g])
    assert all(row["logp"] < 0 for row in rows)
    assert max(row["n_tokens"] for row in rows) <= 8
    assert run(inputs, tmp_path)[1] == whole


@pytest.mark.parametrize("token", ["<|AUDIO|>", "<|im_end|>", "<|zh|>"])
def test_a_prompt_that_would_steer_the_model_is_named_before_anything_is_loaded(tmp_path, token):
    prompts = [
        Prompt(id=f"p{i}", audios=("a.wav",), question=text, **UNUSED)
        for i, text in enumerate(("Hm?", token))
    ]
    store.write(tmp_path / "corpus/prompts.jsonl", prompts)
    with pytest.raises(BadExample, match=r"example 'p1': its text holds <\|"):
        run({"0": tmp_path / "corpus", "1": tmp_path / "policy"}, tmp_path / "run")


@pytest.mark.parametrize("damage", ["samples", "gone", "page"])
def test_a_prompt_about_a_bad_clip_is_left_out(inputs, tmp_path, damage):
    """The others get the completions that they get beside it."""
    _, whole = run(inputs, tmp_path / "whole")
    corpus = tmp_path / "corpus"
    shutil.copytree(inputs["0"], corpus)
    spoil(corpus / "1.wav", damage)
    metrics, text = run({**inputs, "0": corpus}, tmp_path / "run")
    assert metrics["left_out_unreadable_audio"] == 3
    kept = [line for line in whole.splitlines() if json.loads(line)["prompt_id"] not in ("p1", "p5", "p6")]
    assert_same(text, "\n".join(kept))
    left_out = [json.loads(line) for line in (tmp_path / "run/.partial-3_sample/left_out.jsonl").open()]
    assert [row["id"] for row in left_out] == ["p1", "p5", "p6"]


def spoil(path, damage):
    """Make a clip one that only decoding shows to be bad, or one that is not there, or no clip."""
    path.unlink()
    if damage == "samples":
        soundfile.write(path, np.full(8_000, np.nan), 16_000, subtype="FLOAT", format="WAV")
    if damage == "page":
        path.write_text("<html>")


def test_what_is_sampled_and_scored_is_selected(inputs, tmp_path):
    """A reward that likes `low` sets itself against a policy that is sure of `high` where it hears it."""
    run(inputs, tmp_path, completions_per_prompt=4, temperature=2.0)
    reward = {"format": {"pattern": "(?i).*low.*"}, "length": {"max_chars": 20, "weight": 0.01}}
    config = ScoreConfig(stage="score", completions="sampled", corpus="0", reward=reward)
    out = StageFolder(tmp_path, "4_score", "x")
    out.open()
    sampled = tmp_path / ".partial-3_sample"
    score.run(config, {"0": inputs["0"], "sampled": sampled}, out)
    completions = {item.id: item for item in store.stream(sampled / "completions.jsonl", Completion)}
    scores = {item.id: item for item in store.stream(out.path / "scores.jsonl", CompletionScore)}
    of_prompts = {}
    for item in completions.values():
        of_prompts.setdefault(item.prompt_id, []).append(item.id)
    candidates = [pair for keys in of_prompts.values() for pair in combinations(keys, 2)]
    more = {"random_share": 0.0, "near_tie": 0.1, "seed": 0}
    selected = select(candidates, completions, scores, n=3, rule="disagreement", **more)
    assert list(selected.values()) == ["active"] * 3
    for first, second in selected:
        likelier, other = sorted((first, second), key=lambda key: -completions[key].mean_logp)
        assert scores[other].reward - scores[likelier].reward > 0.1

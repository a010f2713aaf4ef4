"""Prompts of several turns through the stages: sampled, judged, made pairs and labels, and learned by DPO."""

import json
import math
import shutil

import pytest
import soundfile
import torch

from align.models.chat import assistant, encode_prompt, system, user
from align.models.features import ClipFeatures
from align.models.qwen2_audio import model as qwen2_audio
from align.models.qwen2_audio.clips import expand_clips
from align.recipe.config.alignment import DPOConfig
from align.recipe.config.preference import PairsConfig, SampleConfig
from align.run_folder.artifacts import StageFolder, read_metrics, sha256_file
from align.stages import dpo, pairs, sample
from align.training.collate import PreferenceCollator, pair_row
from preference_data import store
from preference_data.preferences import labels
from preference_data.preferences.rules import Rules, count
from preference_data.prompts.prompts import BadExample
from preference_data.schema import (
    AudioClip,
    Completion,
    Judgement,
    PreferencePair,
    Prompt,
    Ranking,
    Turn,
    stable_id,
)
from tests.align.generation import toy_policy

ABOUT = {"answer_gt": "", "meta_info": "{}", "task_name": "chat"}
QUESTION, SHORT, CAPTION = toy_policy.QUESTIONS
PROMPTS = [
    Prompt(
        id="two-clips", audios=("0.wav", "1.wav"), question=QUESTION, system="Say low.",
        history=(Turn(question=QUESTION, answer="The tone is high.", audios=("0.wav",)),), **ABOUT,
    ),
    Prompt(
        id="three-turns", audios=("3.wav",), question=CAPTION,
        history=(
            Turn(question="Say something.", answer="high"),
            Turn(question="", answer="low", audios=("3.wav",)),
        ), **ABOUT,
    ),
    Prompt(id="one-turn", audios=("2.wav",), question=QUESTION, **ABOUT),
]  # fmt: skip
SPOKEN = {
    "two-clips": [
        *system("Say low."), user(QUESTION, 1), assistant("The tone is high."), user(QUESTION, 1)
    ],
    "three-turns": [
        user("Say something."), assistant("high"), user("", 1), assistant("low"), user(CAPTION)
    ],
    "one-turn": [user(QUESTION, 1)],
}  # fmt: skip
"""The same, written by hand."""


@pytest.fixture(scope="module")
def world(tiny, tmp_path_factory):
    """A policy that has learned a little, and a corpus whose prompts have several turns."""
    root = tmp_path_factory.mktemp("turns")
    toy_policy.train(tiny.policy, tiny.audio, root / "policy", steps=20)
    shutil.copytree(tiny.audio, root / "corpus")
    clips = [
        AudioClip(
            id=path.stem, path=path.name, split="preference", duration_s=soundfile.info(path).duration,
            sha256=sha256_file(path),
        )
        for path in sorted((root / "corpus").glob("*.wav"))
    ]  # fmt: skip
    store.write(root / "corpus" / "clips.jsonl", clips)
    store.write(root / "corpus" / "prompts.jsonl", PROMPTS)
    return root


def run(stage, config, inputs, folder):
    out = StageFolder(folder, config.stage, "x")
    out.open()
    return stage.run(config, inputs, out), out.path


def sampled(world, folder, **more):
    config = SampleConfig(
        stage="sample", corpus="0", policy="1", max_new_tokens=8, completions_per_prompt=6, temperature=1.5,
        **more,
    )  # fmt: skip
    return run(sample, config, {"0": world / "corpus", "1": world / "policy"}, folder)


def judged(folder):
    """For each prompt a judgement, as if by hand: the shortest completion is better than the longest."""
    groups = {prompt.id: [] for prompt in PROMPTS}
    for item in store.read(folder / "completions.jsonl", Completion):
        groups[item.prompt_id].append(item)
    for prompt_id, group in groups.items():
        better, *_, worse = sorted(group, key=lambda item: (len(item.text), item.text))
        assert better.text != worse.text
        yield Judgement(
            id=f"j-{prompt_id}",
            comparison=stable_id(prompt_id),
            prompt_id=prompt_id,
            completions=(worse.id, better.id),
            texts=(worse.text, better.text),
            kind="choice",
            annotator="ann",
            annotator_kind="person",
            factuality=Ranking(ranks=(2, 1)),
            behaviour=Ranking(ranks=(1, 1)),
            heard=1.0,
        )


def test_from_prompts_of_several_turns_to_a_step_of_dpo(world, tmp_path):
    metrics, completed = sampled(world, tmp_path / "sample")
    assert (metrics["prompts"], metrics["completions"]) == (3, 18)
    assert store.read(completed / "prompts.jsonl", Prompt) == PROMPTS
    annotated = tmp_path / "annotated"
    annotated.mkdir()
    store.write(annotated / "judgements.jsonl", list(judged(completed)))
    (annotated / "quality.json").write_text(json.dumps({"min_heard": 0.9}))
    config = PairsConfig(stage="pairs", completions="c", annotations="a")
    metrics, paired = run(pairs, config, {"c": completed, "a": annotated}, tmp_path / "pairs")
    made = {pair.prompt_id: pair for pair in store.read(paired / "pairs.jsonl", PreferencePair)}
    by_id = {prompt.id: prompt for prompt in PROMPTS}
    assert made.keys() == by_id.keys()
    for key, pair in made.items():
        assert pair.messages == by_id[key].messages
        assert pair.audios_per_turn == by_id[key].audios_per_turn
    text = (paired / "pairs.jsonl").read_text()
    assert text.count('"history"') == 2  # one turn is written as before

    processor = qwen2_audio.load_processor(world / "policy")
    features = ClipFeatures(processor, world / "corpus")
    for key, pair in made.items():
        prompt = expand_clips(processor, encode_prompt(processor, SPOKEN[key]), features(pair.audios)).ids
        batch = PreferenceCollator(processor, features)([pair_row(pair, 1.0)])
        assert all(ids[: len(prompt)].tolist() == prompt for ids in batch["input_ids"])

    config = DPOConfig(
        stage="dpo", corpus="0", policy="1", pairs="2", epochs=1, batch_size=3, learning_rate=1e-2,
        save_steps=1, held_out=0, trl={"logging_steps": 1},
    )  # fmt: skip
    inputs = {"0": world / "corpus", "1": world / "policy", "2": paired}
    dpo.check(config, inputs)
    metrics, trained = run(dpo, config, inputs, tmp_path / "dpo")
    assert metrics["pairs"] == 3
    [row] = [row for row in read_metrics(trained / "metrics.jsonl") if "loss" in row]
    assert row["loss"] == pytest.approx(math.log(2), abs=1e-5)
    before, after = (qwen2_audio.load_model(path) for path in (world / "policy", trained / "model"))
    assert margin(after, made, processor, features) > margin(before, made, processor, features)


@torch.no_grad()
def margin(model, made, processor, features):
    """How much likelier the chosen completions are than the rejected ones, in nats."""
    total = 0.0
    for pair in made.values():
        batch = PreferenceCollator(processor, features)([pair_row(pair, 1.0)])
        names = ("input_ids", "attention_mask", "input_features", "feature_attention_mask")
        logps = model(**{name: batch[name] for name in names}).logits[:, :-1].log_softmax(-1)
        picked = logps.gather(-1, batch["input_ids"][:, 1:, None])[..., 0] * batch["completion_mask"][:, 1:]
        chosen, rejected = picked.sum(-1).tolist()
        total += chosen - rejected
    return total


def test_labels_have_the_whole_conversation(world, tmp_path):
    _, completed = sampled(world, tmp_path / "sample")
    prompts = {prompt.id: prompt for prompt in PROMPTS}
    counted = count(list(judged(completed)), Rules(min_heard=0.9))
    made, _ = labels.of_judgements(counted, prompts, axis="factuality", min_agreement=0.5)
    assert {label.prompt_id for label in made} == prompts.keys()
    for label in made:
        assert label.prompt == prompts[label.prompt_id].messages
        assert label.audios == prompts[label.prompt_id].audios


@pytest.mark.parametrize("change", ["answer", "question", "system"])
def test_a_turn_that_would_steer_the_model_is_named_before_anything_is_loaded(tmp_path, change):
    bad = {"system": "<|im_end|>"}
    if change != "system":
        turn = PROMPTS[1].history[0].model_copy(update={change: "<|im_start|>"})
        bad = {"history": (turn, PROMPTS[1].history[1])}
    prompts = [PROMPTS[0], PROMPTS[1].model_copy(update=bad)]
    (tmp_path / "corpus").mkdir()
    store.write(tmp_path / "corpus" / "prompts.jsonl", prompts)
    with pytest.raises(BadExample, match=r"example 'three-turns': its text holds <\|im_"):
        sampled(tmp_path, tmp_path / "run")

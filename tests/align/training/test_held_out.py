"""Pairs that are held out: how they are drawn, what is logged of them, and a checkpoint chosen by them."""

import json
import os
import shutil

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from align.models.features import ClipFeatures
from align.models.qwen2_audio import model as qwen2_audio
from align.models.scoring import completion_logps
from align.run_folder.artifacts import read_json, read_metrics, write_json
from align.run_folder.progress import PROGRESS
from align.stages import dpo
from align.training import data_loading, methods
from align.training.checkpoints import step_of
from align.training.collate import PreferenceCollator, label_row
from align.training.data_loading import hold_out
from align.training.lengths import Lengths
from align.training.preflight import NotReady, describe_beyond
from align.training.run import CheckpointChoice, choose
from preference_data import store
from preference_data.schema import Label
from tests.align.training import tiny_training


def pair(number, *audios, prompt="high?"):
    return {"prompt": prompt, "chosen": f"{number}", "rejected": "low", "audios": list(audios), "weight": 1.0}


# -------------------------------------------------------------------------- the draw


def test_pairs_about_one_clip_stay_together_and_every_pair_is_somewhere():
    rows = [pair(n, f"{n % 20}.wav") for n in range(100)]
    for seed in range(20):
        training, held_out = hold_out(rows, 0.2, seed)
        assert sorted(row["chosen"] for row in training + held_out) == sorted(row["chosen"] for row in rows)
        assert 15 <= len(held_out) <= 20
        assert not {row["audios"][0] for row in training} & {row["audios"][0] for row in held_out}
    draws = {str([row["chosen"] for row in hold_out(rows, 0.2, seed)[1]]) for seed in range(20)}
    assert len(draws) > 15


def test_clips_that_a_pair_joins_and_prompts_without_clips_stay_together():
    joined = [pair(0, "a"), pair(1, "a", "b"), pair(2, "b", "c"), pair(3, "c"), pair(4, "d")]
    texts = [pair(5, prompt="x"), pair(6, prompt="x"), pair(7, prompt="y")]
    for seed in range(20):
        training, held_out = hold_out([*joined, *texts], 0.4, seed)
        numbers = {int(row["chosen"]) for row in held_out}
        assert numbers & {0, 1, 2, 3} in (set(), {0, 1, 2, 3})
        assert numbers & {5, 6} in (set(), {5, 6})
        assert held_out
        assert training


def test_no_share_holds_nothing_out_and_what_hangs_together_cannot_be_divided():
    rows = [pair(0, "a"), pair(1, "a")]
    assert hold_out(rows, 0.0, 0) == (rows, [])
    with pytest.raises(ValueError, match="leaves none to train on"):
        hold_out(rows, 0.5, 0)


def test_choosing_by_held_out_pairs_needs_some():
    with pytest.raises(ValidationError, match="set held_out"):
        tiny_training.make_config("dpo", choose={"by": "held_out_loss"}, held_out=0)


# -------------------------------------------------------------------------- a training


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny_training.make_world(tmp_path_factory.mktemp("held") / "world")


@pytest.fixture(scope="module", params=["dpo", "dpo-stock", "dpo-lora"])
def run(request, world, tmp_path_factory):
    """A DPO without any facts that holds out a quarter and publishes the checkpoint with the least loss."""
    folder = tmp_path_factory.mktemp("run")
    changes = {"held_out": 0.25, "choose": {"by": "held_out_loss"}, "learning_rate": 0.03}
    config = tiny_training.make_config(request.param, steps=12, save_steps=3, **changes)
    metrics = tiny_training.run_here(config, world, folder)
    return config, folder / ".partial-stage", metrics


def test_loss_accuracy_and_margin_are_logged_at_every_checkpoint_and_the_best_is_published(run):
    config, out, metrics = run
    rows = [row for row in read_metrics(out / "metrics.jsonl") if "held_out/loss" in row]
    n_steps = -(-metrics["pairs"] * config.epochs // config.batch_size)
    assert [row["step"] for row in rows] == [*range(3, int(n_steps), 3), n_steps][: len(rows)]
    assert len(rows) >= 3
    state = read_json(out / PROGRESS)  # for those who watch
    assert (state["done"], state["total"]) == (n_steps, n_steps)
    assert "loss" in state["line"]
    assert all(0 <= row["held_out/accuracy"] <= 1 for row in rows)
    assert metrics["held_out_pairs"] + metrics["pairs"] == 24
    best = min(rows, key=lambda row: row["held_out/loss"])
    assert metrics["chosen_step"] == best["step"]
    assert metrics["held_out/loss"] == best["held_out/loss"]
    assert len({row["held_out/loss"] for row in rows}) == len(rows)


def test_the_figures_are_those_of_the_published_policy_by_hand(run, world):
    config, out, metrics = run
    policy, reference = (qwen2_audio.load_model(path) for path in (out / "model", world / "policy" / "model"))
    processor = qwen2_audio.load_processor(out / "model")
    collate = PreferenceCollator(processor, ClipFeatures(processor, world / "corpus"))
    margins, losses = [], []
    for row in hold_out(dpo._rows(config, world / "pairs"), config.held_out, config.seed)[1]:
        batch = collate([row])
        policy_logps, reference_logps = (completion_logps(m, batch).sum(-1) for m in (policy, reference))
        chosen, rejected = (policy_logps - reference_logps).tolist()
        margins.append(config.beta * (chosen - rejected))
        losses.append(-row["weight"] * F.logsigmoid(torch.tensor(margins[-1])).item())
    assert metrics["held_out/margin"] == pytest.approx(sum(margins) / len(margins), abs=1e-4)
    assert metrics["held_out/loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-4)
    assert metrics["held_out/accuracy"] == sum(margin > 0 for margin in margins) / len(margins)


@pytest.mark.parametrize("damage", ["samples", "gone", "page"])
def test_pairs_about_a_bad_clip_are_left_out(world, tmp_path, damage):
    copied = shutil.copytree(world, tmp_path / "world")
    config = tiny_training.make_config("dpo", steps=2, save_steps=2, held_out=0.25)
    rows = dpo._rows(config, copied / "pairs")
    bad = rows[0]["audios"][0]
    (copied / "corpus" / bad).unlink()
    if damage == "samples":
        nan = np.full(8_000, np.nan)
        soundfile.write(copied / "corpus" / bad, nan, 16_000, subtype="FLOAT", format="WAV")
    if damage == "page":
        (copied / "corpus" / bad).write_text("<html>")
    metrics = tiny_training.run_here(config, copied, tmp_path / "run")
    n = sum(bad in row["audios"] for row in rows)
    assert metrics["left_out_unreadable_audio"] == n
    assert metrics["pairs"] + metrics["held_out_pairs"] == len(rows) - n
    left_out = [json.loads(line) for line in (tmp_path / "run/.partial-stage/left_out.jsonl").open()]
    assert [row["audios"] for row in left_out] == [[bad]] * n
    assert all(bad in row["reason"] for row in left_out)


def losses(folder):
    rows = read_metrics(folder / ".partial-stage" / "metrics.jsonl")
    return [(row["step"], row["loss"]) for row in rows if "loss" in row]


def test_evaluation_changes_nothing_of_the_training(world, tmp_path, monkeypatch):
    """The same pairs, evaluated or not: the same losses, bit for bit."""
    config = tiny_training.make_config("dpo", steps=6, save_steps=2, held_out=0.25)
    tiny_training.run_here(config, world, tmp_path / "with")
    stock = methods.direct_preference_optimisation
    monkeypatch.setattr(
        dpo, "direct_preference_optimisation", lambda *args, held_out, **values: stock(*args, **values)
    )
    tiny_training.run_here(config, world, tmp_path / "without")
    assert losses(tmp_path / "with") == losses(tmp_path / "without")


def test_an_example_longer_than_the_context_is_named_before_training(world, tmp_path):
    copied = shutil.copytree(world, tmp_path / "world")
    config = copied / "policy" / "model" / "config.json"
    text = read_json(config)
    text["text_config"]["max_position_embeddings"] = 16
    write_json(config, text)
    for kind, longest in (("sft", "example 'chat-15'"), ("dpo", r"pair 'pair-\d+'")):
        with pytest.raises(NotReady, match=rf"{longest} has \d+ tokens, .* up to 16\. .* \d+ more"):
            tiny_training.run_here(tiny_training.make_config(kind, steps=2), copied, tmp_path / kind)
        assert not (tmp_path / kind / ".partial-stage" / "metrics.jsonl").exists()


def test_a_label_is_looked_at_with_its_completion(world, tmp_path):
    """A clip that cannot be read leaves its labels out; one too long for the context is named by its id."""
    copied = shutil.copytree(world, tmp_path / "world")
    config = tiny_training.make_config("kto", steps=2, save_steps=2)
    rows = [label_row(label) for label in store.read(copied / "labels/labels.jsonl", Label)]
    (copied / "corpus" / rows[0]["audios"][0]).unlink()
    n = sum(rows[0]["audios"][0] in row["audios"] for row in rows)
    metrics = tiny_training.run_here(config, copied, tmp_path / "run")
    assert metrics["left_out_unreadable_audio"] == n
    assert metrics["labels"] == len(rows) - n
    lengths = Lengths(world / "corpus", qwen2_audio.load_processor(world / "policy" / "model"))
    longer = {**rows[0], "completion": rows[0]["completion"] + " again" * 50}
    assert lengths.exact_tokens(longer) > lengths.exact_tokens(rows[0]) + 40
    context = lengths.exact_tokens(rows[0])
    assert describe_beyond([rows[0]], lengths, context) is None
    assert f"example {longer['id']!r} has" in describe_beyond([longer], lengths, context)


def test_a_system_prompt_counts_in_both_sequences_of_a_pair(world):
    lengths = Lengths(world / "corpus", qwen2_audio.load_processor(world / "policy" / "model"))
    plain = dpo._rows(tiny_training.make_config("dpo"), world / "pairs")[0]
    spoken = {**plain, "system": "You are a parrot. " * 20}
    for count in (lengths.exact_tokens, lambda row: lengths.tokens(row, packed=False) // 2, lengths.tokens):
        assert count(spoken) > count(plain) + 40


# -------------------------------------------------------------------------- any score


class StageOut:
    def __init__(self, path):
        self.path, self.rows = path, []

    def log(self, step, metrics):
        self.rows.append((step, metrics))


def test_any_function_of_a_policy_chooses_and_is_called_once(tmp_path, world):
    saved = []
    for step in (2, 4, 6):
        saved.append(tmp_path / f"checkpoint-{step}")
        (saved[-1]).symlink_to(world / "policy" / "model")
    scores = iter([1.0, 3.0, 3.0])
    out, processor = StageOut(tmp_path), qwen2_audio.load_processor(world / "policy" / "model")
    choice = CheckpointChoice("reward", score=lambda policy: {"reward": next(scores)})
    best, metrics = choose(choice, saved, [], None, processor, out)
    assert (step_of(best), metrics) == (4, {"chosen_step": 4.0, "reward": 3.0})
    assert read_json(tmp_path / "dev" / "checkpoint-2.json") == {"reward": 1.0}
    again, _ = choose(choice, saved, [], None, processor, out)  # the iterator is used up
    assert again == best


def test_a_choice_keeps_its_limits_or_exceeds_them_least(tmp_path, world, caplog):
    saved = [tmp_path / f"checkpoint-{step}" for step in (2, 4, 6)]
    for path in saved:
        path.symlink_to(world / "policy" / "model")
    processor = qwen2_audio.load_processor(world / "policy" / "model")

    def chosen(limit, *abstentions):
        out = StageOut(tmp_path / str(limit))
        metrics = iter(zip((1.0, 2.0, 3.0), abstentions, strict=True))
        score = lambda policy: dict(zip(("score", "abstention"), next(metrics), strict=True))  # noqa: E731
        choice = CheckpointChoice("score", score=score, limits={"abstention": limit})
        return step_of(choose(choice, saved, [], None, processor, out)[0])

    assert chosen(0.05, 0.0, 0.05, 0.2) == 4
    assert chosen(0.3, 0.0, 0.05, 0.2) == 6
    assert not caplog.records
    assert chosen(0.01, 0.3, 0.1, 0.2) == 4
    assert "every checkpoint has abstention above 0.01; the least is 0.1" in caplog.text


def test_workers_of_the_loader_are_no_copies_of_this_process(world, tmp_path):
    """A fork of a process with CUDA's or Ray's threads can hang, or crash."""
    forks = []
    os.register_at_fork(before=lambda: forks.append(1))
    trl = {"dataloader_num_workers": 2, "logging_steps": 1}
    for name, changes in (("workers", {"trl": trl}), ("alone", {"trl": {"logging_steps": 1}})):
        config = tiny_training.make_config("dpo", steps=3, held_out=0.25, **changes)
        tiny_training.run_here(config, world, tmp_path / name)
    assert forks == []
    assert losses(tmp_path / "workers") == losses(tmp_path / "alone")
    assert data_loading.loader_arguments(trl)["dataloader_multiprocessing_context"] == "forkserver"

"""The stage grpo on real folders: every source of prompts and of rewards; killed; on two processes."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from align.recipe.config.prompts import Questions
from align.rewards.reward import BadReward
from align.run_folder.artifacts import Interrupted, read_json, stop_requested
from align.stages.prompt_rows import prompt_rows
from align.training.checkpoints import checkpoints, step_of
from align.training.grpo_trainer import AudioGRPOTrainer
from align.training.preflight import NotReady
from preference_data import store
from preference_data.corpora.catalog import phrasebook_of
from preference_data.schema import AudioClip, Prompt
from preference_data.toy_world import examples
from preference_data.toy_world.phrasebook import Phrasebook
from tests.align.evaluation.openai_server import judge, serving
from tests.align.training import tiny_training
from tests.align.training.tiny_training import rows_of, stage, weights
from tests.compiler import need_compiler

FACTS = ({"word": "seven", "gender": "woman"}, {"event": "bell", "count": "two"})


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A policy of random weights, tones whose facts are known, prompts of multiple choice, dev questions."""
    root = tiny_training.make_world(tmp_path_factory.mktemp("grpo") / "world")
    corpus, book = root / "corpus", Phrasebook.load(phrasebook_of("synthetic", None))
    shutil.copyfile(phrasebook_of("synthetic", None), corpus / "phrasebook.yaml")
    clips = [
        clip.model_copy(update={"facts": FACTS[i % 2], "split": "preference" if i < 4 else "train"})
        for i, clip in enumerate(store.read(corpus / "clips.jsonl", AudioClip))
    ]
    store.write(corpus / "clips.jsonl", clips)
    examples.write_air_bench(corpus / "dev", clips[:4], book, "tones", seed=0)
    for clip in clips[:4]:
        folder = corpus / "dev" / "Chat" / f"{book.task_of(clip.facts)}_tones"
        folder.mkdir(exist_ok=True)
        shutil.copyfile(corpus / clip.path, folder / clip.path.rpartition("/")[2])
    chosen = {"question": "Is the tone A. high or B. low?", "answer_gt": "low", "choices": ("high", "low")}
    prompts = [
        Prompt(id=f"p{i}", audios=(clip.path,), meta_info="", task_name=f"task{i % 2}", **chosen)
        for i, clip in enumerate(clips)
    ]
    store.write(corpus / "prompts.jsonl", prompts)
    return root


LENGTH = {"length": {"max_chars": 6}}
QUESTIONS = {"splits": ["preference", "train"], "per_clip": 2}


@pytest.mark.parametrize(
    ("source", "reward", "parts"),
    [
        (QUESTIONS, {"facts": {"clean": 0}, **LENGTH}, {"asked", "form", "length"}),
        ({"tasks": ["caption"]}, {"wer": {"language": "en"}, **LENGTH}, {"wer", "length"}),
        ("corpus", {"choice": {}, "format": {"form": "one_word"}, **LENGTH}, {"choice", "format", "length"}),
    ],
)
def test_every_source_of_prompts_is_rewarded(world, tmp_path, source, reward, parts):
    choose = {"questions": 4, "max_new_tokens": 4} if source == QUESTIONS else None
    config = tiny_training.make_config(
        "grpo", steps=2, save_steps=1, prompts=source, reward=reward, choose=choose, loss="dapo"
    )
    metrics = tiny_training.run_here(config, world, tmp_path)
    rows = rows_of(tmp_path)
    assert len(rows) == 2
    for row in rows:
        assert {name.split("/")[1] for name in row if name.startswith("rewards/")} == parts
        assert row["grad_norm"] > 0
        logged = {"reward", "frac_reward_zero_std", "entropy", "clip_ratio/region_mean", "kl", "flops"}
        assert logged <= row.keys()
        assert {"completions/mean_length", "completions/clipped_ratio"} <= row.keys()
    kinds = {name for row in rows for name in row if name.startswith("reward/kind/")}
    assert len(kinds) >= 2 or source == {"tasks": ["caption"]}
    identity = read_json(stage(tmp_path) / "reward.json")["rewards"]
    assert {name for kind in identity for name in kind["weights"]} == parts
    assert not all(torch.equal(value, weights(tmp_path)[name]) for name, value in before(world).items())
    if choose:
        assert metrics["chosen_step"] in (1, 2)
        assert "dev/kl" in metrics


def test_only_questions_of_some_kinds_are_asked(world):
    corpus = world / "corpus"
    everything = list(prompt_rows(Questions(splits=["preference", "train"], per_clip=9), corpus, seed=0))
    source = Questions(splits=["preference", "train"], per_clip=9, kinds=["absent"])
    some = list(prompt_rows(source, corpus, seed=0))
    assert {row["kind"] for row in some} == {"absent"} < {row["kind"] for row in everything}
    assert [row["id"] for row in some] == [row["id"] for row in everything if row["kind"] == "absent"]


def before(world):
    return load_file(world / "policy" / "model" / "model.safetensors")


def test_a_judge_model_rewards_and_is_paid_once(world, tmp_path):
    """A stage that is run again from the start draws the same completions, whose replies are kept."""
    longest_wins = judge(lambda text: min(9, 1 + len(text)))
    with serving(longest_wins) as server:
        reward = {"judge": {"model": "m", "url": server.url}}
        config = tiny_training.make_config("grpo", steps=1, prompts="corpus", reward=reward)
        tiny_training.run_here(config, world, tmp_path)
        paid = len(server.requests)
        shutil.rmtree(stage(tmp_path))
        tiny_training.run_here(config, world, tmp_path)
    assert paid == len(server.requests) > 0
    [row] = rows_of(tmp_path)
    assert row["reward"] == pytest.approx(row["rewards/judge/mean"])
    assert 0 < row["reward"] < 1
    [identity] = read_json(stage(tmp_path) / "reward.json")["rewards"]
    assert (identity["kind"], identity["judge"]) == ("judge", "m")


def test_what_cannot_be_rewarded_is_refused_before_training(world, tmp_path):
    with pytest.raises(BadReward, match="prompt 'p0': its meta_info '' holds no facts"):
        tiny_training.run_here(
            tiny_training.make_config("grpo", prompts="corpus", reward={"facts": {}}), world, tmp_path
        )
    config = tiny_training.make_config("grpo", max_new_tokens=5000)
    with pytest.raises(NotReady, match=r"has \d+ tokens, .* up to "):
        tiny_training.run_here(config, world, tmp_path)
    with pytest.raises(ValueError, match="has no prompt of"):
        tiny_training.run_here(
            tiny_training.make_config("grpo", prompts={"tasks": ["transcribe"]}), world, tmp_path
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 3, "iterations": 2}, "steps: 3 is not a multiple of iterations"),
        ({"save_steps": 3, "iterations": 2, "steps": 4}, "save_steps: 3 is not a multiple"),
        ({"choose": {"by": "held_out_loss"}}, "grpo can choose by facts"),
        ({"hardware": {"workers": 2, "strategy": "zero3"}}, "each token of each completion"),
        ({"hardware": {"workers": 3}}, "cannot be split evenly"),
        ({"prompts": {"tasks": ["sing"]}}, "unknown pre-training task"),
        ({"prompts": {"tasks": ["srwt"]}}, "stamped with times|unknown"),
        ({"prompts": {"splits": ["test"]}}, "preference"),
        ({"prompts": "all"}, "corpus"),
        ({"answers": 1}, "greater than or equal to 2"),
        ({"loss": "ppo"}, "dapo"),
    ],
)
def test_configs_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        tiny_training.make_config("grpo", **{"steps": 4, "save_steps": 2, **changes})


# -------------------------------------------------------------------------- killed and resumed


class Killed(BaseException):
    pass


PLACES = {
    "drawing completions": (AudioGRPOTrainer, "_complete"),
    "rewarding": (AudioGRPOTrainer, "_total"),
    "the loss": (AudioGRPOTrainer, "compute_loss"),
    "clipping gradients": (AudioGRPOTrainer, "_clip_grad_norm"),
    "saving": (AudioGRPOTrainer, "_save_optimizer_and_scheduler"),
}


@pytest.fixture(scope="module")
def unbroken(world, tmp_path_factory):
    """Six steps, a checkpoint after every second; by case."""
    folders = {}

    def run(case):
        if case not in folders:
            folders[case] = tmp_path_factory.mktemp(case)
            tiny_training.run_here(
                tiny_training.make_config(case, steps=6, save_steps=2), world, folders[case]
            )
        return folders[case]

    return run


def same(folder, whole):
    for name, value in weights(whole).items():
        assert torch.equal(weights(folder)[name], value), name
    a, b = ([untimed(row) for row in rows_of(own)] for own in (folder, whole))
    assert a == b


def untimed(row):
    """A logged row without speeds, and without alarms, which each process raises once."""
    return {k: v for k, v in row.items() if not k.endswith(("_s", "time", "flops")) and "alarm/" not in k}


@pytest.mark.parametrize(
    ("case", "place"),
    [
        ("grpo", "saving"),
        ("grpo-twice", "the loss"),
        *(pytest.param("grpo", place, marks=pytest.mark.slow) for place in [*PLACES][:4]),
        pytest.param("grpo-lora", "rewarding", marks=pytest.mark.slow),
    ],
)
def test_killed_anywhere_and_resumed_is_the_unbroken_run_bit_for_bit(
    unbroken, world, tmp_path, monkeypatch, case, place
):
    """Dies at its fourth passage of a place, which is in step 4; with `twice` in the middle of a batch."""
    config = tiny_training.make_config(case, steps=6, save_steps=2)
    owner, name = PLACES[place]
    stock, passed = getattr(owner, name), []
    last = 2 if place == "saving" else 4

    def dying(*args, **kwargs):
        passed.append(1)
        if len(passed) == last:
            raise Killed
        return stock(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, dying)
        with pytest.raises(Killed):
            tiny_training.run_here(config, world, tmp_path)
    assert [step_of(path) for path in checkpoints(stage(tmp_path) / "checkpoints")] == [2]
    tiny_training.run_here(config, world, tmp_path)
    same(tmp_path, unbroken(case))


@pytest.mark.parametrize(
    ("case", "saved_at"), [pytest.param("grpo", 3, marks=pytest.mark.slow), ("grpo-twice", 4)]
)
def test_a_stop_waits_for_the_end_of_a_batch_of_completions(
    unbroken, world, tmp_path, monkeypatch, case, saved_at
):
    config = tiny_training.make_config(case, steps=6, save_steps=2)
    stock = AudioGRPOTrainer.training_step

    def stopping(trainer, *args, **kwargs):
        if trainer.state.global_step == 2:
            stop_requested.set()
        return stock(trainer, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(AudioGRPOTrainer, "training_step", stopping)
        with pytest.raises(Interrupted):
            tiny_training.run_here(config, world, tmp_path)
    stop_requested.clear()
    assert [step_of(path) for path in checkpoints(stage(tmp_path) / "checkpoints")] == [saved_at]
    tiny_training.run_here(config, world, tmp_path)
    same(tmp_path, unbroken(case))


def test_planned_micro_batches_learn_the_same(unbroken, world, tmp_path):
    """In memory for nothing at all a group goes alone, its layers checkpointed, and is still drawn whole."""
    config = tiny_training.make_config("grpo", steps=6, save_steps=2, hardware={"memory_gb": 3.0})
    metrics = tiny_training.run_here(config, world, tmp_path)
    assert (metrics["micro_batch"], metrics["accumulation_steps"]) == (1, tiny_training.BATCH)
    assert metrics["checkpointed_layers"] > 0
    for one, both in zip(rows_of(unbroken("grpo")), rows_of(tmp_path), strict=True):
        for name in ("reward", "completions/mean_length", "entropy", "grad_norm"):
            assert both[name] == pytest.approx(one[name], rel=1e-4), (one["step"], name)


# -------------------------------------------------------------------------- two processes


@pytest.fixture(scope="module")
def two(world, tmp_path_factory):
    """Folder of the cases that two gloo processes train, each six steps."""
    out = tmp_path_factory.mktemp("two")
    need_compiler()
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    cases = ["grpo-ddp", "grpo-ddp-lora", "grpo-ddp-twice", "grpo-zero2", "grpo-zero2@3"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "STEPS": "6", "SAVE_STEPS": "2"}
    done = subprocess.run(
        [*program, tiny_training.__file__, str(world), str(out), *cases],
        capture_output=True, text=True, env=env, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return out


@pytest.mark.slow
@pytest.mark.parametrize("case", ["grpo-ddp", "grpo-ddp-lora", "grpo-ddp-twice", "grpo-zero2"])
def test_two_processes_train_as_one_does(two, world, tmp_path, case):
    """The same completions are drawn, rewarded and learned from, whichever process has them."""
    beta = 0.05 if "zero2" in case else 0.0
    alone = case.replace("-ddp", "").replace("-zero2", "")
    config = tiny_training.make_config(alone, steps=6, save_steps=2, beta=beta)
    tiny_training.run_here(config, world, tmp_path)
    for one, both in zip(rows_of(tmp_path), rows_of(two / case), strict=True):
        compared = {"reward", "rewards/format/mean", "completions/mean_length", "entropy", "grad_norm"}
        assert "reward" in one or "twice" in case  # a step without completions of its own
        for name in compared & one.keys():
            assert both[name] == pytest.approx(one[name], rel=1e-4), (one["step"], name)
    for name, value in weights(tmp_path).items():
        torch.testing.assert_close(weights(two / case)[name], value, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.slow
def test_two_processes_stopped_and_resumed_are_bit_equal(two):
    same(two / "grpo-zero2-resumed", two / "grpo-zero2")

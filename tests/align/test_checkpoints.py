"""Checkpoints: exact resume, damage passed over, a NaN stops the run before it is stepped with."""

import shutil

import pytest
import torch
from datasets import Dataset
from trl import SFTConfig

from align.models.chat import assistant, user
from align.models.features import ClipFeatures
from align.models.qwen2_audio import model as qwen2_audio
from align.models.qwen2_audio.packed import pack
from align.run_folder.artifacts import Interrupted, StageFolder, read_metrics, stop_requested
from align.training.arguments import arguments
from align.training.augment import Augmentation
from align.training.checkpoints import NonFiniteLoss, checkpoints, is_whole, newest, step_of
from align.training.collate import SFTCollator
from align.training.fit import fit
from align.training.trainers import AudioSFTTrainer

STEPS = 8


def rows():
    answers = ("The tone is high.", "The tone is low.")
    return [
        {
            "messages": [user("Is the tone high or low?", 1), assistant(answers[i % 2])],
            "audios": [f"{i % 4}.wav"],
            "draw": i,
        }
        for i in range(2 * STEPS)
    ]


def make(tiny, out, batch_size=2, packed=False, **passed_on):
    processor = qwen2_audio.load_processor(tiny.policy)
    model = qwen2_audio.load_model(tiny.policy)
    options = arguments(
        out.path,
        steps=2 * STEPS // batch_size,
        batch_size=batch_size,
        learning_rate=1e-2,
        save_steps=2,
        seed=0,
        passed_on={"train_sampling_strategy": "sequential", "logging_steps": 1, **passed_on},
    )
    return AudioSFTTrainer(
        model=pack(model) if packed else model,
        args=SFTConfig(**options),
        train_dataset=Dataset.from_list(rows()),
        data_collator=SFTCollator(
            processor, ClipFeatures(processor, tiny.audio), Augmentation(gain=0.2, time_mask=4), packed
        ),
        processing_class=processor,
    )


def folder(path):
    out = StageFolder(path, "2_sft", "fingerprint")
    out.open()
    return out


def weights(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


class Killed(RuntimeError):
    pass


def kill_at(trainer, step):
    """Make the trainer die as if the power went at this step."""
    stock = trainer.training_step

    def dying(*args, **kwargs):
        if trainer.state.global_step == step:
            raise Killed
        return stock(*args, **kwargs)

    trainer.training_step = dying


@pytest.fixture
def whole(tiny, tmp_path):
    out = folder(tmp_path / "whole")
    trainer = make(tiny, out)
    fit(trainer, out)
    return weights(trainer), read_metrics(out.path / "metrics.jsonl")


def test_a_killed_run_resumes_to_identical_weights_and_metrics(tiny, tmp_path, whole):
    out = folder(tmp_path / "killed")
    first = make(tiny, out)
    kill_at(first, 5)
    with pytest.raises(Killed):
        fit(first, out)
    second = make(tiny, out)
    fit(second, out)
    for name, value in weights(second).items():
        assert torch.equal(value, whole[0][name]), name
    keep = ("step", "loss", "grad_norm", "learning_rate", "mean_token_accuracy", "num_tokens")
    again = read_metrics(out.path / "metrics.jsonl")
    assert [[row[k] for k in keep] for row in again] == [[row[k] for k in keep] for row in whole[1]]


def test_resume_passes_over_a_damaged_checkpoint(tiny, tmp_path, whole):
    out = folder(tmp_path / "damaged")
    fit(make(tiny, out), out)
    last, before = checkpoints(out.path / "checkpoints")[::-1][:2]
    with (last / "model.safetensors").open("r+b") as file:
        file.seek(1000)
        file.write(b"\xff\xff\xff\xff")
    assert not is_whole(last)
    assert newest(out.path / "checkpoints") == before
    again = make(tiny, out)
    fit(again, out)
    for name, value in weights(again).items():
        assert torch.equal(value, whole[0][name]), name


def test_half_written_checkpoints_are_never_chosen(tiny, tmp_path):
    out = folder(tmp_path / "half")
    fit(make(tiny, out), out)
    saved = out.path / "checkpoints"
    good = checkpoints(saved)[-1]
    unsealed = saved / "checkpoint-99"
    shutil.copytree(good, unsealed)
    (unsealed / "manifest.json").unlink()
    shutil.copytree(good, saved / ".partial-checkpoint" / "checkpoint-100")
    assert newest(saved) == good
    for name in [path.name for path in good.iterdir() if path.name != "manifest.json"]:
        copy = saved / "checkpoint-98"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(good, copy)
        (copy / name).unlink()
        assert newest(saved) == good, name


def test_only_the_last_two_checkpoints_stay(tiny, tmp_path):
    out = folder(tmp_path / "kept")
    fit(make(tiny, out), out)
    assert [step_of(path) for path in checkpoints(out.path / "checkpoints")] == [6, 8]


def test_a_non_finite_loss_stops_within_one_step(tiny, tmp_path):
    out = folder(tmp_path / "nan")
    trainer = make(tiny, out)
    stock = trainer.compute_loss
    trainer.compute_loss = lambda *a, **k: (
        stock(*a, **k) * (float("nan") if trainer.state.global_step == 4 else 1.0)
    )
    with pytest.raises(NonFiniteLoss, match="at step 5"):
        fit(trainer, out)
    assert all(torch.isfinite(value).all() for value in trainer.model.state_dict().values())
    assert step_of(newest(out.path / "checkpoints")) == 4
    assert max(row["step"] for row in read_metrics(out.path / "metrics.jsonl")) == 4


def test_a_stop_request_saves_this_step_and_resumes_exactly(tiny, tmp_path, whole):
    out = folder(tmp_path / "stopped")
    trainer = make(tiny, out)
    stock = trainer.training_step

    def stepping(*args, **kwargs):
        if trainer.state.global_step == 4:
            stop_requested.set()
        return stock(*args, **kwargs)

    trainer.training_step = stepping
    try:
        with pytest.raises(Interrupted):
            fit(trainer, out)
    finally:
        stop_requested.clear()
    assert step_of(newest(out.path / "checkpoints")) == 5
    again = make(tiny, out)
    fit(again, out)
    for name, value in weights(again).items():
        assert torch.equal(value, whole[0][name]), name


def test_accumulation_splits_the_batch_and_changes_nothing_else(tiny, tmp_path):
    whole, split = folder(tmp_path / "whole"), folder(tmp_path / "split")
    at_once = make(tiny, whole, batch_size=4, optim="sgd")
    in_halves = make(tiny, split, batch_size=4, optim="sgd", gradient_accumulation_steps=2)
    assert in_halves.args.per_device_train_batch_size == 2
    fit(at_once, whole)
    fit(in_halves, split)
    assert at_once.state.global_step == in_halves.state.global_step == 4
    for (name, a), b in zip(weights(at_once).items(), weights(in_halves).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)


def test_a_batch_that_cannot_be_split_evenly_is_an_error(tiny, tmp_path):
    with pytest.raises(ValueError, match="batch_size 4 cannot be split evenly over 3"):
        make(tiny, folder(tmp_path), batch_size=4, gradient_accumulation_steps=3)


def test_training_killed_after_its_last_step_takes_no_further_one(tiny, tmp_path):
    out = folder(tmp_path / "finished")
    first = make(tiny, out, max_steps=5)  # in the middle of a pass over the rows
    metrics = fit(first, out)
    again = make(tiny, out, max_steps=5)
    assert fit(again, out) == metrics
    assert again.state.global_step == 5
    for name, value in weights(again).items():
        assert torch.equal(value, weights(first)[name]), name


def test_a_packed_run_has_the_stock_curve_and_resumes_to_identical_weights(tiny, tmp_path, whole):
    out = folder(tmp_path / "packed")
    unbroken = make(tiny, out, packed=True)
    fit(unbroken, out)
    losses = [row["loss"] for row in read_metrics(out.path / "metrics.jsonl")]
    assert losses == pytest.approx([row["loss"] for row in whole[1]], rel=1e-4)
    out = folder(tmp_path / "killed")
    first = make(tiny, out, packed=True)
    kill_at(first, 5)
    with pytest.raises(Killed):
        fit(first, out)
    second = make(tiny, out, packed=True)
    fit(second, out)
    for name, value in weights(second).items():
        assert torch.equal(value, weights(unbroken)[name]), name

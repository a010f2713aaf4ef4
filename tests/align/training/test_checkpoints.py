"""Checkpoints: exact resume, damage passed over, a NaN stops the run before it is stepped with."""

import shutil

import pytest
import torch
from transformers import Qwen2AudioForConditionalGeneration, TrainerCallback
from trl import SFTConfig

from align.models.chat import assistant, user
from align.models.features import ClipFeatures
from align.models.qwen2_audio import model as qwen2_audio
from align.models.qwen2_audio.packed import pack
from align.models.shards import SavedTensors
from align.run_folder.artifacts import (
    Interrupted,
    StageFolder,
    read_manifest,
    read_metrics,
    stop_requested,
)
from align.training.augmentation import Augmentation
from align.training.checkpoints import (
    CannotResume,
    NonFiniteLoss,
    candidates,
    checkpoints,
    digest_of,
    is_whole,
    newest,
    publish,
    resume_point,
    seal,
    step_of,
)
from align.training.collate import SFTCollator
from align.training.data_loading import Rows
from align.training.methods import Schedule
from align.training.preparation import prepare_model
from align.training.run import arguments, fit
from align.training.trainers import AudioSFTTrainer
from align.training.tuning import Tuning

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


def make(tiny, out, batch_size=2, packed=False, model=None, keep_candidates=False, **passed_on):
    processor = qwen2_audio.load_processor(tiny.policy)
    model = qwen2_audio.load_model(tiny.policy) if model is None else model
    options = arguments(
        out.path,
        Schedule(2 * STEPS // batch_size, batch_size, 1e-2, 2, 0),
        tuning=Tuning(),
        trl={"train_sampling_strategy": "sequential", "logging_steps": 1, **passed_on},
    )
    return AudioSFTTrainer(
        model=pack(model) if packed else model,
        args=SFTConfig(**options),
        train_dataset=Rows(rows()),
        data_collator=SFTCollator(
            processor, ClipFeatures(processor, tiny.audio), Augmentation(gain=0.2, time_mask=4), packed
        ),
        processing_class=processor,
        keep_candidates=keep_candidates,
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


def stop_in(trainer, step):
    """Ask for a stop after this step's last."""
    stock = trainer.training_step

    def stepping(*args, **kwargs):
        if trainer.state.global_step == step:
            stop_requested.set()
        return stock(*args, **kwargs)

    trainer.training_step = stepping


@pytest.fixture
def whole(tiny, tmp_path):
    out = folder(tmp_path / "whole")
    trainer = make(tiny, out)
    fit(trainer, out)
    return weights(trainer), read_metrics(out.path / "metrics.jsonl")


def test_metrics_of_a_run_killed_before_its_first_checkpoint_are_forgotten(tiny, tmp_path, whole):
    out = folder(tmp_path / "killed")
    first = make(tiny, out)
    kill_at(first, 1)
    with pytest.raises(Killed):
        fit(first, out)
    assert newest(out.path / "checkpoints") is None
    assert [row["step"] for row in read_metrics(out.path / "metrics.jsonl")] == [1]
    with (out.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    out = folder(tmp_path / "killed")
    fit(make(tiny, out), out)
    steps = [row["step"] for row in read_metrics(out.path / "metrics.jsonl")]
    assert steps == [row["step"] for row in whole[1]]


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


def damage(checkpoint):
    with (checkpoint / "model.safetensors").open("r+b") as file:
        file.seek(1000)
        file.write(b"\xff\xff\xff\xff")
    assert not is_whole(checkpoint)


def test_resume_passes_over_a_damaged_checkpoint(tiny, tmp_path, whole):
    """An older one is there if a kill came between the sealing of the new and the removal of the old."""
    out = folder(tmp_path / "damaged")
    saved = out.path / "checkpoints"
    first = make(tiny, out)
    kill_at(first, 7)
    with pytest.raises(Killed):
        fit(first, out)
    shutil.copytree(saved / "checkpoint-6", tmp_path / "checkpoint-6")
    fit(make(tiny, out), out)
    shutil.copytree(tmp_path / "checkpoint-6", saved / "checkpoint-6")
    damage(saved / "checkpoint-8")
    assert newest(saved) == saved / "checkpoint-6"
    again = make(tiny, out)
    fit(again, out)
    assert [step_of(path) for path in checkpoints(saved)] == [8]
    assert is_whole(saved / "checkpoint-8")
    assert len(list(saved.glob("damaged-checkpoint-8-*"))) == 1  # set aside, not deleted
    for name, value in weights(again).items():
        assert torch.equal(value, whole[0][name]), name


@pytest.mark.parametrize(
    ("settings", "steps"),
    [({"logging_steps": 50}, [8]), ({"logging_steps": 3}, [3, 6, 8]), ({"logging_strategy": "no"}, [8])],
)
def test_a_stage_shorter_than_its_logging_steps_logs_its_metrics(tiny, tmp_path, settings, steps):
    out = folder(tmp_path / "short")
    metrics = fit(make(tiny, out, **settings), out)
    rows = read_metrics(out.path / "metrics.jsonl")
    assert [row["step"] for row in rows] == steps
    assert metrics["loss"] == rows[-1]["loss"]
    out = folder(tmp_path / "stopped")
    trainer = make(tiny, out, **settings)
    stop_in(trainer, 4)
    try:
        with pytest.raises(Interrupted):
            fit(trainer, out)
    finally:
        stop_requested.clear()
    fit(make(tiny, out, **settings), out)
    assert [row["step"] for row in read_metrics(out.path / "metrics.jsonl")] == steps


HARM = {
    "cut": b"{",
    "empty": b"",
    "a list": b"[]",
    "no files": b'{"files": {}, "strategy": "ddp", "workers": 1, "frozen": ""}',
    "NUL": bytes(200),
    "UTF-16": '{"files": {}}'.encode("utf-16"),
    "nested": b"[" * 100_000,
}


@pytest.mark.parametrize("text", HARM.values(), ids=HARM)
def test_a_damaged_manifest_is_passed_over_like_a_damaged_file(tmp_path, text):
    facts = {"strategy": "ddp", "workers": 1, "frozen": ""}
    for step in (2, 4):
        (tmp_path / "staged").mkdir()
        (tmp_path / "staged" / "model.safetensors").write_bytes(b"weights")
        seal(tmp_path / "staged", tmp_path / f"checkpoint-{step}", facts)
    assert step_of(newest(tmp_path)) == 4
    (tmp_path / "checkpoint-4" / "manifest.json").write_bytes(text)
    assert step_of(newest(tmp_path)) == 2
    assert resume_point(tmp_path) == tmp_path / "checkpoint-2"
    (kept,) = tmp_path.glob("damaged-checkpoint-4-*")
    assert (kept / "model.safetensors").read_bytes() == b"weights"


@pytest.mark.parametrize("harm", ["weights", "manifest"])
def test_with_nothing_but_a_damaged_checkpoint_training_starts_anew(tiny, tmp_path, whole, harm):
    out = folder(tmp_path / "damaged")
    saved = out.path / "checkpoints"
    first = make(tiny, out)
    kill_at(first, 5)
    with pytest.raises(Killed):
        fit(first, out)
    if harm == "weights":
        damage(saved / "checkpoint-4")
    else:
        (saved / "checkpoint-4" / "manifest.json").write_text("{")
    again = make(tiny, out)
    fit(again, out)
    assert [step_of(path) for path in checkpoints(saved)] == [8]
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


def test_only_the_last_checkpoint_stays(tiny, tmp_path):
    out = folder(tmp_path / "kept")
    fit(make(tiny, out), out)
    saved = out.path / "checkpoints"
    assert sorted(path.name for path in saved.iterdir()) == ["checkpoint-8", "frozen"]


def test_of_candidates_the_weights_alone_stay(tiny, tmp_path):
    out = folder(tmp_path / "kept")
    saved = out.path / "checkpoints"
    trainer = make(tiny, out, keep_candidates=True)
    by_step = {}
    trainer.add_callback(ReadWeights(saved, by_step))
    fit(trainer, out)
    assert [path.name for path in candidates(saved)] == [
        "candidate-2",
        "candidate-4",
        "candidate-6",
        "checkpoint-8",
    ]
    for path in candidates(saved)[:-1]:
        names = {file.name for file in path.iterdir()}
        assert names == {"model.safetensors", "config.json", "generation_config.json", "manifest.json"}
        assert is_whole(path)
        assert (path / "model.safetensors").read_bytes() == by_step[step_of(path)]


class ReadWeights(TrainerCallback):
    """Bytes of every checkpoint's weights at the time it was written."""

    def __init__(self, saved, by_step):
        self.saved, self.by_step = saved, by_step

    def on_save(self, args, state, control, **kwargs):
        step = state.global_step
        self.by_step[step] = (self.saved / f"checkpoint-{step}" / "model.safetensors").read_bytes()


def test_a_checkpoint_of_a_stop_is_not_a_candidate(tiny, tmp_path):
    """Else a run that was stopped could publish another policy than an unbroken one."""
    out = folder(tmp_path / "stopped")
    trainer = make(tiny, out, keep_candidates=True)
    stop_in(trainer, 4)
    try:
        with pytest.raises(Interrupted):
            fit(trainer, out)
    finally:
        stop_requested.clear()
    fit(make(tiny, out, keep_candidates=True), out)
    assert [step_of(path) for path in candidates(out.path / "checkpoints")] == [2, 4, 6, 8]


def test_a_kill_between_seal_and_removal_loses_no_candidate(tiny, tmp_path, monkeypatch):
    out = folder(tmp_path / "killed")
    trainer = make(tiny, out, keep_candidates=True)

    def dying(checkpoint):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("align.training.checkpoints._keep_candidate", dying)
        with pytest.raises(Killed):
            fit(trainer, out)
    saved = out.path / "checkpoints"
    assert [step_of(path) for path in checkpoints(saved)] == [2, 4]
    fit(make(tiny, out, keep_candidates=True), out)
    assert [step_of(path) for path in candidates(saved)] == [2, 4, 6, 8]


# -------------------------------------------------------------------------- dtypes and frozen weights


LEARNING = Tuning(train=("projector", "language_model"))


def partly_frozen(tiny):
    """As on a GPU: the tower frozen in bfloat16, the rest learning in float32."""
    model = qwen2_audio.load_model(tiny.policy)
    prepare_model(model, LEARNING)
    model.model.audio_tower.to(torch.bfloat16)
    return model


def make_mixed(tiny, out, model=None):
    return make(tiny, out, model=partly_frozen(tiny) if model is None else model, bf16=True, use_cpu=True)


def test_resume_keeps_each_weights_own_type(tiny, tmp_path):
    unbroken, out = folder(tmp_path / "unbroken"), folder(tmp_path / "killed")
    expected = make_mixed(tiny, unbroken)
    fit(expected, unbroken, LEARNING.modules)
    first = make_mixed(tiny, out)
    kill_at(first, 5)
    with pytest.raises(Killed):
        fit(first, out, LEARNING.modules)
    second = make_mixed(tiny, out)
    fit(second, out, LEARNING.modules)
    for name, value in weights(second).items():
        other = expected.model.state_dict()[name]
        assert value.dtype == other.dtype
        assert torch.equal(value, other), name
    learned = SavedTensors(out.path / "checkpoints" / "checkpoint-8")
    assert {learned[name].dtype for name in learned.names} == {torch.float32}
    assert not any(torch.equal(learned[n], learned[n].bfloat16().float()) for n in learned.names)


def test_frozen_weights_are_written_once_and_published_with_the_others(tiny, tmp_path):
    out = folder(tmp_path / "frozen")
    trainer = make_mixed(tiny, out)
    start = weights(trainer)
    fit(trainer, out, LEARNING.modules)
    saved = out.path / "checkpoints"
    learned, frozen = SavedTensors(saved / "checkpoint-8"), SavedTensors(saved / "frozen")
    assert all(name.startswith("audio_tower.") for name in frozen.names)
    assert not any(name.startswith("audio_tower.") for name in learned.names)
    publish(saved / "checkpoint-8", None, qwen2_audio.load_processor(tiny.policy), out.path)
    plain = Qwen2AudioForConditionalGeneration.from_pretrained(out.path / "model", dtype=torch.float32)
    for name, value in weights(trainer).items():
        assert torch.equal(plain.state_dict()[name], value.float()), name
        if name.startswith("model.audio_tower."):
            assert torch.equal(value, start[name]), name


def test_a_checkpoint_of_other_frozen_weights_is_refused(tiny, tmp_path):
    out = folder(tmp_path / "frozen")
    first = make_mixed(tiny, out)
    kill_at(first, 5)
    with pytest.raises(Killed):
        fit(first, out, LEARNING.modules)
    other = partly_frozen(tiny)
    with torch.no_grad():
        other.model.audio_tower.conv1.weight[0, 0, 0] += 1
    with pytest.raises(CannotResume, match="trained from other weights than this stage now starts from"):
        fit(make_mixed(tiny, out, other), out, LEARNING.modules)
    thawed = partly_frozen(tiny)
    thawed.model.multi_modal_projector.requires_grad_(False)
    with pytest.raises(CannotResume):
        fit(make_mixed(tiny, out, thawed), out, ("model.language_model", "lm_head"))
    assert step_of(newest(out.path / "checkpoints")) == 4


def test_a_digest_of_tensors_is_of_names_types_shapes_and_values():
    base = [("a", torch.arange(6.0).reshape(2, 3)), ("b", torch.tensor(1))]
    digests = {
        digest_of(tensors)
        for tensors in (
            base,
            [("c", base[0][1]), base[1]],
            [("a", base[0][1].reshape(3, 2)), base[1]],
            [("a", base[0][1].int()), base[1]],
            [("a", base[0][1] + 1e-6), base[1]],
        )
    }
    assert len(digests) == 5
    assert digest_of(reversed(base)) == digest_of(base)


def test_nothing_of_checkpoints_is_left_in_a_finished_stage(tiny, tmp_path):
    out = folder(tmp_path / "finished")
    fit(make(tiny, out), out)
    publish(
        checkpoints(out.path / "checkpoints")[-1], None, qwen2_audio.load_processor(tiny.policy), out.path
    )
    out.commit({})
    outputs = read_manifest(out.final)["outputs"]
    assert "model/model.safetensors" in outputs
    assert not any("checkpoint" in name or "optimizer" in name for name in outputs)
    assert not list(out.final.rglob("checkpoint*"))
    assert not list(out.final.rglob("optimizer*"))


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
    stop_in(trainer, 4)
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
    with pytest.raises(ValueError, match="batch_size 4 cannot be divided evenly over 3"):
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

"""Contracts with transformers, TRL and DeepSpeed: each fix is still needed, and still fits."""

import inspect
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import Trainer
from trl import DPOConfig, DPOTrainer, KTOTrainer, SFTTrainer

from align.models.features import ClipFeatures
from align.models.qwen2_audio import model as qwen2_audio
from align.training import library_fixes, trainers
from align.training.checkpoints import checkpoints, save_learned
from align.training.collate import PreferenceCollator
from align.training.data_loading import Rows
from align.training.methods import Schedule
from align.training.run import arguments
from align.training.trainers import AudioDPOTrainer, AudioKTOTrainer, AudioSFTTrainer
from align.training.tuning import Tuning

CHECKPOINTS = {"_get_output_dir", "_save_checkpoint", "_save", "_load_from_checkpoint", "_load_rng_state"}
PRIVATE = {"_prepare_dataset", "_precompute_ref_logps", "_clip_grad_norm", *CHECKPOINTS}
"""Private methods of the libraries that give way. A new one belongs into the tables first."""


def overridden(ours, *stock):
    names = {name for cls in ours for name, value in vars(cls).items() if inspect.isfunction(value)}
    return {name for name in names for cls in stock if name.startswith("_") and hasattr(cls, name)}


def test_no_more_private_methods_give_way_than_are_written_down():
    mro = AudioDPOTrainer.__mro__ + AudioKTOTrainer.__mro__ + AudioSFTTrainer.__mro__
    ours = [cls for cls in mro if "align" in cls.__module__]
    assert overridden(ours, DPOTrainer, KTOTrainer, SFTTrainer) - {"__init__"} == PRIVATE
    own = vars(trainers).values()
    classes = [cls for cls in own if inspect.isclass(cls) and cls.__module__ == trainers.__name__]
    assert overridden(classes, Trainer) <= {"__init__", "__new__", "__repr__", "__eq__"}
    assert all(f"`{name}`" in library_fixes.__doc__ for name in PRIVATE)


@pytest.fixture
def rows(tiny):
    both = {"chosen": "high", "rejected": "The tone is low."}
    return [{"prompt": "Is the tone high or low?", **both, "audios": ["0.wav"], "weight": 1.0}] * 2


def dpo(trainer, tiny, folder, rows, **trl):
    processor = qwen2_audio.load_processor(tiny.policy)
    options = arguments(folder, Schedule(1, 2, 1e-3, 1, 0), tuning=Tuning(), trl=trl)
    return trainer(
        model=qwen2_audio.load_model(tiny.policy),
        args=DPOConfig(**options),
        train_dataset=rows,
        data_collator=PreferenceCollator(processor, ClipFeatures(processor, tiny.audio)),
        processing_class=processor,
    )


def test_trl_still_tokenizes_rows_up_front(tiny, tmp_path, rows):
    """Once rows of audio pass through it unchanged, `_prepare_dataset` can go."""
    try:
        trainer = dpo(DPOTrainer, tiny, tmp_path, Dataset.from_list(rows))
    except Exception:
        return
    assert "prompt_ids" in trainer.train_dataset.column_names


def test_trl_still_wants_a_dataset_of_its_own_kind(tiny, tmp_path, rows):
    with pytest.raises(TypeError, match="must be a `Dataset`"):
        dpo(DPOTrainer, tiny, tmp_path, rows)


@pytest.mark.parametrize("trainer", [DPOTrainer, KTOTrainer, SFTTrainer])
def test_the_name_of_a_data_set_is_the_last_argument_of_its_preparation(trainer):
    assert list(inspect.signature(trainer._prepare_dataset).parameters)[-1] == "dataset_name"
    calls = [line for line in inspect.getsource(trainer.__init__).split("_prepare_dataset(")[1:]]
    assert len(calls) == 3  # train, several held-out sets by key, one held-out set
    assert '"train"' in calls[0].partition(")")[0]
    assert '"eval"' in calls[2].partition(")")[0]


@pytest.mark.parametrize("trainer", [DPOTrainer, KTOTrainer])
def test_trl_still_computes_the_reference_in_an_engine_of_deepspeed(trainer):
    """Once it does not, `_precompute_ref_logps` can go."""
    source = inspect.getsource(trainer._precompute_ref_logps)
    assert "prepare_deepspeed(self.model" in source
    assert list(inspect.signature(trainer._precompute_ref_logps).parameters) == [
        "self",
        "dataset",
        "name",
        "batch_size",
    ]


def test_the_trainer_still_steps_with_a_gradient_that_is_not_finite(tiny, tmp_path):
    """Once it stops by itself, `_clip_grad_norm` can go; what it returns is the norm before clipping."""
    source = inspect.getsource(Trainer._run_epoch)
    after = source.partition("self._clip_grad_norm(model)")[2]
    assert "optimizer.step()" in after
    assert "isfinite" not in after
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.tensor([3.0, float("inf")])
    assert not torch.isfinite(torch.nn.utils.clip_grad_norm_([weight], 1.0))


def test_a_step_s_batches_are_still_counted_after_they_are_collected():
    """`get_batch_samples` does the same with a barrier in between."""
    lines = inspect.getsource(Trainer.get_batch_samples).splitlines()
    assert "self._get_num_items_in_batch(batch_samples, device)" in lines[-2]


@pytest.fixture
def stock(tiny, tmp_path, rows):
    """A trainer whose methods can be called as the libraries have them."""
    return dpo(AudioDPOTrainer, tiny, tmp_path / "stock", Rows(rows), precompute_ref_log_probs=True)


def test_the_trainer_still_writes_checkpoints_in_place(stock, monkeypatch):
    """Once a kill leaves nothing behind, `_save_checkpoint` and `_get_output_dir` can go."""

    def killed(folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(stock, "_save_optimizer_and_scheduler", killed)
    with pytest.raises(KeyboardInterrupt):
        Trainer._save_checkpoint(stock, stock.model, trial=None)
    assert (Path(stock.args.output_dir) / "checkpoint-0").is_dir()
    with pytest.raises(KeyboardInterrupt):
        stock._save_checkpoint(stock.model, trial=None)
    assert checkpoints(Path(stock.args.output_dir)) == []


def test_the_trainer_still_loads_no_weights_of_this_model(stock, tiny, tmp_path):
    """Its saved names are not those of its modules. Once they are loaded, `_load_from_checkpoint` can go."""
    weight = stock.model.lm_head.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight.add_(1)
    Trainer._load_from_checkpoint(stock, str(tiny.policy))
    assert torch.equal(weight, before + 1)
    save_learned(qwen2_audio.load_model(tiny.policy), tmp_path / "saved")
    stock._load_from_checkpoint(str(tmp_path / "saved"))
    assert torch.equal(weight, before)


def test_the_trainer_still_saves_frozen_weights(stock, tmp_path):
    stock.model.model.audio_tower.requires_grad_(False)
    Trainer._save(stock, str(tmp_path / "theirs"))
    stock._save(str(tmp_path / "ours"))
    theirs, ours = (set(load_file(tmp_path / name / "model.safetensors")) for name in ("theirs", "ours"))
    assert {name.partition(".")[0] for name in theirs - ours} == {"audio_tower"}


def test_random_states_are_still_those_of_a_rank_by_its_number():
    """Once the Trainer draws them for ranks that were not there, `_load_rng_state` can go."""
    source = inspect.getsource(Trainer._load_rng_state)
    assert 'f"rng_state_{process_index}.pth"' in source
    assert "Didn't find an RNG file" in source


def test_deepspeed_still_saves_and_misses_frozen_weights():
    from deepspeed.runtime.engine import DeepSpeedEngine

    save, load = (
        inspect.signature(getattr(DeepSpeedEngine, f"{verb}_checkpoint")).parameters
        for verb in ("save", "load")
    )
    assert save["exclude_frozen_parameters"].default is False
    assert load["load_module_strict"].default is True

"""Contracts with transformers, TRL and DeepSpeed: each fix is still needed, and still fits."""

import inspect
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import Trainer
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTTrainer,
)

from align.models.features import ClipFeatures
from align.models.qwen2_audio import model as qwen2_audio
from align.models.qwen2_audio import reward_model
from align.training import grpo_trainer, library_fixes, trainers
from align.training.checkpoints import checkpoints, save_learned
from align.training.collate import PreferenceCollator
from align.training.data_loading import Rows
from align.training.grpo_trainer import BestOfTrainer
from align.training.methods import Schedule
from align.training.run import arguments
from align.training.trainers import (
    AudioDPOTrainer,
    AudioKTOTrainer,
    AudioRewardTrainer,
    AudioSFTTrainer,
)
from align.training.tuning import Tuning

CHECKPOINTS = {"_get_output_dir", "_save_checkpoint", "_save", "_load_from_checkpoint", "_load_rng_state"}
GRPO = {"_get_per_token_logps_and_entropies", "_prepare_inputs", "_generate_and_score_completions"}
PRIVATE = {"_prepare_dataset", "_precompute_ref_logps", "_clip_grad_norm", *CHECKPOINTS, *GRPO}
"""Private methods of the libraries that give way. A new one belongs into the tables first."""


def overridden(ours, *stock):
    names = {name for cls in ours for name, value in vars(cls).items() if inspect.isfunction(value)}
    return {name for name in names for cls in stock if name.startswith("_") and hasattr(cls, name)}


def test_no_more_private_methods_give_way_than_are_written_down():
    own_trainers = (AudioDPOTrainer, AudioKTOTrainer, AudioSFTTrainer, AudioRewardTrainer, BestOfTrainer)
    ours = [cls for trainer in own_trainers for cls in trainer.__mro__ if "align" in cls.__module__]
    stock = (DPOTrainer, KTOTrainer, SFTTrainer, RewardTrainer, GRPOTrainer)
    assert overridden(ours, *stock) - {"__init__"} == PRIVATE
    for module in (trainers, grpo_trainer):
        own = vars(module).values()
        classes = [cls for cls in own if inspect.isclass(cls) and cls.__module__ == module.__name__]
        assert overridden(classes, Trainer, GRPOTrainer) <= {"__init__", "__new__", "__repr__", "__eq__"}
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


@pytest.mark.parametrize("trainer", [DPOTrainer, KTOTrainer, SFTTrainer, RewardTrainer])
def test_the_name_of_a_data_set_is_the_last_argument_of_its_preparation(trainer):
    assert list(inspect.signature(trainer._prepare_dataset).parameters)[-1] == "dataset_name"
    calls = [line for line in inspect.getsource(trainer.__init__).split("_prepare_dataset(")[1:]]
    assert len(calls) == 3  # train, several held-out sets by key, one held-out set
    assert '"train"' in calls[0].partition(")")[0]
    assert '"eval"' in calls[2].partition(")")[0]


def test_trl_s_reward_trainer_still_takes_a_processor_for_a_tokenizer(tiny, tmp_path):
    """Once it does not, `FixedRewardTrainer` can go."""
    processor = qwen2_audio.load_processor(tiny.policy)
    with pytest.raises(AttributeError, match="pad_token"):
        RewardTrainer(
            model=reward_model.load_model(tiny.policy, head_seed=0),
            args=RewardConfig(**arguments(tmp_path, Schedule(1, 2, 1e-3, 1, 0), tuning=Tuning(), trl={})),
            train_dataset=Dataset.from_list([{"chosen": "a", "rejected": "b"}]),
            processing_class=processor,
        )


def test_trl_still_reads_margins_when_the_model_has_answered():
    """Where the pairs' weights come in, see `AudioRewardTrainer`."""
    before, _, after = inspect.getsource(RewardTrainer.compute_loss).partition("model(**inputs)")
    assert '"margin"' not in before
    assert 'rewards_chosen - rewards_rejected - inputs["margin"]' in after


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


# -------------------------------------------------------------------------- GRPO


def test_grpo_still_takes_a_model_with_a_processor_for_one_that_sees(tiny, tmp_path):
    """Once TRL knows audio, the processor can go to it whole."""
    config = GRPOConfig(
        str(tmp_path), use_cpu=True, bf16=False, per_device_train_batch_size=2, num_generations=2, max_steps=1
    )
    with pytest.raises(AttributeError, match="image_token_id"):
        GRPOTrainer(
            qwen2_audio.load_model(tiny.policy),
            reward_funcs=lambda **_: [],
            args=config,
            train_dataset=Dataset.from_dict({"prompt": ["a"]}),
            processing_class=qwen2_audio.load_processor(tiny.policy),
        )


def test_grpo_s_models_still_get_token_ids_and_no_audio():
    """Once they get it, `ClipIds` and `_get_per_token_logps_and_entropies` can go."""
    stock = GRPOTrainer._get_per_token_logps_and_entropies
    assert not [name for name in inspect.signature(stock).parameters if "audio" in name or "feature" in name]
    assert "model(**model_inputs, labels=labels, fused_lm_head=True)" in inspect.getsource(stock)
    for caller in (GRPOTrainer._compute_loss, GRPOTrainer._generate_and_score_completions):
        assert "self._get_per_token_logps_and_entropies(" in inspect.getsource(caller)


def test_grpo_still_shuffles_rows_before_it_splits_them():
    """Once groups stay whole, `_prepare_inputs` can go."""
    lines = inspect.getsource(GRPOTrainer._prepare_inputs)
    assert "generation_batch = shuffle_sequence_dict(generation_batch)" in lines
    assert "inputs = self._buffered_inputs[self._step % self.args.steps_per_generation]" in lines


def test_grpo_still_forgets_its_completions_and_its_place_among_them():
    """So a checkpoint must lie between generations, see `GRPOConfig.iterations` and `Report.on_step_end`."""
    saving = inspect.getsource(GRPOTrainer._save_checkpoint) + inspect.getsource(Trainer._save_checkpoint)
    assert "_buffered_inputs" not in saving
    assert "self._step" not in saving
    assert "self._step = 0" in inspect.getsource(GRPOTrainer.__init__)


def test_grpo_still_hands_rollouts_each_prompt_as_often_as_it_wants_completions():
    """Its documentation says otherwise; and advantages come back in the order of the rows."""
    source = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    assert 'prompts = [x["prompt"] for x in inputs]' in source
    assert "output = self.rollout_func(prompts, self)" in inspect.getsource(GRPOTrainer._generate)
    assert "mean_grouped_rewards.repeat_interleave(num_generations, dim=0)" in source
    assert "inp[key] = values[i]" in source  # the parts of our rewards

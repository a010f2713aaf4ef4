import pytest
import torch
from trl import DPOConfig, SFTConfig

from align.training.argument_check import refused_arguments

OURS = {"learning_rate": 1e-4, "max_steps": 10}


def refused(config=DPOConfig, *, is_for_gpus=False, **trl):
    return refused_arguments(config, trl, OURS, is_for_gpus=is_for_gpus)


@pytest.mark.parametrize(
    "trl",
    [
        {},
        {"lr_scheduler_type": "cosine", "warmup_steps": 50, "weight_decay": 0.05, "adam_beta2": 0.98},
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-7}},
        {"lr_scheduler_kwargs": {"min_lr": 1e-7}, "lr_scheduler_type": "cosine_with_min_lr"},
        {"dataloader_prefetch_factor": 2, "dataloader_num_workers": 1},
        {"optim": "adafactor"},
        {"logging_steps": 0.25, "activation_checkpointing": True},
    ],
)
def test_what_the_libraries_take(trl):
    assert refused(**trl) == {}
    assert refused(SFTConfig, **trl) == {}


@pytest.mark.parametrize(
    ("trl", "name", "words"),
    [
        ({"optim": "nonsense"}, "optim", "nonsense is not a valid OptimizerNames"),
        ({"optim": "adamw_8bit"}, "optim", "install `bitsandbytes`"),
        ({"optim": "galore_adamw"}, "optim", "install `galore_torch`"),
        ({"optim": "adamw_torch", "optim_args": "fast"}, "optim_args", "not enough values to unpack"),
        ({"weight_decay": 0.1, "adam_beta1": 2.0}, "adam_beta1", "Invalid beta parameter at index 0: 2.0"),
        ({"adam_beta2": -0.1}, "adam_beta2", "Invalid beta parameter at index 1: -0.1"),
        ({"adam_epsilon": -1.0}, "adam_epsilon", "Invalid epsilon value: -1.0"),
        ({"lr_scheduler_type": "nonsense"}, "lr_scheduler_type", "nonsense is not a valid SchedulerType"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_type", "min_lr or min_lr_rate should"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "lr_scheduler_type", "num_decay_steps"),
        ({"lr_scheduler_kwargs": {"x": 1}}, "lr_scheduler_kwargs", "unexpected keyword argument 'x'"),
        ({"warmup_steps": -3}, "warmup_steps", "warmup_steps"),
        ({"logging_steps": 1.5}, "logging_steps", "must be an integer if bigger than 1"),
        ({"log_level": "loud"}, "log_level", "loud"),
        ({"torch_empty_cache_steps": 0}, "torch_empty_cache_steps", "must be an integer bigger than 0"),
        ({"dataloader_prefetch_factor": 2}, "dataloader_prefetch_factor", "dataloader_num_workers > 0"),
        ({"dataloader_persistent_workers": True}, "dataloader_persistent_workers", "num_workers > 0"),
        ({"activation_checkpointing_kwargs": {"slow": 1}}, "activation_checkpointing_kwargs", "slow"),
        ({"activation_checkpointing_kwargs": '{"a"'}, "activation_checkpointing_kwargs", "delimiter"),
    ],
)  # fmt: skip
def test_what_the_libraries_refuse_is_blamed_on_its_name(trl, name, words):
    told = refused(**trl)
    assert list(told) == [name]
    assert words in told[name]


def test_several_are_told_at_once_and_nothing_is_left_behind():
    before = torch.get_rng_state()
    assert sorted(refused(weight_decay=0.1, adam_beta1=2.0, optim="x", log_level="loud", warmup_steps=3)) == [
        "adam_beta1",
        "log_level",
        "optim",
    ]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="what a machine without a GPU cannot say of one that has"
)
def test_what_only_a_gpu_allows_counts_where_training_runs_here():
    assert list(refused(bf16=True, tf32=True, weight_decay=0.1)) == ["bf16", "tf32"]
    assert refused(bf16=True, tf32=True, weight_decay=0.1, is_for_gpus=True) == {}

"""Which names a recipe's `trl:` mapping may use, read from TRL's source text without importing it.

Importing TRL takes seconds and torch; a recipe is checked in a blink. So the config classes are parsed.
"""

from __future__ import annotations

import ast
from collections.abc import Collection
from difflib import get_close_matches
from functools import cache
from importlib.util import find_spec
from pathlib import Path


def _by_name(names_of: dict[str, str]) -> dict[str, list[str]]:
    """The keys of a table by each of the names that stand behind them."""
    pairs = [(name, key) for key, names in names_of.items() for name in names.split()]
    return {name: [key for other, key in pairs if other == name] for name, _ in pairs}


_OURS = {
    "learning_rate": "learning_rate",
    "beta": "beta",
    "loss": "loss_type loss_weights",
    "epochs": "num_train_epochs max_steps",
    "steps": "num_train_epochs max_steps",
    "batch_size": "per_device_train_batch_size auto_find_batch_size",
    "save_steps": "save_steps save_strategy eval_steps",
    "seed": "seed data_seed",
    "choose": "load_best_model_at_end metric_for_best_model greater_is_better",
    "answers": "num_generations",
    "temperature": "temperature",
    "max_new_tokens": "max_completion_length",
    "iterations": "num_iterations steps_per_generation generation_batch_size",
    "reward": "reward_weights",
    "hardware": "deepspeed fsdp fsdp_config use_cpu ddp_backend ddp_timeout ddp_find_unused_parameters"
    " parallelism_config accelerator_config local_rank",
    "--out on the command line": "output_dir",
    "MLFLOW_TRACKING_URI in the environment": "report_to",
}
"""What sets a thing here -> TRL's names for it. One way to set each thing."""
INSTEAD = _by_name(_OURS)
"""TRL's name -> our keys that set the same thing."""

_EVALUATION = "the stage decides what is held out and when it is scored"
_WHY_NOT = {
    "an interrupted stage resumes by itself": "resume_from_checkpoint",
    "answers are never cut": "max_length",
    "rows are not packed": "packing",
    "the loss is on the answers only": "assistant_only_loss completion_only_loss",
    "the collator needs every column": "remove_unused_columns",
    "the policy's own chat template is used": "chat_template_path",
    "the stage loads the policy": "model_init_kwargs",
    "a killed run would resume without its optimizer and learn something else": "save_only_model",
    "a resumed run would see the first examples again": "ignore_data_skip",
    "the stage's own callbacks keep their state in its folder": "restore_callback_states_from_checkpoint",
    "the stage saves by itself when it is stopped": "enable_jit_checkpoint",
    "all machines share the run folder, and would write the same files": "save_on_each_node",
    "the stage decides which checkpoints it needs": "save_total_limit",
    "models are published by `align export`, after the gate, not from inside a training": "push_to_hub"
    " hub_model_id hub_strategy hub_token hub_private_repo hub_always_push hub_revision",
    "metrics go to MLflow; set MLFLOW_TRACKING_URI in the environment": "trackio_space_id trackio_bucket_id"
    " trackio_static_space_id",
    _EVALUATION: "do_eval do_predict eval_strategy eval_on_start eval_delay eval_packing"
    " eval_accumulation_steps eval_do_concat_batches eval_use_gather_object batch_eval_metrics bf16_full_eval"
    " fp16_full_eval include_for_metrics num_generations_eval prediction_loss_only",
    "a training stage always trains": "do_train",
    "it prepares rows of plain text, and the stage prepares its own": "dataset_kwargs dataset_text_field"
    " packing_strategy padding_free pad_to_multiple_of truncation_mode eos_token pad_token"
    " length_column_name label_names",
    "the stage decides the order of examples, so that it resumes exactly": "shuffle_dataset",
    "every step has exactly batch_size examples": "dataloader_drop_last",
    "it replaces the model's forward, as the packed backbone and TRL's fused head do": "torch_compile"
    " torch_compile_backend torch_compile_mode use_liger_kernel liger_kernel_config",
    "the policies are trained in bfloat16 on GPUs and float32 on CPUs": "fp16",
    "the reference is the policy that training starts from, scored once": "sync_ref_model"
    " ref_model_mixup_alpha ref_model_sync_steps",
    "the models have no experts to balance": "router_aux_loss_coef",
    "TRL computes the loss itself; for DPO, label_smoothing is its own name": "label_smoothing_factor",
    "no code is loaded from a checkpoint": "trust_remote_code",
    "completions are drawn from the whole distribution by our own engine": "top_p top_k min_p"
    " repetition_penalty generation_kwargs cache_implementation use_transformers_continuous_batching"
    " transformers_continuous_batching_config use_transformers_paged chat_template_kwargs use_vllm vllm_mode"
    " vllm_model_impl vllm_enable_sleep_mode vllm_structured_outputs_regex vllm_server_base_url"
    " vllm_server_host vllm_server_port vllm_server_timeout vllm_group_port vllm_gpu_memory_utilization"
    " vllm_max_model_length vllm_tensor_parallel_size vllm_importance_sampling_correction"
    " vllm_importance_sampling_mode vllm_importance_sampling_clip_max vllm_importance_sampling_clip_min"
    " vllm_importance_sampling_cap",
    "the policies call no tools": "max_tool_calling_iterations",
    "the stage logs rewards by itself": "log_completions log_multimodal log_unique_prompts"
    " log_completions_hub_repo num_completions_to_print",
    "its checks read the model's outputs on a TPU or count overflows of fp16": "debug",
}
"""Why -> TRL's names that cannot work here, or would undo what the stages promise."""
REFUSED = {name: why for name, (why,) in _by_name(_WHY_NOT).items()}
_CHOICES = {
    "optim": ("training_args.py", "OptimizerNames"),
    "lr_scheduler_type": ("trainer_utils.py", "SchedulerType"),
}
"""Names whose values are those of an enum -> its file in transformers."""
_SCHEDULERS_THAT_EVALUATE = ("reduce_lr_on_plateau", "greedy")


@cache
def known_names(config_class: str) -> frozenset[str]:
    """Field names of a TRL config class, inherited ones too.

    Raises:
        FileNotFoundError: the installed TRL or transformers keeps its configs elsewhere.
    """
    node = _class(config_class)
    names = {
        item.target.id
        for item in node.body
        if isinstance(item, ast.AnnAssign)
        and isinstance(item.target, ast.Name)
        and not item.target.id.startswith("_")
        and "ClassVar" not in ast.unparse(item.annotation)
    }
    parents = [base.id for base in node.bases if isinstance(base, ast.Name)]
    return frozenset(names).union(*map(known_names, parents))


def _class(name: str) -> ast.ClassDef:
    """The definition of a config class: each is in a file of its own in TRL, the root in transformers."""
    files = [
        *sorted(_folder("trl").glob("trainer/*_config.py")),
        _folder("transformers") / "training_args.py",
    ]
    for path in files:
        if f"class {name}" in (text := path.read_text(encoding="utf-8")):
            for node in ast.parse(text).body:
                if isinstance(node, ast.ClassDef) and node.name == name:
                    return node
    raise FileNotFoundError(f"neither TRL nor transformers define {name} where their configs were so far")


def _folder(package: str) -> Path:
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"{package} is not installed; run `pip install {package}`")
    return Path(spec.origin).parent


@cache
def _choices(name: str) -> frozenset[str]:
    """The values that a name can have."""
    file, enum = _CHOICES[name]
    tree = ast.parse((_folder("transformers") / file).read_text(encoding="utf-8"))
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == enum)
    values = [item.value for item in body if isinstance(item, ast.Assign)]
    return frozenset(str(value.value) for value in values if isinstance(value, ast.Constant))


def instead_of(name: str, ours: Collection[str]) -> str | None:
    """What to use instead of a TRL name that a stage with the keys `ours` sets itself; None if free."""
    if name in ours:
        return name
    options = INSTEAD.get(name)
    return next((option for option in options if option in ours), options[0]) if options else None


def problem_with(name: str, value: object, config_class: str, ours: Collection[str]) -> str | None:
    """Why a name of the `trl:` mapping, or its value, cannot be used; None if it can."""
    known = known_names(config_class)
    if (name in known or name in ours) and (instead := instead_of(name, ours)):
        return f"set by the stage; use {instead} instead"
    if name not in known:
        close = get_close_matches(name, known, n=1)
        return f"trl.{config_class} has no such name" + (f" (did you mean {close[0]!r}?)" if close else "")
    if name in REFUSED:
        return f"cannot be used: {REFUSED[name]}"
    if name in _CHOICES and value not in _choices(name):
        close = get_close_matches(str(value), _choices(name), n=1)
        return f"{value!r} is not one of transformers'" + (f" (did you mean {close[0]!r}?)" if close else "")
    if name == "lr_scheduler_type" and value in _SCHEDULERS_THAT_EVALUATE:
        return f"{value!r} cannot be used: {_EVALUATION}"
    return None

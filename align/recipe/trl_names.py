"""Which names a recipe's `trl:` mapping may use, read from TRL's source text without importing it.

Importing TRL takes seconds and torch; a recipe is checked in a blink. So the config classes are parsed: their
names and types. What TRL's own code says of the values, `align.training.argument_check` finds by running it.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from difflib import get_close_matches
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType

import yaml


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
    "balance": "desirable_weight undesirable_weight",
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
    "the stage decides the order of examples, so that it resumes exactly": "shuffle_dataset"
    " train_sampling_strategy",
    "pairs have weights of their own, which stand where TRL has those of WPO": "use_weighting",
    "a loader copied from a process with threads can hang": "dataloader_multiprocessing_context",
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
    " transformers_continuous_batching_config use_transformers_paged chat_template_kwargs",
    "TRL's own vLLM hears no audio and shares our environment; say engine: vllm in the stage": "use_vllm"
    " vllm_mode vllm_model_impl vllm_enable_sleep_mode vllm_structured_outputs_regex vllm_server_base_url"
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
    "logging_strategy": ("trainer_utils.py", "IntervalStrategy"),
}
"""Names whose values are those of an enum -> its file in transformers."""
_WORDS = {
    "f_divergence_type": "reverse_kl forward_kl js_divergence alpha_divergence",
    "include_num_input_tokens_seen": "all non_padding no",
    "importance_sampling_level": "token sequence",
    "multi_objective_aggregation": "sum_then_normalize normalize_then_sum",
    "scale_rewards": "group batch none",
}
"""Names whose texts are compared with these only when training has begun."""
_TYPES: dict[str, tuple[str, Callable[[object], bool]]] = {
    "int": ("a whole number", lambda value: type(value) is int),
    "float": ("a number", lambda value: type(value) in (int, float)),
    "bool": ("true or false", lambda value: type(value) is bool),
    "str": ("text", lambda value: type(value) is str),
    "dict": ("keys and values", lambda value: type(value) is dict),
    "list": ("a list", lambda value: type(value) is list),
    "None": ("null", lambda value: value is None),
}
"""In an annotation of a config class -> in words, and which values it allows."""
_BOUNDS = {
    "weight_decay max_grad_norm": (0, 1e6),
    "label_smoothing": (0, 0.4999),
    "center_rewards_coefficient": (0, 1e6),
    "ld_alpha top_entropy_quantile": (0, 1),
    "epsilon epsilon_high delta off_policy_mask_threshold": (1e-6, 1e6),
    "f_alpha_divergence_coef entropy_coef entropy_target": (-1e6, 1e6),
    "discopop_tau neftune_noise_alpha": (1e-6, 1e6),
    "gradient_accumulation_steps per_device_eval_batch_size precompute_ref_batch_size dataset_num_proc"
    " dataloader_prefetch_factor ddp_bucket_cap_mb torch_empty_cache_steps": (1, 1e9),
    "dataloader_num_workers warmup_steps": (0, 1e9),
    "logging_steps": (1e-6, 1e9),
}
"""Names -> the least and the most that makes sense; TRL and transformers would take anything."""
_SCHEDULERS_THAT_EVALUATE = ("reduce_lr_on_plateau", "greedy")


@cache
def known_names(config_class: str) -> Mapping[str, str]:
    """Field names of a TRL config class, inherited ones too -> their types as they are written.

    Raises:
        FileNotFoundError: the installed TRL or transformers keeps its configs elsewhere.
    """
    node = _class(config_class)
    types: dict[str, str] = {}
    for base in node.bases:
        types |= known_names(base.id) if isinstance(base, ast.Name) else {}
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            annotation = ast.unparse(item.annotation)
            if not item.target.id.startswith("_") and "ClassVar" not in annotation:
                types[item.target.id] = annotation
    return MappingProxyType(types)


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


def set_by_stage(name: str, ours: Collection[str]) -> str | None:
    """That a stage with the keys `ours` sets a TRL name itself, and by what; None if the name is free."""
    if name not in INSTEAD and name not in ours:
        return None
    options = [name, *INSTEAD.get(name, ())]
    instead = next((option for option in options if option in ours or " " in option), None)
    return f"set by the stage; use {instead} instead" if instead else "set by the stage"


def problem_with(name: str, value: object, config_class: str, ours: Collection[str]) -> str | None:
    """Why a name of the `trl:` mapping, or its value, cannot be used; None if it can."""
    known = known_names(config_class)
    if (name in known or name in ours) and (reason := set_by_stage(name, ours)):
        return reason
    if name not in known:
        close = get_close_matches(name, known, n=1)
        return f"trl.{config_class} has no such name" + (f" (did you mean {close[0]!r}?)" if close else "")
    if name in REFUSED:
        return f"cannot be used: {REFUSED[name]}"
    if problem := _type_problem(value, known[name]):
        return problem
    if name in _CHOICES and value not in _choices(name):
        close = get_close_matches(str(value), _choices(name), n=1)
        return f"{value!r} is not one of transformers'" + (f" (did you mean {close[0]!r}?)" if close else "")
    if name in _WORDS and isinstance(value, str) and value not in (words := _WORDS[name].split()):
        return f"{value!r} is not one of {', '.join(words)}"
    if name == "lr_scheduler_type" and value in _SCHEDULERS_THAT_EVALUATE:
        return f"{value!r} cannot be used: {_EVALUATION}"
    return _bound_problem(name, value)


def _type_problem(value: object, annotation: str) -> str | None:
    """Why a value is none of the types that a config class allows; other types than `_TYPES` allow all."""
    parts = [part.strip().partition("[")[0] for part in annotation.split(" | ")]
    allowed = [_TYPES[part] for part in parts if part in _TYPES]
    if not allowed or any(fits(value) for _, fits in allowed):
        return None
    return f"expected {' or '.join(words for words, _ in allowed)}, got {as_written(value)}"


def _bound_problem(name: str, value: object) -> str | None:
    """Why a number is too small, too large, or none."""
    if not isinstance(value, int | float):
        return None
    if not math.isfinite(value):
        return f"expected a finite number, got {value}"
    for names, (least, most) in _BOUNDS.items():
        if name in names.split() and not least <= value <= most:
            return f"must be from {least:g} to {most:g}, got {value:g}"
    return None


def as_written(value: object) -> str:
    """A value as a message shows it; text with what YAML 1.1, which many tools read, would make of it."""
    if value is None or isinstance(value, bool):
        return str({None: "null", True: "true", False: "false"}[value])
    if isinstance(value, str):
        with suppress(yaml.YAMLError, ValueError):
            if isinstance(other := yaml.safe_load(value), bool | int | float):
                return f"{value!r} (YAML 1.1 takes it for {other!r}): write it plainly, without quotes"
    return repr(value)

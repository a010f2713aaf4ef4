"""Which names a recipe's `trl:` mapping may use, read from TRL's source text without importing it.

Importing TRL takes seconds and torch; a recipe is checked in a blink. So the config classes are parsed.
"""

from __future__ import annotations

import ast
from functools import cache
from importlib.util import find_spec
from pathlib import Path

_PARENTS = {
    "SFTConfig": ("trl", "trainer/sft_config.py", "_BaseConfig"),
    "DPOConfig": ("trl", "trainer/dpo_config.py", "_BaseConfig"),
    "_BaseConfig": ("trl", "trainer/base_config.py", "TrainingArguments"),
    "TrainingArguments": ("transformers", "training_args.py", None),
}
"""Class -> package, file, and the class whose fields it inherits."""

INSTEAD = {
    "learning_rate": ("learning_rate",),
    "beta": ("beta",),
    "loss_type": ("loss",),
    "num_train_epochs": ("epochs", "steps"),
    "max_steps": ("steps", "epochs"),
    "per_device_train_batch_size": ("batch_size",),
    "auto_find_batch_size": ("batch_size",),
    "save_steps": ("save_steps",),
    "save_strategy": ("save_steps",),
    "seed": ("seed",),
    "data_seed": ("seed",),
    "eval_strategy": ("held_out", "nothing: this stage evaluates nothing"),
    "eval_steps": ("save_steps",),
    "load_best_model_at_end": ("choose",),
    "metric_for_best_model": ("choose",),
    "output_dir": ("--out on the command line",),
    "resume_from_checkpoint": ("nothing: an interrupted stage resumes by itself",),
    "max_length": ("nothing: answers are never cut",),
    "packing": ("nothing: rows are not packed",),
    "assistant_only_loss": ("nothing: the loss is on the answers only",),
    "completion_only_loss": ("nothing: the loss is on the answers only",),
    "train_sampling_strategy": ("nothing: example n of a run is a function of seed and n",),
    "remove_unused_columns": ("nothing: the collator needs every column",),
    "deepspeed": ("hardware",),
    "fsdp": ("hardware",),
    "fsdp_config": ("hardware",),
    "use_cpu": ("hardware",),
    "ddp_backend": ("hardware",),
    "ddp_timeout": ("hardware",),
    "ddp_find_unused_parameters": ("hardware",),
    "report_to": ("MLFLOW_TRACKING_URI in the environment",),
}
"""TRL's name -> our keys that set the same thing, best first. One way to set each thing."""


@cache
def known_names(config_class: str) -> frozenset[str]:
    """Field names of a TRL config class, inherited ones too.

    Raises:
        FileNotFoundError: the installed TRL or transformers keeps its configs elsewhere.
    """
    package, file, parent = _PARENTS[config_class]
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"{package} is not installed; run `pip install {package}`")
    path = Path(spec.origin).parent / file
    tree = ast.parse(path.read_text(encoding="utf-8"))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == config_class]
    names = {
        item.target.id
        for node in classes
        for item in node.body
        if isinstance(item, ast.AnnAssign)
        and isinstance(item.target, ast.Name)
        and not item.target.id.startswith("_")
        and "ClassVar" not in ast.unparse(item.annotation)
    }
    return frozenset(names) | (known_names(parent) if parent else frozenset())


def instead_of(name: str, ours: frozenset[str]) -> str | None:
    """What to use instead of a TRL name that a stage with the keys `ours` sets itself; None if free."""
    if name in ours:
        return name
    if name not in INSTEAD:
        return None
    options = INSTEAD[name]
    return next((option for option in options if option.split(".")[0] in ours), options[0])

"""Whether TRL, transformers and torch take the values of a recipe's `trl:`: their own objects are built.

No model is loaded and nothing is trained: the config, the optimizer of one weight with a step of its
schedule, and a loader. For `align check` and the start of `align run`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch.utils.data import DataLoader
from transformers import Trainer, get_scheduler
from transformers.utils import logging

_OF_GPUS = ("bf16", "tf32")
"""Names that a GPU of the cluster may allow where this machine does not."""
_STEPS = 1000
"""Of a stage whose length is not known yet."""


def refused_arguments(
    config: type[Any], trl: Mapping[str, Any], ours: Mapping[str, Any], *, is_for_gpus: bool
) -> dict[str, str]:
    """Names in `trl` with a value that cannot work -> the error that says so.

    They are added one after the other, so that each is blamed for what it breaks; one that needs another,
    which comes later, is tried again.

    Args:
        config: TRL's config class.
        trl: of the recipe; its names are known and of the right types.
        ours: further arguments that the stage sets.
        is_for_gpus: training runs on GPUs, whether this machine has some or not.
    """
    unknown_here = _OF_GPUS if is_for_gpus and not torch.cuda.is_available() else ()
    left = {name: value for name, value in trl.items() if name not in unknown_here}
    good: dict[str, Any] = {}
    with _quiet():
        while True:
            refused = {}
            for name, value in left.items():
                if error := _error(config, {**ours, **good, name: value}):
                    refused[name] = error
                else:
                    good[name] = value
            if len(refused) in (0, len(left)):
                return refused
            left = {name: left[name] for name in refused}


def _error(config: type[Any], arguments: Mapping[str, Any]) -> str | None:
    """What libraries say of the arguments, in a line; None if they take them."""
    try:
        args = config(output_dir="unused", report_to="none", **{"bf16": False, "use_cpu": True, **arguments})
        weight = torch.nn.Linear(1, 1, device="meta").to_empty(device="cpu")
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(args, weight)
        optimizer = kind(weight.parameters(), **settings)
        schedule = get_scheduler(
            args.lr_scheduler_type,
            optimizer,
            num_warmup_steps=args.get_warmup_steps(_STEPS),
            num_training_steps=_STEPS,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )
        optimizer.step()
        schedule.step()
        workers = args.dataloader_num_workers
        DataLoader(
            range(1),  # type: ignore[arg-type]
            num_workers=workers,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )
    except Exception as error:  # any that libraries raise: each is an argument that cannot work
        return " ".join(str(error).split()) or type(error).__name__
    return None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the libraries' own advice; afterwards as if no config had been made in this process."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        AcceleratorState._reset_state(reset_partial_state=True)

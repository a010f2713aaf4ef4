"""Whether TRL, transformers and torch take a recipe's `trl:`: their own objects are built of it.

No model is loaded: a config, an optimizer of one weight with a step of its schedule, and a loader. For
`align check` and the start of `align run`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import combinations
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from transformers import Trainer, get_scheduler
from transformers.utils import logging

_OF_GPUS = ("bf16", "tf32")
"""Names that a GPU of the cluster may allow where this machine does not."""


def refused_arguments(
    config: type[Any], trl: Mapping[str, Any], ours: Mapping[str, Any], *, is_for_gpus: bool
) -> dict[str, str]:
    """Names in `trl` with a value that cannot work -> the error that says so.

    Where all together are refused, they are added one by one, or two by two where one needs the other, so
    that each is blamed for what it breaks.

    Args:
        config: TRL's config class.
        trl: of the recipe; its names are known and of the right types.
        ours: further arguments that the stage sets, `max_steps` among them.
        is_for_gpus: training runs on GPUs, whether this machine has some or not.
    """
    unknown_here = _OF_GPUS if is_for_gpus and not torch.cuda.is_available() else ()
    left = [name for name in trl if name not in unknown_here]
    good = dict(ours)

    def error_with(*names: str) -> str | None:
        return _error(config, {**good, **{name: trl[name] for name in names}})

    with _quiet():
        if error_with(*left) is None:
            return {}
        while names := next(
            (names for n in (1, 2) for names in combinations(left, n) if error_with(*names) is None), None
        ):
            good |= {name: trl[name] for name in names}
            left = [name for name in left if name not in names]
        return {name: str(error_with(name)) for name in left}


def _error(config: type[Any], arguments: Mapping[str, Any]) -> str | None:
    """What libraries say of the arguments, in a line; None if they take them."""
    try:
        args = config(
            output_dir="unused",
            report_to="none",
            **{"bf16": False, "use_cpu": torch.cuda.is_available(), **arguments},
        )
        layer = torch.nn.Linear(1, 1, device="meta").to_empty(device="cpu")  # draws no random number
        for weight in layer.parameters():
            weight.data.zero_()
            weight.grad = torch.zeros_like(weight)
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(args, layer)
        optimizer = kind(layer.parameters(), **settings)
        schedule = get_scheduler(
            args.lr_scheduler_type,
            optimizer,
            num_warmup_steps=args.get_warmup_steps(args.max_steps),
            num_training_steps=args.max_steps,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )
        optimizer.step()
        schedule.step()
        settings = dict(args.activation_checkpointing_kwargs or {})
        for name in ("every_n_layers", "offload", "selective"):  # those of transformers and TRL themselves
            settings.pop(name, None)
        checkpoint(torch.abs, torch.zeros(1), **{"use_reentrant": False, **settings})
        args.get_process_log_level()
        DataLoader(
            range(1),  # type: ignore[arg-type]
            num_workers=args.dataloader_num_workers,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )
    except Exception as error:  # any that libraries raise: each is an argument that cannot work
        text = " ".join(str(error).split())
        return text if " " in text else f"{type(error).__name__}: {text}"
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

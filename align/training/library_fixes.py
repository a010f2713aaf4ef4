"""All that changes how transformers, TRL, accelerate or DeepSpeed work, each with its reason.

| library | private name | why it gives way |
| --- | --- | --- |
| TRL 1.16 | `_prepare_dataset` | TRL has no audio: it tokenizes rows up front, of a `datasets.Dataset` only |
| TRL 1.16 | `_precompute_ref_logps` | its DeepSpeed engine for the reference leaves hooks on the policy |
| transformers 5.23 | `_clip_grad_norm` | a gradient norm that is not finite would be stepped with |
| DeepSpeed 0.19 | `DeepSpeedEngine.{save,load}_checkpoint` | frozen weights would be in every checkpoint |

`tests/align/training/test_library_fixes.py` holds for each that the library still needs it and still fits it.
Public methods that our trainers override (`compute_loss`, `training_step`, `log`, `evaluate`,
`get_batch_samples`) are in `trainers`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partialmethod
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils import data
from trl import DPOTrainer

from align.training.checkpoints import AtomicCheckpoints, NonFiniteLoss
from align.training.collate import Row
from align.training.data_loading import WithColumns


class FixedTrainer(AtomicCheckpoints):
    """Mixin for TRL's trainers: data sets of rows, and gradients that must be finite."""

    def __init__(
        self,
        *args: Any,
        train_dataset: data.Dataset[Row],
        eval_dataset: data.Dataset[Row] | None = None,
        **kwargs: Any,
    ) -> None:
        """TRL's arguments, but data sets of any map-style kind."""
        self._datasets = {"train": train_dataset, "eval": eval_dataset}
        # TRL checks the types of its data sets and reads the first row
        stand_in = Dataset.from_dict({"draw": [0]})
        held_out = None if eval_dataset is None else stand_in
        super().__init__(*args, train_dataset=stand_in, eval_dataset=held_out, **kwargs)

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> data.Dataset[Row] | None:
        """The data set itself; TRL gives its name, `train` or `eval`, as the last argument."""
        return self._datasets[args[-1]]

    def _clip_grad_norm(self, model: nn.Module) -> Tensor | None:
        norm = super()._clip_grad_norm(model)
        if norm is not None and not torch.isfinite(torch.as_tensor(norm)):
            raise NonFiniteLoss(
                f"gradient norm is {norm} at step {self.state.global_step + 1}; nothing was stepped with it"
            )
        return norm


class FixedDPOTrainer(FixedTrainer, DPOTrainer):
    """TRL's DPOTrainer, its reference's log-probs computed without an engine of DeepSpeed's."""

    reference_logps: Callable[[Sequence[Row], int], Mapping[str, Sequence[float]]]
    """Log-probs of all rows, in batches of a size, by the names of TRL's columns."""

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> WithColumns:
        """TRL calls it while the model is still whole."""
        return WithColumns(dataset, self.reference_logps(dataset.rows, batch_size))


def leave_frozen_weights_out() -> None:
    """DeepSpeed's checkpoints without the weights that do not learn; `checkpoints` keeps those once.

    Loading must then not miss them. The Trainer does both, but with low-rank updates only.
    """
    from deepspeed.runtime.engine import DeepSpeedEngine

    if hasattr(DeepSpeedEngine, "_stock_load_checkpoint"):
        return
    DeepSpeedEngine._stock_load_checkpoint = DeepSpeedEngine.load_checkpoint
    DeepSpeedEngine.save_checkpoint = partialmethod(
        DeepSpeedEngine.save_checkpoint, exclude_frozen_parameters=True
    )

    def load_checkpoint(engine: Any, *args: Any, load_module_strict: bool = True, **kwargs: Any) -> Any:
        return engine._stock_load_checkpoint(*args, load_module_strict=False, **kwargs)

    DeepSpeedEngine.load_checkpoint = load_checkpoint

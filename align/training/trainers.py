"""TRL's SFT and DPO trainers on audio: rows pass through untouched, collators do the rest.

TRL 1.16 knows no audio: it would tokenize our rows up front. `_prepare_dataset` is the one method that
has to give way; losses, metrics, reference handling and scheduling stay TRL's.
"""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from trl import DPOTrainer, SFTTrainer

from align.training.checkpoints import AtomicCheckpoints


class AudioSFTTrainer(AtomicCheckpoints, SFTTrainer):
    """TRL's SFTTrainer over rows for `SFTCollator`."""

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset


class AudioDPOTrainer(AtomicCheckpoints, DPOTrainer):
    """TRL's DPOTrainer over rows for `PreferenceCollator`, each pair's loss times its weight.

    With weights w_i the loss is mean_i w_i l_i for any per-pair loss l_i of TRL. TRL multiplies pair
    losses by weights in one place, WPO (arXiv:2406.11827 eq. 2): exp of the mean of
    (log_probs - log_sum_sq_probs) over the chosen answer's tokens times the same of the rejected one.
    Filling `log_sum_sq_probs` so that each factor is sqrt(w_i) makes that product w_i.
    """

    keep = None  # the stage chooses among all of them on the dev split

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.use_weighting = any(weight != 1.0 for weight in self.train_dataset["weight"])

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Any:
        """Whole shuffled passes, one after the other: a pass need not be a multiple of the batch.

        The Trainer would fill up each pass' last batch, or shorten it, by how many processes share it.
        """
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "random":
            return super()._get_train_sampler(dataset)
        rows = self.args.max_steps * self.args.train_batch_size
        rows *= self.args.world_size * self.args.gradient_accumulation_steps
        order: list[int] = []
        while len(order) < rows:
            draw = torch.Generator().manual_seed(self.args.seed + len(order) // len(dataset))
            order += torch.randperm(len(dataset), generator=draw).tolist()
        return order[:rows]

    def compute_ref_log_probs(self, model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Reference log-probs (B,) of chosen and rejected; the weight is not the model's business."""
        inputs = {name: value for name, value in inputs.items() if name != "pair_weight"}
        chosen, rejected = super().compute_ref_log_probs(model, inputs)
        return chosen, rejected

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool) -> Any:
        inputs = dict(inputs)
        weight = inputs.pop("pair_weight")

        def weighted(**batch: Any) -> Any:
            outputs = model(**batch)
            if self.use_weighting:
                half = weight.log().div(2).repeat(2)[:, None]
                outputs.log_sum_sq_probs = outputs.log_probs.detach() - half
            return outputs

        return super()._compute_loss(weighted, inputs, return_outputs)

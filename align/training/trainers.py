"""TRL's SFT and DPO trainers on audio: rows pass through untouched, collators do the rest.

TRL 1.16 knows no audio: it would tokenize our rows up front. `_prepare_dataset` is the one method that
has to give way; losses, metrics, reference handling and scheduling stay TRL's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import send_to_device
from datasets import Dataset, concatenate_datasets
from torch import Tensor, nn
from torch.utils import data
from trl import DPOTrainer, SFTTrainer

from align.models.answer_head import answers_only
from align.models.qwen2_audio.packed import is_packed, pack
from align.training import ranks
from align.training.checkpoints import AtomicCheckpoints
from align.training.collate import Row
from align.training.dealing import dealt_steps
from align.training.device import listening
from align.training.feeding import ABOUT
from align.training.reference import Logps, ReferenceStore, batches_of, put_together, reading
from align.training.strategies import whole_models
from align.training.tally import Tally
from align.training.throughput import Throughput
from align.training.work import CountsWork


class AudioSFTTrainer(CountsWork, Throughput, AtomicCheckpoints, SFTTrainer):
    """TRL's SFTTrainer over `Examples`; logs the loss of every task and source beside the whole."""

    def __init__(self, *args: Any, train_dataset: data.Dataset[Row], **kwargs: Any) -> None:
        self.tally = Tally()
        self._examples = train_dataset
        # TRL takes a `datasets.Dataset` only, which would hold all rows, and looks at one of them
        super().__init__(*args, train_dataset=Dataset.from_dict({"draw": [0]}), **kwargs)

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> data.Dataset[Row]:
        return self._examples

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """TRL's loss; notes whose it is."""
        inputs = dict(inputs)
        about = inputs.pop(ABOUT, None)

        def noting(**batch: Any) -> Any:
            outputs = answers_only(model)(**batch)
            if about is not None:
                self.tally.add(about, outputs.log_probs, outputs.label_mask)
            return outputs

        return super().compute_loss(noting, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the tally to the lines of the log that tell the loss."""
        super().log({**logs, **self.tally.take()} if "loss" in logs else logs, *args, **kwargs)


class AudioDPOTrainer(CountsWork, Throughput, AtomicCheckpoints, DPOTrainer):
    """TRL's DPOTrainer over rows for `PreferenceCollator`, each pair's loss times its weight.

    With weights w_i the loss is mean_i w_i l_i for any per-pair loss l_i of TRL. TRL multiplies pair
    losses by weights in one place, WPO (arXiv:2406.11827 eq. 2): exp of the mean of
    (log_probs - log_sum_sq_probs) over the chosen answer's tokens times the same of the rejected one.
    Filling `log_sum_sq_probs` so that each factor is sqrt(w_i) makes that product w_i.
    """

    keep: int | None = None  # the stage chooses among all of them on the dev split

    def __init__(
        self,
        *args: Any,
        cost: Callable[[Row], float] | None = None,
        reference: ReferenceStore | None = None,
        **kwargs: Any,
    ) -> None:
        """TRL's arguments, and more.

        By the `cost` of its row a step's pairs are dealt to processes and passes, see `dealing`; `reference`
        keeps what `precompute_ref_log_probs` computes.
        """
        self._cost_of_row = cost
        self.reference = reference
        super().__init__(*args, **kwargs)
        self._pack_reference()
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
        parts = self.args.world_size * self.args.gradient_accumulation_steps
        rows = self.args.max_steps * self.args.train_batch_size * parts
        order: list[int] = []
        while len(order) < rows:
            draw = torch.Generator().manual_seed(self.args.seed + len(order) // len(dataset))
            order += torch.randperm(len(dataset), generator=draw).tolist()
        if self._cost_of_row is None or parts == 1:
            return order[:rows]
        costs = [self._cost_of_row(row) for row in dataset]
        return dealt_steps(order[:rows], costs, self.args.train_batch_size * parts, parts)

    def _pack_reference(self) -> None:
        """TRL may have loaded a reference of its own; it reads the same batches as the policy."""
        if self.ref_model is not None and is_packed(self.model) and not is_packed(self.ref_model):
            pack(self.accelerator.unwrap_model(self.ref_model))

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """The dataset with the columns `reference.NAMES`; TRL calls it while the model is still whole."""
        self._pack_reference()
        if self.reference is None:
            logps = self._score(dataset, batch_size)
        else:
            model = self.ref_model or self.model
            key = {
                "weights": self._precompute_model_hash,
                "dtype": str(torch.bfloat16 if self.args.bf16 else model.dtype),
                "packed": is_packed(model),
                "reading": reading(self.processing_class),
                "ld_alpha": self.ld_alpha,
            }
            logps = self.reference.get(key, dataset, lambda: self._score(dataset, batch_size))
        return concatenate_datasets([dataset, Dataset.from_dict(logps)], axis=1)

    def _score(self, dataset: Dataset, batch_size: int) -> Logps:
        """Reference log-probs of all rows; this process computes its share of them."""
        if self.ref_model is not None:
            return self._score_by(self.ref_model, dataset, batch_size)
        deepspeed = self.args.hf_deepspeed_config if self.is_deepspeed_enabled else None
        with whole_models(deepspeed), listening(self.model, self.accelerator.device):
            return self._score_by(self.model, dataset, batch_size)

    def _score_by(self, model: nn.Module, dataset: Dataset, batch_size: int) -> Logps:
        mine = batches_of(ranks.rank(), ranks.world_size(), len(dataset), batch_size)
        workers = self.args.dataloader_num_workers
        batches = data.DataLoader(
            dataset,
            batch_sampler=[list(rows) for rows in mine],
            collate_fn=self.data_collator,
            num_workers=workers,
            multiprocessing_context=self.args.dataloader_multiprocessing_context if workers else None,
        )
        scored = []
        for rows, batch in zip(mine, batches, strict=True):
            batch = send_to_device(batch, self.accelerator.device)
            chosen, rejected = self.compute_ref_log_probs(model, batch)
            scored.append((rows, chosen.tolist(), rejected.tolist()))
        return put_together(scored, len(dataset))

    def compute_ref_log_probs(self, model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Reference log-probs (B,) of chosen and rejected; the weight is not the model's business."""
        inputs = {name: value for name, value in inputs.items() if name != "pair_weight"}
        chosen, rejected = super().compute_ref_log_probs(answers_only(model), inputs)
        return chosen, rejected

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool) -> Any:
        inputs = dict(inputs)
        weight = inputs.pop("pair_weight")

        def weighted(**batch: Any) -> Any:
            outputs = answers_only(model)(**batch)
            if self.use_weighting:
                half = weight.log().div(2).repeat(2)[:, None]
                outputs.log_sum_sq_probs = outputs.log_probs.detach() - half
            return outputs

        return super()._compute_loss(weighted, inputs, return_outputs)

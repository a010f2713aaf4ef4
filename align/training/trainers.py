"""TRL's SFT, DPO, KTO and reward trainers on audio: rows pass through untouched, collators do the rest.

Losses, metrics, reference handling and scheduling stay TRL's. What of it is private and gives way is in
`library_fixes`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils import data
from transformers import TrainerControl
from trl import SFTTrainer

from align.models.answer_head import PER_TOKEN, answers_only
from align.models.qwen2_audio.flops import cost_of
from align.models.qwen2_audio.packed import is_packed, pack
from align.models.scoring import MODEL_INPUTS
from align.training import processes
from align.training.checkpoints import NonFiniteLoss
from align.training.collate import Row
from align.training.data_loading import ABOUT, Rows
from align.training.library_fixes import FixedDPOTrainer, FixedKTOTrainer, FixedRewardTrainer, FixedTrainer
from align.training.monitoring import StepMeter, TaskLosses
from align.training.processes import eval_mode
from align.training.reference import Logps, ReferenceStore, batches_of, merge, processor_digest
from align.training.strategies import whole_models


class AudioTrainer(FixedTrainer):
    """Mixin for TRL's trainers: meters steps, names missing ranks, and stops at a loss that is not finite."""

    ref_model: Any = None

    def __init__(self, *args: Any, undecayed: frozenset[str] = frozenset(), **kwargs: Any) -> None:
        """TRL's arguments; weight decay leaves the weights `undecayed` alone, beside biases and norms."""
        self._undecayed = undecayed
        self._step_losses: list[Tensor] = []
        super().__init__(*args, **kwargs)
        inner: Any = self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model
        dtype = torch.bfloat16 if self.args.bf16 else torch.float32
        self._meter = StepMeter(self.processing_class, cost_of(inner), dtype)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Names of the weights that decay."""
        return [name for name in super().get_decay_parameter_names(model) if name not in self._undecayed]

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write nothing: TRL writes a README per checkpoint; a stage's manifest says more."""

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """A step's micro-batches; ranks that do not get theirs in time are named."""
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        processes.monitored_barrier(f"before step {self.state.global_step + 1}")
        return batches, self._get_num_items_in_batch(batches, device)

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """One forward and backward of a micro-batch, metered."""
        self._meter.begin(self.state.global_step, self.accelerator.device)
        if isinstance(inputs, dict):  # else they become a batch later
            self._meter.add(inputs)
        loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
        return loss

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """TRL's loss; a step with a loss that is not finite ends the run before its last backward pass.

        Raises:
            NonFiniteLoss: nothing was stepped with it.
        """
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if self.model.training and isinstance(loss, Tensor):
            self._step_losses.append(loss.detach())
            if self.accelerator.sync_gradients:  # the last micro-batch: wait for the device once a step
                losses = torch.stack(self._step_losses)
                self._step_losses.clear()
                self._check_finite(losses)
        return loss

    def pack_reference(self) -> None:
        """TRL may have loaded a reference of its own; it reads the same batches as the policy."""
        if self.ref_model is not None and is_packed(self.model) and not is_packed(self.ref_model):
            pack(self.accelerator.unwrap_model(self.ref_model))

    def _check_finite(self, losses: Tensor) -> None:
        if losses.isfinite().all():
            return
        loss = losses[~losses.isfinite()][0].item()
        raise NonFiniteLoss(
            f"loss is {loss} at step {self.state.global_step + 1}; the weights are those of step "
            f"{self.state.global_step} and the last checkpoint in {self.args.output_dir} is good. "
            "Lower learning_rate, or look at the data of that step."
        )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add throughput and work to rows about training."""
        if "loss" in logs:
            logs |= self._meter.take(self.state.global_step, self.accelerator)
        super().log(logs, *args, **kwargs)


class AudioSFTTrainer(AudioTrainer, SFTTrainer):
    """TRL's SFTTrainer over `Examples`; logs the loss of every task and source beside the whole."""

    def __init__(self, *args: Any, max_bad_fraction: float = 0.01, **kwargs: Any) -> None:
        """TRL's arguments; more than `max_bad_fraction` unreadable clips stop the training."""
        self._task_losses = TaskLosses(max_bad_fraction)
        super().__init__(*args, **kwargs)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """TRL's loss on the completions' positions; adds it to the losses by task."""
        inputs = dict(inputs)
        about = inputs.pop(ABOUT, None)

        def recording(**batch: Any) -> Any:
            outputs = answers_only(model)(**batch)
            if about is not None:
                self._task_losses.add(about, outputs.log_probs, outputs.label_mask)
            return outputs

        return super().compute_loss(recording, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the losses by task to rows about training."""
        super().log({**logs, **self._task_losses.take()} if "loss" in logs else logs, *args, **kwargs)


class HeldOutTrainer(AudioTrainer):
    """Evaluates examples that are not trained on, where there are some."""

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Score each held-out example once, whatever the number of processes."""
        dataset: Any = self.eval_dataset
        numbers = batches_of(processes.rank(), processes.world_size(), len(dataset), 1)
        self.model_wrapped.eval()
        try:
            mine = [(rows.start, self.held_out_score(dataset[rows.start])) for rows in numbers]
            by_number = {number: score for part in processes.gather(mine) for number, score in part}
            # sums in one order for any sharing
            metrics = self.held_out_metrics([by_number[number] for number in sorted(by_number)])
            self.log(dict(metrics))
        finally:
            self.model_wrapped.train()
        self.control: TrainerControl = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def held_out_score(self, row: Row) -> Any:
        """What is kept of a held-out example; can be pickled."""
        raise NotImplementedError

    def held_out_metrics(self, scores: Sequence[Any]) -> dict[str, float]:
        """Metrics of all held-out examples, by names that begin with `held_out/`."""
        raise NotImplementedError


class HeldOutPair(NamedTuple):
    """Loss of a pair that is not trained on, and its margin: chosen minus rejected reward."""

    loss: float
    margin: float


class PairTrainer(HeldOutTrainer):
    """Held-out examples are preference pairs."""

    def pair_loss(self, row: Row) -> tuple[dict[str, Any], float]:
        """A pair as a batch, and its loss."""
        batch = send_to_device(self.data_collator([row]), self.accelerator.device)
        with self.compute_loss_context_manager():
            return batch, self.compute_loss(self.model_wrapped, batch).item()

    def held_out_metrics(self, scores: Sequence[HeldOutPair]) -> dict[str, float]:
        """Loss, accuracy of the rewards' order, and margin."""
        return {
            "held_out/loss": sum(pair.loss for pair in scores) / len(scores),
            "held_out/accuracy": sum(pair.margin > 0 for pair in scores) / len(scores),
            "held_out/margin": sum(pair.margin for pair in scores) / len(scores),
        }


class ReferenceTrainer(HeldOutTrainer):
    """With a reference, whose log-probs are computed once."""

    logp_columns: tuple[str, str]
    """In which TRL reads what `compute_ref_log_probs` gives."""

    def __init__(self, *args: Any, reference: ReferenceStore | None = None, **kwargs: Any) -> None:
        """TRL's arguments; `reference` keeps what `precompute_ref_log_probs` computes."""
        self._reference = reference
        super().__init__(*args, **kwargs)
        self.pack_reference()

    def reference_key(self, batch_size: int) -> dict[str, Any]:
        """What else the reference's log-probs depend on, beside weights, rows, template and precision."""
        raise NotImplementedError

    def reference_logps(self, rows: Sequence[Row], batch_size: int) -> Mapping[str, Sequence[float]]:
        """The reference's log-probs of all rows, from the store where it has them."""
        self.pack_reference()
        if self._reference is None:
            return self._score(rows, batch_size)
        model = self.ref_model or self.model
        key = {
            "weights": self._precompute_model_hash,
            "dtype": str(torch.bfloat16 if self.args.bf16 else model.dtype),
            "packed": is_packed(model),
            "processor": processor_digest(self.processing_class),
            **self.reference_key(batch_size),
        }
        return self._reference.get(key, rows, lambda: self._score(rows, batch_size))

    def _score(self, rows: Sequence[Row], batch_size: int) -> Logps:
        """The reference's log-probs of all rows; this process computes its share of them."""
        if self.ref_model is not None:
            return self._score_by(self.ref_model, rows, batch_size)
        deepspeed = self.args.hf_deepspeed_config if self.is_deepspeed_enabled else None
        with whole_models(deepspeed), eval_mode(self.model, self.accelerator.device):
            return self._score_by(self.model, rows, batch_size)

    def _score_by(self, model: nn.Module, rows: Sequence[Row], batch_size: int) -> Logps:
        mine = batches_of(processes.rank(), processes.world_size(), len(rows), batch_size)
        workers = self.args.dataloader_num_workers
        batches: data.DataLoader[Row] = data.DataLoader(
            Rows(rows),
            batch_sampler=[list(numbers) for numbers in mine],
            collate_fn=self.data_collator,
            num_workers=workers,
            multiprocessing_context=self.args.dataloader_multiprocessing_context if workers else None,
        )
        scored = []
        for numbers, batch in zip(mine, batches, strict=True):
            both = self.compute_ref_log_probs(model, send_to_device(batch, self.accelerator.device))
            columns = zip(self.logp_columns, both, strict=True)
            scored.append((numbers, {name: logps.tolist() for name, logps in columns if logps is not None}))
        return merge(scored, len(rows))


class AudioDPOTrainer(PairTrainer, ReferenceTrainer, FixedDPOTrainer):
    """TRL's DPOTrainer over rows for `PreferenceCollator`, each pair's loss times its weight.

    With weights w_i the loss is mean_i w_i l_i for any per-pair loss l_i of TRL. TRL multiplies pair
    losses by weights in one place, WPO (arXiv:2406.11827 eq. 2): exp of the mean of
    (log_probs - log_sum_sq_probs) over the chosen completion's tokens times the same of the rejected one.
    Filling `log_sum_sq_probs` so that each factor is sqrt(w_i) makes that product w_i.
    """

    logp_columns = ("ref_chosen_logps", "ref_rejected_logps")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """See `ReferenceTrainer`."""
        self._policy_logps = torch.empty(0)
        super().__init__(*args, **kwargs)
        rows = self.train_dataset.rows
        self.use_weighting = any(row["weight"] != 1.0 for row in rows)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """TRL's loss on the completions' positions, with the pairs' weights."""
        inputs = dict(inputs)
        weight = inputs.pop("pair_weight")

        def weighted(**batch: Any) -> Any:
            outputs = answers_only(model)(**batch)
            self._policy_logps = outputs.log_probs.detach().sum(-1)
            if self.use_weighting:
                half = weight.log().div(2).repeat(2)[:, None]
                outputs.log_sum_sq_probs = outputs.log_probs.detach() - half
            return outputs

        return super().compute_loss(weighted, inputs, *args, **kwargs)

    @torch.no_grad()
    def held_out_score(self, row: Row) -> HeldOutPair:
        """Loss and margin of a pair."""
        batch, loss = self.pair_loss(row)
        chosen, rejected = self._policy_logps.tolist()
        if "ref_chosen_logps" in batch:
            reference = batch["ref_chosen_logps"], batch["ref_rejected_logps"]
        else:
            reference = self.compute_ref_log_probs(self.ref_model or self.model, batch)
        margin = self.beta * (chosen - reference[0].item() - rejected + reference[1].item())
        return HeldOutPair(loss, margin)

    def reference_key(self, batch_size: int) -> dict[str, Any]:
        """Length desensitisation."""
        return {"ld_alpha": self.ld_alpha}

    def compute_ref_log_probs(self, model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Reference log-probs (B,) of chosen and rejected; the pairs' weights do not go into a model."""
        inputs = {name: value for name, value in inputs.items() if name != "pair_weight"}
        chosen, rejected = super().compute_ref_log_probs(answers_only(model), inputs)
        return chosen, rejected


class AudioKTOTrainer(ReferenceTrainer, FixedKTOTrainer):
    """TRL's KTOTrainer over rows for `LabelCollator`, each label's loss times its weight.

    TRL asks a model twice, for the rows themselves and for the mismatched ones of its KL term. They share
    prompts and clips, so one forward pass of all rows answers both.
    """

    logp_columns = ("ref_logps", "ref_KL_logps")

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """TRL's loss, which multiplies those of desirable and undesirable completions by these weights."""
        weight, is_desirable = inputs["weight"], inputs["label"]
        self.desirable_weight = self.args.desirable_weight * weight[is_desirable]
        self.undesirable_weight = self.args.undesirable_weight * weight[~is_desirable]
        return super().compute_loss(*_in_one_pass(model, inputs), *args, **kwargs)

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Reference log-probs (N,) of the rows, and of the mismatched ones if there are any."""
        own, mismatched = super().compute_ref_log_probs(*_in_one_pass(model, inputs))
        return own, mismatched

    def reference_key(self, batch_size: int) -> dict[str, Any]:
        """Which completion is a row's mismatched one follows from the size of micro-batches."""
        return {"loss": self.loss_type, "micro_batch": batch_size}

    def held_out_metrics(self, scores: Sequence[tuple[bool, float]]) -> dict[str, float]:
        """How often a desirable completion has a larger reward than an undesirable one, and by how much.

        No loss: it depends on which examples share a batch.
        """
        desirable, undesirable = (
            torch.tensor([reward for is_desirable, reward in scores if is_desirable == label])
            for label in (True, False)
        )
        margins = desirable[:, None] - undesirable
        return {
            "held_out/accuracy": (margins > 0).double().mean().item(),
            "held_out/margin": margins.double().mean().item(),
        }

    @torch.no_grad()
    def held_out_score(self, row: Row) -> tuple[bool, float]:
        """The label, and the reward of the completion."""
        batch = send_to_device(replace(self.data_collator, with_kl=False)([row]), self.accelerator.device)
        model, inputs = _in_one_pass(self.model_wrapped, batch)
        with self.compute_loss_context_manager():
            logp = model(input_ids=inputs["input_ids"]).log_probs.sum().item()
        return row["label"], self.beta * (logp - row["ref_logps"])


def _in_one_pass(model: Any, inputs: Mapping[str, Any]) -> tuple[Callable[..., Any], dict[str, Any]]:
    """A model and a batch for TRL's KTO: what it asks of the one is answered by one forward pass of all rows.

    The pass is made where TRL first asks, with the gradients that there are here: it asks for the mismatched
    rows first, and without.
    """
    n = len(inputs["label"])
    rows = {name: inputs[name] for name in ("input_ids", "attention_mask", "completion_mask")}
    batch = {name: value[:n] for name, value in rows.items()}
    batch |= {f"KL_{name}": value[n:] for name, value in rows.items()}
    batch |= {name: inputs[name] for name in ("label", "ref_logps", "ref_KL_logps") if name in inputs}
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
    has_gradients = torch.is_grad_enabled()

    @cache
    def outputs() -> Any:
        own = {name: inputs[name] for name in MODEL_INPUTS if name in inputs}
        with torch.set_grad_enabled(has_gradients):
            return answers_only(model)(**own, labels=labels, use_cache=False, fused_lm_head=True)

    def forward(*, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        is_mismatched = input_ids.data_ptr() != inputs["input_ids"].data_ptr()
        part = slice(n, None) if is_mismatched else slice(n)
        values = {name: getattr(outputs(), name) for name in PER_TOKEN}
        return SimpleNamespace(
            **{name: value if value is None else value[part] for name, value in values.items()}
        )

    return forward, batch


class AudioRewardTrainer(PairTrainer, FixedRewardTrainer):
    """TRL's RewardTrainer over rows for `PreferenceCollator`, each pair's loss times its weight.

    With weights w_i and differences d_i of the two rewards the loss is mean_i -w_i log sigmoid(d_i). TRL
    knows no weights, but subtracts a margin from d_i. That margin is chosen so that sigmoid(d_i - margin) is
    sigmoid(d_i)^w_i. Metrics, and what `center_rewards_coefficient` centres, stay those of the rewards.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """TRL's arguments."""
        self._differences = torch.empty(0)
        super().__init__(*args, **kwargs)
        self._is_weighted = any(row["weight"] != 1.0 for row in self.train_dataset.rows)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """TRL's loss, with the pairs' weights."""
        weight = inputs["pair_weight"]
        inputs = {name: value for name, value in inputs.items() if name in MODEL_INPUTS}

        def weighted(**batch: Any) -> Any:
            outputs = model(**batch)
            chosen, rejected = outputs.logits[:, 0].chunk(2)
            self._differences = (chosen - rejected).detach()
            if self._is_weighted:  # TRL looks for it when the model has answered
                inputs["margin"] = chosen - rejected - _powered(chosen - rejected, weight)
            return outputs

        return super().compute_loss(weighted, inputs, *args, **kwargs)

    @torch.no_grad()
    def held_out_score(self, row: Row) -> HeldOutPair:
        """Margin: the difference of the two rewards."""
        _, loss = self.pair_loss(row)
        return HeldOutPair(loss, self._differences.item())


def _powered(logit: Tensor, power: Tensor) -> Tensor:
    """The logit of sigmoid(logit) ^ power."""
    log_p = (power * F.logsigmoid(logit)).clamp(max=-1e-30)  # at 0 its logit would be infinite
    return log_p - (-log_p.expm1()).log()

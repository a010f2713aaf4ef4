"""All that changes how transformers, TRL, accelerate or DeepSpeed work, each with its reason.

| private name | why it gives way |
| --- | --- |
| **TRL 1.16** `_prepare_dataset` | has no audio: it tokenizes rows up front, of a `datasets.Dataset` only |
| `_precompute_ref_logps` | its DeepSpeed engine for the reference leaves hooks on the policy |
| `_get_per_token_logps_and_entropies` | GRPO's models get token ids and no audio |
| `_prepare_inputs`, `_buffered_inputs`, `_step` | GRPO's shuffle tears groups apart, which share a prompt |
| `_generate_and_score_completions` | best-of-n needs other advantages, and GRPO has no other seam |
| **transformers 5.23** `_save_checkpoint`, `_get_output_dir` | a kill leaves half of one, then resumed |
| `_save` | frozen weights are in every checkpoint; ZeRO-3's have names that no other program knows |
| `_load_from_checkpoint` | weights whose saved names differ from the modules' names are not loaded |
| `_load_rng_state` | with another number of processes some would have no random states |
| `_clip_grad_norm` | a gradient norm that is not finite would be stepped with |
| **DeepSpeed 0.19** `DeepSpeedEngine.save_checkpoint`, `.load_checkpoint` | all hold frozen weights |
| **torch 2.13** `cpp_extension._get_build_directory` | a killed build is waited for for ever |

`tests/align/training/test_library_fixes.py` holds for each that the library still needs it and still fits it.
Public methods that our trainers override (`compute_loss`, `training_step`, `log`, `evaluate`,
`get_batch_samples`) are in `trainers`.
"""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partialmethod
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils import data
from transformers import PreTrainedModel, Trainer, TrainerState, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from trl import DPOTrainer, GRPOTrainer, KTOTrainer, RewardTrainer

from align.run_folder.artifacts import MANIFEST, read_json, write_json
from align.training import processes
from align.training.checkpoints import (
    STAGING,
    TOKENS,
    NonFiniteLoss,
    keep_frozen,
    keep_newest,
    load_learned,
    save_learned,
    seal,
    step_of,
)
from align.training.collate import Row
from align.training.data_loading import Rows, WithColumns
from align.training.strategies import Strategy


class FixedTrainer(Trainer):
    """Mixin for TRL's trainers: data sets of rows, checkpoints that are whole, gradients that are finite.

    Of its checkpoints the newest stays, and with `keep_candidates` the weights of all others.
    """

    model: Any
    _total_train_tokens: float

    def __init__(
        self,
        *args: Any,
        train_dataset: data.Dataset[Row],
        eval_dataset: data.Dataset[Row] | None = None,
        strategy: Strategy = "ddp",
        keep_candidates: bool = False,
        **kwargs: Any,
    ) -> None:
        """TRL's arguments, but data sets of any map-style kind, and how the training is spread."""
        self.strategy, self.keep_candidates = strategy, keep_candidates
        self._frozen_digest = ""
        self._staging: Path | None = None
        self._datasets = {"train": train_dataset, "eval": eval_dataset}
        # TRL checks the types of its data sets and reads the first row
        stand_in = Dataset.from_dict({"draw": [0]})
        held_out = None if eval_dataset is None else stand_in
        super().__init__(*args, train_dataset=stand_in, eval_dataset=held_out, **kwargs)

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> data.Dataset[Row] | None:
        """The data set itself; TRL gives its name, `train` or `eval`, as the last argument."""
        return self._datasets[args[-1]]

    def train_from(self, checkpoint: Path | None) -> None:
        """Train to the end, from a checkpoint or from the start."""
        self._frozen_digest = keep_frozen(self.model, Path(self.args.output_dir), checkpoint)
        if checkpoint is not None:
            self._total_train_tokens = read_json(checkpoint / TOKENS, int)  # TRL would count from zero
        self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))

    def load_finished(self, checkpoint: Path) -> None:
        """Load the state of a training that had ended: the Trainer would take one more step first."""
        if not self.is_deepspeed_enabled:  # whose engine is not built yet: the checkpoint is what counts
            self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self.args.output_dir)
        name = f"checkpoint-{self.state.global_step}"
        # A name of its own: a straggler of a killed attempt may still be writing into another
        staged = folder / processes.broadcast(f"{STAGING}{name}-{uuid4().hex[:8]}")
        self._staging = staged
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = None
        if processes.is_first():
            write_json(staged / name / TOKENS, self._total_train_tokens)
        facts = {"strategy": self.strategy, "workers": processes.world_size(), "frozen": self._frozen_digest}
        seal(staged / name, folder / name, facts)
        if processes.is_first():
            shutil.rmtree(staged)
            keep_newest(folder, self.args.save_steps if self.keep_candidates else None)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write the weights that learn; `state_dict` is what DeepSpeed has gathered."""
        if not isinstance(self.model, PreTrainedModel):  # low-rank updates
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            save_learned(self.model, Path(output_dir or self.args.output_dir), state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        target: Any = self.model if model is None else model
        if hasattr(target, "peft_config") or self.is_deepspeed_enabled or self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_learned(target, Path(resume_from_checkpoint))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Random states are those of each rank; with other ranks than before, they follow from the step."""
        if checkpoint and read_json(Path(checkpoint) / MANIFEST)["workers"] != processes.world_size():
            set_seed(self.args.seed + step_of(Path(checkpoint)))
        else:
            super()._load_rng_state(checkpoint)

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


class FixedKTOTrainer(FixedTrainer, KTOTrainer):
    """TRL's KTOTrainer, its reference's log-probs computed without an engine of DeepSpeed's.

    They belong to places in the training, not to rows: which completion is a row's mismatched one follows
    from its neighbours.
    """

    reference_logps: Callable[[Sequence[Row], int], Mapping[str, Sequence[float]]]
    """Log-probs of all rows, in micro-batches of a size, by the names of TRL's columns."""

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> WithColumns:
        """TRL calls it while the model is still whole."""
        return WithColumns(Rows(dataset), self.reference_logps(dataset, batch_size))


class FixedRewardTrainer(FixedTrainer, RewardTrainer):
    """TRL's RewardTrainer with a processor."""

    def __init__(self, *args: Any, processing_class: Any, **kwargs: Any) -> None:
        """TRL's arguments; it takes what it is given for a tokenizer."""
        super().__init__(*args, processing_class=processing_class.tokenizer, **kwargs)
        self.processing_class = processing_class


class FixedGRPOTrainer(FixedTrainer, GRPOTrainer):
    """TRL's GRPOTrainer with models that hear, and groups that stay whole.

    A checkpoint must lie between two generations: TRL saves neither completions nor its place among them.
    """

    _buffered_inputs: list[dict[str, Any]] | None
    policy_logps: Tensor
    """Those of the last pass (N, T); after the loss, of its completions."""

    def __init__(self, *args: Any, processing_class: Any, **kwargs: Any) -> None:
        """TRL's arguments; with a processor TRL would take the model for one that sees."""
        super().__init__(*args, processing_class=processing_class.tokenizer, **kwargs)
        self.processing_class = processing_class
        self.train_dataset = self._datasets["train"]

    def with_clips(self, model: Callable[..., Any]) -> Callable[..., Any]:
        """`model`, but of rows as TRL holds them."""
        raise NotImplementedError

    def group_advantages(self, advantages: Tensor) -> Tensor:
        """What takes the place of TRL's advantages (N, G) of N groups."""
        return advantages

    def _get_per_token_logps_and_entropies(self, model: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        scores = super()._get_per_token_logps_and_entropies(self.with_clips(model), *args, **kwargs)
        self.policy_logps = scores[0].detach()
        return scores

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        outputs = super()._generate_and_score_completions(inputs)
        groups = outputs["advantages"].view(-1, self.num_generations)
        return {**outputs, "advantages": self.group_advantages(groups).flatten()}

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if self._buffered_inputs is not before and self._buffered_inputs is not None:
            self._buffered_inputs = whole_groups(self._buffered_inputs)
            inputs = self._buffered_inputs[self._step % self.args.steps_per_generation]
        return inputs


def whole_groups(micro_batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same rows in an order that no shuffle decides, with those of one prompt next to each other."""
    rows = {
        name: torch.cat([batch[name] for batch in micro_batches])
        for name, value in micro_batches[0].items()
        if torch.is_tensor(value) and value.ndim
    }
    tokens = torch.cat([rows["prompt_ids"], rows["completion_ids"]], dim=1)
    order = torch.unique(tokens, dim=0, return_inverse=True)[1].argsort(stable=True)
    parts = order.chunk(len(micro_batches))
    return [
        {name: rows[name][part] if name in rows else value for name, value in batch.items()}
        for part, batch in zip(parts, micro_batches, strict=True)
    ]


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


def compile_once() -> None:
    """Load the op that DeepSpeed needs on a CPU, compiled on first use by one process at a time.

    torch marks a build by a file. If its process is killed, the mark stays, and all later ones wait for it
    for ever, without a word. Who holds our lock, which dies with its holder, may remove such a mark.
    """
    from deepspeed.accelerator import get_accelerator
    from torch.utils import cpp_extension

    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is None:
        return
    folder = Path(cpp_extension._get_build_directory(builder.name, verbose=False))
    with (folder / ".align-lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        (folder / "lock").unlink(missing_ok=True)
        builder.load(verbose=False)

"""One assembly for every way to train: plan, arguments, loader, preflight, fit, choose, publish."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.utils.data import Dataset
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from align.models.features import ClipFeatures
from align.models.qwen2_audio import model as qwen2_audio
from align.models.qwen2_audio.packed import keep_tower_outputs
from align.models.tower_outputs import TowerOutputs
from align.planning.tower_outputs import why_not_kept
from align.run_folder.artifacts import (
    Interrupted,
    StageFolder,
    heeding_stop,
    read_kept,
    stop_requested,
    write_json,
)
from align.run_folder.progress import Progress
from align.training import processes, strategies
from align.training.augmentation import Augmentation
from align.training.checkpoints import (
    as_policy,
    candidates,
    check_resumable,
    publish,
    resume_point,
    step_of,
)
from align.training.collate import Row
from align.training.data_loading import CACHE_BYTES, balanced, loader_arguments
from align.training.lengths import Lengths
from align.training.memory import keep_freed_memory, plan_micro_batches
from align.training.methods import Method, Schedule
from align.training.monitoring import Alarms
from align.training.preflight import Collator, NotReady, Preflight, changed, describe_beyond
from align.training.preparation import prepare_model
from align.training.trainers import AudioTrainer
from align.training.tuning import Tuning

log = logging.getLogger(__name__)

_PROGRESS = {"loss": "loss", "tokens_per_s": "tokens/s", "audio_s_per_s": "audio s/s"}


class PolicyScore(Protocol):
    """Scores a policy, whatever by: known facts, a reward, a judge."""

    def __call__(self, policy: Path) -> Mapping[str, float]:
        """Metrics of the policy in a folder."""
        ...


@dataclass(frozen=True)
class CheckpointChoice:
    """The checkpoint with the best `metric` is published: one that training logs, or one of `score`.

    `limits` are the most that other metrics may be; where every checkpoint exceeds one, those that exceed it
    least are left.
    """

    metric: str
    is_better_larger: bool = True
    score: PolicyScore | None = None
    limits: Mapping[str, float] = field(default_factory=dict)


def train(
    method: Method,
    model: PreTrainedModel,
    processor: qwen2_audio.Qwen2AudioProcessor,
    corpus: Path,
    out: StageFolder,
    *,
    schedule: Schedule,
    tuning: Tuning,
    trl: Mapping[str, Any],
    base: Path | str | None = None,
    choice: CheckpointChoice | None = None,
) -> dict[str, float]:
    """Train `model`, and save the last checkpoint, or the one of `choice`, to `out/model`.

    Args:
        method: of training, with its examples.
        model: loaded as `tuning.load` or `method.load` does.
        processor: of the model.
        corpus: folder below which the clips are.
        out: of the stage.
        schedule: steps and rate.
        tuning: what learns, and over which processes.
        trl: further arguments of TRL's config class; they win over all others.
        base: the policy that `model` comes from, if it was trained before.
        choice: how to choose among the checkpoints.

    Returns:
        The last logged metrics, the memory plan, and those of the checkpoint that was chosen.
    """
    lengths, settings = Lengths(corpus, processor), {**method.trl, **trl}
    longest = method.longest(lengths, tuning.packed)
    _refuse_long(method, lengths, model.config.text_config.max_position_embeddings - longest.further_tokens)
    loader = loader_arguments(settings)
    cache_bytes = CACHE_BYTES // max(1, loader["dataloader_num_workers"])
    features = ClipFeatures(processor, corpus, cache_bytes=cache_bytes)
    collator = method.collator(processor, features, tuning.packed)
    plan = prepare_model(
        model,
        tuning,
        lambda: plan_micro_batches(
            model,
            tuning,
            trl,
            name=out.name,
            folder=out.path,
            batch_size=schedule.batch_size,
            longest=lambda: longest,
            collate=collator,
            least=method.least_micro_batch,
            # without its adapters, the policy is it
            with_reference=tuning.lora is None and method.has_live_reference(settings),
        ),
    )
    args = method.config(
        **arguments(
            out.path,
            schedule,
            tuning=tuning,
            micro_batches=None if plan is None else plan.accumulation_steps,
            sequences=method.sequences,
            trl={**loader, **settings},
        )
    )
    tower_outputs = _tower_outputs(method, model, tuning, out)
    trainer = method.trainer(
        model=model,
        args=args,
        train_dataset=_in_order(method, lengths, schedule, args),
        data_collator=collator if tower_outputs is None else changed(collator, tower_outputs=tower_outputs),
        processing_class=processor,
        peft_config=tuning.peft_config,
        strategy=tuning.strategy,
        undecayed=tuning.undecayed,
        keep_candidates=choice is not None,
    )
    metrics = {**fit(trainer, out, tuning.modules, collator), **({} if plan is None else plan.metrics)}
    if processes.is_first():
        saved = candidates(out.path / "checkpoints")
        checkpoint, scores = saved[-1], dict[str, float]()
        if choice is not None:
            checkpoint, scores = choose(choice, saved, trainer.state.log_history, base, processor, out)
        publish(checkpoint, base, processor, out.path, method.load)
        metrics |= scores
    return metrics


def _tower_outputs(
    method: Method, model: PreTrainedModel, tuning: Tuning, out: StageFolder
) -> TowerOutputs | None:
    """Where the outputs of the audio tower are kept, if they are; rank 0 says which, and why not."""
    reason = why_not_kept(
        packed=tuning.packed,
        tower_learns=tuning.learns_in(model, "audio_tower"),
        augmented=method.augmentation != Augmentation(),
        strategy=tuning.strategy,
        tower_parameters=qwen2_audio.n_parameters(model.model.audio_tower),
        limit_gb=tuning.tower_outputs_gb,
    )
    tower_outputs = None if reason else keep_tower_outputs(model, out.path.parent, tuning.tower_outputs_gb)
    if processes.is_first():
        is_kept = (
            tower_outputs and f"kept in {tower_outputs.folder}, up to {tower_outputs.limit / 1e9:.3g} GB"
        )
        print(f"{out.name}  outputs of the audio tower are {is_kept or f'not kept: {reason}'}", flush=True)
    return tower_outputs


def _refuse_long(method: Method, lengths: Lengths, context: int) -> None:
    """Refuse examples of more tokens than the model can read; rank 0 looks for them."""
    beyond = describe_beyond(method.rows(), lengths, context) if processes.is_first() else None
    if message := processes.broadcast(beyond):
        raise NotReady(message)


def _in_order(method: Method, lengths: Lengths, schedule: Schedule, args: TrainingArguments) -> Dataset[Row]:
    """The examples, those of a step dealt into micro-batches of about equal cost where the loss allows it."""
    if method.least_micro_batch > 1:
        return method.examples
    parts = schedule.batch_size * method.sequences // args.per_device_train_batch_size
    return balanced(method.examples, lengths.cost, schedule.batch_size, parts)


def arguments(
    folder: Path,
    schedule: Schedule,
    *,
    tuning: Tuning,
    micro_batches: int | None = None,
    sequences: int = 1,
    trl: Mapping[str, Any],
) -> dict[str, Any]:
    """Keyword arguments for TRL's config classes, which count an example as so many `sequences`.

    A step goes through every process in `micro_batches`, or as many as the recipe's `trl` says.

    Raises:
        ValueError: the batch cannot be divided evenly over processes and micro-batches.
    """
    accumulation = micro_batches or int(trl.get("gradient_accumulation_steps", 1))
    parts = processes.world_size() * accumulation
    if schedule.batch_size % parts:
        raise ValueError(
            f"batch_size {schedule.batch_size} cannot be divided evenly over {parts} "
            "(processes x micro-batches)"
        )
    on_gpu = torch.cuda.is_available()
    return {
        "output_dir": str(folder / "checkpoints"),
        "max_steps": schedule.steps,
        "per_device_train_batch_size": schedule.batch_size // parts * sequences,
        "gradient_accumulation_steps": accumulation,
        "learning_rate": schedule.learning_rate,
        "save_steps": schedule.save_steps,
        "seed": schedule.seed,
        "bf16": on_gpu,  # on a CPU mixed precision only costs time and accuracy
        "dataloader_pin_memory": on_gpu,
        "activation_checkpointing": False,
        "train_sampling_strategy": "sequential",  # the data set has the order, see `data_loading`
        "logging_steps": min(10, schedule.steps),
        "logging_nan_inf_filter": False,  # it would log a NaN loss as 0
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "report_to": "none",
        **tuning.arguments(),
        **trl,
    }


# -------------------------------------------------------------------------- fit


class Report(TrainerCallback):
    """Metrics to the stage folder, progress to the terminal, and a checkpoint when a stop is requested."""

    def __init__(self, out: StageFolder, progress: Progress, is_evaluated: bool) -> None:
        self.out = out
        self.progress = progress
        self.is_evaluated = is_evaluated

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write one row of metrics."""
        logs = {k: float(v) for k, v in kwargs["logs"].items() if isinstance(v, int | float)}
        if not processes.is_first():
            return
        if "loss" in logs:
            if torch.cuda.is_available():
                logs["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9  # beside the stage's `planned_gb`
            self.out.log(state.global_step, logs)
            labels = {label: logs[name] for name, label in _PROGRESS.items() if name in logs}
            self.progress.update(state.global_step, **labels)
        elif held_out := {name: value for name, value in logs.items() if name.startswith("held_out/")}:
            self.out.log(state.global_step, held_out)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Advance the progress; evaluate where a checkpoint is due; honour a stop request at this step."""
        if processes.is_first():
            self.progress.update(state.global_step)
        if self.is_evaluated and control.should_save:
            control.should_evaluate = True
        if state.global_step >= state.max_steps:
            control.should_log = True  # the steps since the last row, which may be all there are
        # In GRPO several steps may share completions, which no checkpoint has
        is_between = state.global_step % getattr(args, "num_iterations", 1) == 0
        if is_between and processes.any_rank(stop_requested.is_set()):
            control.should_save = control.should_training_stop = True


def fit(
    trainer: AudioTrainer,
    out: StageFolder,
    trained: Sequence[str] = ("",),
    collator: Collator | None = None,
) -> dict[str, float]:
    """Train from the newest whole checkpoint to the end; returns the last logged metrics.

    `trained` are the modules that learn, see `preflight.check_frozen`; by default the whole model. `collator`
    makes the batches that are checked before; by default the trainer's.

    Raises:
        Interrupted: a stop was requested; a checkpoint of this step is on disk.
        CannotResume: the checkpoint does not fit these processes.
        NonFiniteLoss: see `trainers`.
        NotReady: see `preflight`.
    """
    keep_freed_memory()
    checkpoint = _resumed_from(Path(trainer.args.output_dir))
    if processes.is_first():
        out.rewind(0 if checkpoint is None else step_of(checkpoint))
    if checkpoint is not None:
        check_resumable(checkpoint, trainer.strategy)
    if checkpoint is not None and step_of(checkpoint) >= trainer.args.max_steps:
        trainer.load_finished(checkpoint)
    else:
        with Progress(out.name, trainer.args.max_steps, out.path) as progress, heeding_stop():
            trainer.remove_callback(PrinterCallback)
            trainer.add_callback(Preflight(trainer, trained, out.name, collator))
            trainer.add_callback(Alarms())  # before Report, which writes what they add
            trainer.add_callback(Report(out, progress, trainer.eval_dataset is not None))
            trainer.train_from(checkpoint)
    strategies.end()
    if processes.any_rank(stop_requested.is_set()) and trainer.state.global_step < trainer.state.max_steps:
        raise Interrupted
    history = [row for row in trainer.state.log_history if "loss" in row]
    return {k: float(v) for k, v in history[-1].items() if isinstance(v, int | float)} if history else {}


def _resumed_from(folder: Path) -> Path | None:
    """The newest whole checkpoint, the same for all ranks."""
    return processes.broadcast(resume_point(folder) if processes.is_first() else None)


# -------------------------------------------------------------------------- choice of a checkpoint


def choose(
    choice: CheckpointChoice,
    saved: Sequence[Path],
    history: Sequence[Mapping[str, Any]],
    base: Path | str | None,
    processor: qwen2_audio.Qwen2AudioProcessor,
    out: StageFolder,
) -> tuple[Path, dict[str, float]]:
    """The best of the `saved` checkpoints, the first of equals, and its metrics with its step.

    Each is scored once, whatever gets killed; `history` is what training has logged.
    """
    logged = {row["step"]: _held_out(row) for row in history if _held_out(row)}
    scores = {}
    for checkpoint in saved:
        step = step_of(checkpoint)
        metrics = logged.get(step, {})
        if choice.score is not None:
            own = _scored_once(choice.score, checkpoint, base, processor, out.path / "dev")
            out.log(step, own)
            metrics = {**metrics, **own}
        if choice.metric in metrics:  # a checkpoint between evaluations, of a stopped run, is not a candidate
            scores[checkpoint] = metrics
    sign = 1 if choice.is_better_larger else -1
    kept = _within(choice.limits, scores)
    best = max(kept, key=lambda checkpoint: sign * scores[checkpoint][choice.metric])
    return best, {"chosen_step": float(step_of(best)), **scores[best]}


def _within(limits: Mapping[str, float], scores: Mapping[Path, Mapping[str, float]]) -> list[Path]:
    """The checkpoints that keep all limits, or exceed them least."""
    kept = list(scores)
    for metric, limit in limits.items():
        excess = {path: max(0.0, scores[path][metric] - limit) for path in kept}
        least = min(excess.values())
        if least > 0:
            log.warning(
                "every checkpoint has %s above %g; the least is %.3g. Train fewer steps, or at a lower rate",
                metric,
                limit,
                least + limit,
            )
        kept = [path for path in kept if excess[path] == least]
    return kept


def _held_out(row: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in row.items() if name.startswith("held_out/")}


def _scored_once(
    score: PolicyScore,
    checkpoint: Path,
    base: Path | str | None,
    processor: qwen2_audio.Qwen2AudioProcessor,
    folder: Path,
) -> dict[str, float]:
    """Metrics of a checkpoint's policy, kept in `folder`."""
    path = folder / f"checkpoint-{step_of(checkpoint)}.json"
    metrics: dict[str, float] | None = read_kept(path)
    if metrics is None:
        with as_policy(checkpoint, base, processor) as policy:
            metrics = dict(score(policy))
        write_json(path, metrics)
    return metrics

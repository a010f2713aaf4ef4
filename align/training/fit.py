"""Run a trainer to the end inside a stage folder: resume, report, stop when asked, never lose work."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME

from align.run_folder.artifacts import Interrupted, StageFolder, heeding_stop, read_json, stop_requested
from align.run_folder.progress import Progress
from align.training import ranks, strategies
from align.training.alarms import Alarms
from align.training.checkpoints import STAGING, TOKENS, AtomicCheckpoints, check_resumable, newest, step_of
from align.training.memory import keep_freed_memory
from align.training.preflight import Preflight


class Report(TrainerCallback):
    """Metrics to the stage folder, progress to the terminal, and a checkpoint when a stop is asked for."""

    def __init__(self, out: StageFolder, progress: Progress) -> None:
        self.out = out
        self.progress = progress

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write one row of metrics."""
        logs = {k: float(v) for k, v in kwargs["logs"].items() if isinstance(v, int | float)}
        if "loss" in logs and torch.cuda.is_available():
            logs["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9  # beside the stage's `planned_gb`
        if "loss" in logs and ranks.is_first():
            self.out.log(state.global_step, logs)
            shown = {"loss": "loss", "tokens_per_s": "tokens/s", "audio_s_per_s": "audio s/s"}
            told = {label: logs[name] for name, label in shown.items() if name in logs}
            self.progress.update(state.global_step, **told)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Advance the progress; honour a stop request at this step."""
        if ranks.is_first():
            self.progress.update(state.global_step)
        if ranks.any_says(stop_requested.is_set()):
            control.should_save = control.should_training_stop = True


def fit(trainer: AtomicCheckpoints, out: StageFolder, trained: Sequence[str] = ("",)) -> dict[str, float]:
    """Train from the newest whole checkpoint to the end; returns the last logged metrics.

    `trained` are the modules that learn, see `preflight.check_frozen`; by default the whole model.

    Raises:
        Interrupted: a stop was requested; a checkpoint of this step is on disk.
        CannotResume: the checkpoint does not fit these processes.
        NonFiniteLoss: see `checkpoints`.
        NotReady: see `preflight`.
    """
    keep_freed_memory()
    checkpoint = _resumed_from(Path(trainer.args.output_dir))
    if checkpoint is not None:
        check_resumable(checkpoint, trainer.strategy)
        if ranks.is_first():
            out.rewind(step_of(checkpoint))
        trainer._total_train_tokens = read_json(checkpoint / TOKENS)
    if checkpoint is not None and step_of(checkpoint) >= trainer.args.max_steps:
        # The Trainer would take one step more than it was told before it notices
        if not trainer.is_deepspeed_enabled:  # whose engine is not built yet: the checkpoint is what counts
            trainer._load_from_checkpoint(str(checkpoint))
        trainer.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    else:
        with Progress(out.name, trainer.args.max_steps) as progress, heeding_stop():
            trainer.remove_callback(PrinterCallback)
            trainer.add_callback(Preflight(trainer, trained, out.name))
            trainer.add_callback(Alarms())  # before Report, which writes what they add
            trainer.add_callback(Report(out, progress))
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    strategies.end()
    if ranks.any_says(stop_requested.is_set()) and trainer.state.global_step < trainer.state.max_steps:
        raise Interrupted
    history = [row for row in trainer.state.log_history if "loss" in row]
    return {k: float(v) for k, v in history[-1].items() if isinstance(v, int | float)} if history else {}


def _resumed_from(folder: Path) -> Path | None:
    """The newest whole checkpoint, the same for all ranks; what killed attempts left half is removed."""
    found = None
    if ranks.is_first():
        for staged in folder.glob(f"{STAGING}*"):
            shutil.rmtree(staged, ignore_errors=True)
        found = newest(folder)
    return ranks.first_says(found)

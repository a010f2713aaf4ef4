"""Checkpoints that are whole or absent, and a resume that really loads the weights.

Mends four things of transformers 5.23's Trainer: it writes a checkpoint in place, so a kill leaves
half of one that `resume` then picks; its resume loads no weights at all for models whose saved names
differ from their module names (Qwen2-Audio), with only a log line; under ZeRO-3 it saves names that no
other program knows (`language_model.model.model.*`); and a NaN loss is logged as 0.

With several processes all write into one staged folder; when the last is done, each hashes its share of
the files, and rank 0 seals and renames. A checkpoint of DeepSpeed's is pickles: only folders that we
sealed are ever loaded, and its `latest` file is one of the sealed.
"""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Qwen2AudioForConditionalGeneration, Trainer, set_seed

from align.run_folder.artifacts import MANIFEST, commit_folder, fsync_tree, read_json, sha256_file, write_json
from align.training import processes
from align.training.strategies import Strategy, whole_models

log = logging.getLogger(__name__)
STAGING = ".partial-"
"""How names of folders begin that checkpoints are written in before they are sealed."""
TOKENS = "tokens_seen.json"
"""In a checkpoint: TRL's count of tokens, which its resume would start anew."""
_NAME = re.compile(r"checkpoint-(\d+)")


class NonFiniteLoss(RuntimeError):
    """The loss became NaN or infinite; nothing was stepped with it."""


class CannotResume(RuntimeError):
    """A checkpoint was written in a way that this training cannot take up."""


def seal(partial: Path, final: Path, written: dict[str, Any]) -> None:
    """List a finished checkpoint's files with their hashes, then move it into place.

    Called by all ranks, each with what it `written` so far durable by the time the folder is renamed.
    """
    processes.barrier()
    fsync_tree(partial)
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    mine = files[processes.rank() :: processes.world_size()]
    hashes = processes.gather({str(path.relative_to(partial)): sha256_file(path) for path in mine})
    if processes.is_first():
        merged = {name: digest for part in hashes for name, digest in part.items()}
        write_json(partial / MANIFEST, {**written, "files": dict(sorted(merged.items()))})
        commit_folder(partial, final)
    processes.barrier()


def is_whole(checkpoint: Path) -> bool:
    """Whether every file of a sealed checkpoint is there and unchanged."""
    manifest = checkpoint / MANIFEST
    if not manifest.exists():
        return False
    files = read_json(manifest)["files"]
    return all(
        (checkpoint / name).is_file() and sha256_file(checkpoint / name) == digest
        for name, digest in files.items()
    )


def step_of(checkpoint: Path) -> int:
    """The optimizer step in a checkpoint's name."""
    match = _NAME.fullmatch(checkpoint.name)
    if match is None:
        raise ValueError(f"{checkpoint} is not named checkpoint-<step>")
    return int(match[1])


def checkpoints(folder: Path) -> list[Path]:
    """Sealed checkpoints by step; by name, never by file time (clocks jump)."""
    found = [path for path in folder.glob("checkpoint-*") if _NAME.fullmatch(path.name)]
    return sorted((path for path in found if (path / MANIFEST).exists()), key=step_of)


def newest(folder: Path) -> Path | None:
    """The latest whole checkpoint, passing over damaged ones with a warning."""
    for path in reversed(checkpoints(folder)):
        if is_whole(path):
            return path
        log.warning("%s is damaged (a file is missing or changed); using an earlier checkpoint", path)
    return None


def check_resumable(checkpoint: Path, strategy: Strategy) -> None:
    """Refuse a checkpoint whose parts do not fit these processes.

    Raises:
        CannotResume: it was written under another strategy, or in parts by another number of processes.
    """
    written = read_json(checkpoint / MANIFEST)
    before, then, now = written["strategy"], written["workers"], processes.world_size()
    if before != strategy:
        raise CannotResume(
            f"{checkpoint} was written under hardware.strategy {before}, which {strategy} cannot read; "
            f"set it back to {before}, or delete {checkpoint.parent} to start this stage anew"
        )
    if before != "ddp" and then != now:
        raise CannotResume(
            f"{checkpoint} holds one part of the optimizer for each of {then} workers, and DeepSpeed cannot "
            f"hand them to {now}; set hardware.workers back to {then}, or delete {checkpoint.parent} to "
            "start this stage anew (ddp resumes with any number of workers)"
        )


class AtomicCheckpoints(Trainer):
    """Mixin for a Trainer. `keep` checkpoints are kept, all of them when it is None."""

    keep: int | None = 2
    strategy: Strategy = "ddp"
    model: Any
    _staging: Path | None = None
    _total_train_tokens: float

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
        seal(staged / name, folder / name, {"strategy": self.strategy, "workers": processes.world_size()})
        if processes.is_first():
            shutil.rmtree(staged)
            if self.keep is not None:
                for old in checkpoints(folder)[: -self.keep]:
                    shutil.rmtree(old)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write weights under the Hub's names, also those that DeepSpeed has gathered in `state_dict`.

        transformers 5.23 renames the weights of a model loaded in parts (ZeRO-3) wrongly; a whole twin
        of it that only borrows them renames them rightly, and complains if one is missing.
        """
        model = self.model
        if not (state_dict and isinstance(model, PreTrainedModel) and self.args.should_save):
            super()._save(output_dir, state_dict)
            return
        with whole_models(self.args.hf_deepspeed_config if self.is_deepspeed_enabled else None):
            with torch.device("meta"):
                self.model = Qwen2AudioForConditionalGeneration(model.config)
            self.model.generation_config = model.generation_config
            self.model.load_state_dict(state_dict, strict=True, assign=True)
            try:
                super()._save(output_dir)
            finally:
                self.model = model

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        target: Any = self.model if model is None else model
        if hasattr(target, "peft_config") or self.is_deepspeed_enabled or self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        saved = type(target).from_pretrained(resume_from_checkpoint, dtype=target.dtype)
        target.load_state_dict(saved.state_dict(), strict=True)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Random states are those of each rank; with other ranks than before, they follow from the step."""
        if checkpoint and read_json(Path(checkpoint) / MANIFEST)["workers"] != processes.world_size():
            set_seed(self.args.seed + step_of(Path(checkpoint)))
        else:
            super()._load_rng_state(checkpoint)

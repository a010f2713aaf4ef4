"""Checkpoints that are whole or absent, and a resume that really loads the weights.

Mends three things of transformers 5.23's Trainer: it writes a checkpoint in place, so a kill leaves
half of one that `resume` then picks; its resume loads no weights at all for models whose saved names
differ from their module names (Qwen2-Audio), with only a log line; and a NaN loss is logged as 0.
"""

from __future__ import annotations

import logging
import math
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from align.artifacts import MANIFEST, commit_folder, read_json, sha256_file, write_json

log = logging.getLogger(__name__)
TOKENS = "tokens_seen.json"
"""In a checkpoint: TRL's count of tokens, which its resume would start anew."""
_NAME = re.compile(r"checkpoint-(\d+)")


class NonFiniteLoss(RuntimeError):
    """The loss became NaN or infinite; nothing was stepped with it."""


def seal(partial: Path, final: Path) -> None:
    """List a finished checkpoint's files with their hashes, then move it into place."""
    files = {path.name: sha256_file(path) for path in sorted(partial.iterdir()) if path.is_file()}
    write_json(partial / MANIFEST, {"files": files})
    commit_folder(partial, final)


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


class AtomicCheckpoints(Trainer):
    """Mixin for a Trainer. `keep` checkpoints are kept, all of them when it is None."""

    keep: int | None = 2
    _staging: Path | None = None
    _total_train_tokens: float

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self.args.output_dir)
        name = f"checkpoint-{self.state.global_step}"
        self._staging = folder / ".partial-checkpoint"
        shutil.rmtree(self._staging, ignore_errors=True)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            staged, self._staging = self._staging, None
        write_json(staged / name / TOKENS, self._total_train_tokens)
        seal(staged / name, folder / name)
        shutil.rmtree(staged)
        if self.keep is not None:
            for old in checkpoints(folder)[: -self.keep]:
                shutil.rmtree(old)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL writes a README per checkpoint; a stage's manifest says more."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        target: Any = self.model if model is None else model
        if hasattr(target, "peft_config") or self.is_deepspeed_enabled or self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        saved = type(target).from_pretrained(resume_from_checkpoint, dtype=target.dtype)
        target.load_state_dict(saved.state_dict(), strict=True)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One forward and backward; stops the run before a non-finite loss can be stepped with."""
        loss: Tensor = super().training_step(*args, **kwargs)
        if not math.isfinite(loss.item()):
            raise NonFiniteLoss(
                f"loss is {loss.item()} at step {self.state.global_step + 1}; the weights are those of step "
                f"{self.state.global_step} and the last checkpoint in {self.args.output_dir} is good. "
                "Lower learning_rate, or look at the data of that step."
            )
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> Tensor | None:
        norm = super()._clip_grad_norm(model)
        if norm is not None and not torch.isfinite(torch.as_tensor(norm)):
            raise NonFiniteLoss(
                f"gradient norm is {norm} at step {self.state.global_step + 1}; nothing was stepped with it"
            )
        return norm

"""A small random policy, tones, and our SFT of it: for the parts of `gpu_check` that are about whole runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile
import torch
import trl
from torch import Tensor
from transformers import TrainerCallback

from align.models.chat import assistant, user
from align.models.features import ClipFeatures
from align.models.qwen2_audio import model as qwen2_audio
from align.run_folder.artifacts import Interrupted, StageFolder, read_metrics, stop_requested
from align.training.augmentation import Augmentation
from align.training.collate import SFTCollator
from align.training.data_loading import Rows
from align.training.methods import Schedule
from align.training.preparation import prepare_model
from align.training.run import arguments, fit
from align.training.trainers import AudioSFTTrainer
from align.training.tuning import Tuning
from tests.benchmarks.trl_steps import RATE

ON_GPU = torch.cuda.is_available()


class _Stop(TrainerCallback):
    """Asks for a stop at a step, as a signal would."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before the step's batch goes through the model."""
        if state.global_step == self.at:
            stop_requested.set()


class Trained(NamedTuple):
    weights: dict[str, Tensor]
    losses: list[float]
    tower: float
    """Sum of the tower's absolute weights."""

    def compared_with(self, other: Trained) -> dict[str, Any]:
        differences = [
            float((value - other.weights[name]).abs().max()) for name, value in self.weights.items()
        ]
        return {
            "bit_equal": self.losses == other.losses and not any(differences),
            "largest_weight_difference": max(differences),
        }


class World:
    """Tones, a processor, and the same small random policy for each run."""

    STEPS = 4

    def __init__(self, folder: Path, d_model: int) -> None:
        self.folder, self.d_model = folder, d_model
        texts = ["Is the tone high or low?", "The tone is high.", "The tone is low."]
        self.processor = qwen2_audio.build_processor(
            texts * 20, vocab_size=400, mel_bins=32, hop_length=320, clip_s=1
        )
        for i in range(2):
            tone = np.sin(2 * np.pi * 300 * (1 + i) * np.arange(RATE) / RATE)
            soundfile.write(folder / f"{i}.wav", tone.astype(np.float32), RATE)
        self.tower = self._tower(self.policy())

    def policy(self) -> Any:
        """Of the same random weights every time; bfloat16 on a GPU, as a checkpoint is."""
        heads = max(2, self.d_model // 128)
        model = qwen2_audio.build_model(
            self.processor, d_model=self.d_model, heads=heads, audio_layers=2, text_layers=2, seed=0
        )
        return model.to("cuda", torch.bfloat16) if ON_GPU else model

    def trained(self, name: str, stop_at: int | None = None) -> Trained:
        """A run of `STEPS` steps; with `stop_at` it stops in that step, and another trainer goes on."""
        out = StageFolder(self.folder / name, "2_sft", "gpu-check")
        out.open()
        if stop_at is not None:
            try:
                self._fit(out, _Stop(stop_at))
            except Interrupted:
                stop_requested.clear()
            else:
                raise AssertionError("the run that was to stop went on to its end")
        model = self._fit(out).model
        learned = {
            name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad
        }
        losses = [row["loss"] for row in read_metrics(out.path / "metrics.jsonl") if "loss" in row]
        return Trained(learned, losses, self._tower(model))

    def _fit(self, out: StageFolder, *callbacks: TrainerCallback) -> AudioSFTTrainer:
        tuning = Tuning(train=("projector", "language_model"), packed=True)
        answers = ("The tone is high.", "The tone is low.")
        rows = [
            {
                "messages": [user("Is the tone high or low?", 1), assistant(answers[i % 2])],
                "audios": [f"{i % 2}.wav"],
                "draw": i,
            }
            for i in range(2 * self.STEPS)
        ]
        model = self.policy()
        prepare_model(model, tuning)
        options = arguments(
            out.path, Schedule(self.STEPS, 2, 1e-3, 1, 0), tuning=tuning, trl={"logging_steps": 1}
        )
        features = ClipFeatures(self.processor, self.folder)
        trainer = AudioSFTTrainer(
            model=model,
            args=trl.SFTConfig(**options),
            train_dataset=Rows(rows),
            data_collator=SFTCollator(self.processor, features, Augmentation(gain=0.2, time_mask=4), True),
            processing_class=self.processor,
            callbacks=list(callbacks),
        )
        fit(trainer, out, tuning.modules)
        return trainer

    @staticmethod
    def _tower(model: Any) -> float:
        return sum(weight.double().abs().sum().item() for weight in model.model.audio_tower.parameters())

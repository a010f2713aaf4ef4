"""Next-token training on rows in their given order: what pre-training and SFT have in common."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import SFTConfig

from align.artifacts import StageFolder
from align.models import qwen2_audio
from align.models.features import ClipFeatures
from align.models.packed_qwen2_audio import is_packed
from align.training.arguments import arguments
from align.training.augment import Augmentation, SpecAugment
from align.training.collate import Row, SFTCollator
from align.training.fit import fit
from align.training.trainers import AudioSFTTrainer


def train(
    model: qwen2_audio.Qwen2AudioForConditionalGeneration,
    processor: qwen2_audio.Qwen2AudioProcessor,
    rows: Sequence[Row],
    corpus: Path,
    out: StageFolder,
    *,
    batch_size: int,
    learning_rate: float,
    save_steps: int,
    seed: int,
    augmentation: Augmentation | SpecAugment,
    passed_on: dict[str, Any],
) -> dict[str, float]:
    """Train on `rows` (see `SFTCollator`) once, front to back, and save to `out/model`.

    A row's place in the list decides its augmentation, so a resumed run sees what it would have seen.
    `passed_on` goes to TRL's SFTConfig. Returns the last logged metrics.
    """
    trainer = AudioSFTTrainer(
        model=model,
        args=SFTConfig(
            **arguments(
                out.path,
                steps=len(rows) // batch_size,
                batch_size=batch_size,
                learning_rate=learning_rate,
                save_steps=save_steps,
                seed=seed,
                passed_on={"train_sampling_strategy": "sequential", **passed_on},
            )
        ),
        train_dataset=Dataset.from_list([{**row, "draw": draw} for draw, row in enumerate(rows)]),
        data_collator=SFTCollator(processor, ClipFeatures(processor, corpus), augmentation, is_packed(model)),
        processing_class=processor,
    )
    metrics = fit(trainer, out)
    qwen2_audio.save(trainer.model, processor, out.path / "model")
    return metrics

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
from align.training import ranks
from align.training.arguments import arguments
from align.training.augment import Augmentation
from align.training.checkpoints import checkpoints
from align.training.collate import Row, SFTCollator
from align.training.fit import fit
from align.training.publish import publish
from align.training.trainers import AudioSFTTrainer
from align.training.tuning import Tuning


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
    augmentation: Augmentation,
    tuning: Tuning,
    base: Path | str | None,
    passed_on: dict[str, Any],
) -> dict[str, float]:
    """Train on `rows` (see `SFTCollator`) once, front to back, and save to `out/model`.

    A row's place in the list decides its augmentation, so a resumed run sees what it would have seen.
    `base` is where `model` comes from, if it was trained before; `passed_on` goes to TRL's SFTConfig.
    Returns the last logged metrics.
    """
    tuning.prepare(model)
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
                tuning=tuning,
                passed_on={"train_sampling_strategy": "sequential", **passed_on},
            )
        ),
        train_dataset=Dataset.from_list([{**row, "draw": draw} for draw, row in enumerate(rows)]),
        data_collator=SFTCollator(processor, ClipFeatures(processor, corpus), augmentation),
        processing_class=processor,
        peft_config=tuning.peft_config,
    )
    trainer.strategy = tuning.strategy
    metrics = fit(trainer, out)
    if ranks.is_first():
        publish(checkpoints(out.path / "checkpoints")[-1], base, processor, out.path)
    return metrics

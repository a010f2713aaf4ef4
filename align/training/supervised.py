"""Next-token training on examples in their given order: what pre-training and SFT have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trl import SFTConfig

from align.models.features import ClipFeatures
from align.models.qwen2_audio import model as qwen2_audio
from align.models.qwen2_audio.packed import is_packed
from align.run_folder.artifacts import StageFolder
from align.training import ranks
from align.training.arguments import arguments
from align.training.augment import Augmentation, SpecAugment
from align.training.checkpoints import checkpoints
from align.training.collate import SFTCollator
from align.training.dealing import dealt
from align.training.feeding import CACHE_BYTES, FeedingCollator, loader_settings
from align.training.fit import fit
from align.training.lengths import Lengths
from align.training.memory import job_of, plan_passes, told
from align.training.order import Examples
from align.training.publish import publish
from align.training.trainers import AudioSFTTrainer
from align.training.tuning import Tuning


def train(
    model: qwen2_audio.Qwen2AudioForConditionalGeneration,
    processor: qwen2_audio.Qwen2AudioProcessor,
    examples: Examples,
    corpus: Path,
    out: StageFolder,
    *,
    batch_size: int,
    learning_rate: float,
    save_steps: int,
    seed: int,
    augmentation: Augmentation | SpecAugment,
    tuning: Tuning,
    base: Path | str | None,
    max_bad_fraction: float,
    passed_on: dict[str, Any],
) -> dict[str, float]:
    """Train on `examples` (see `SFTCollator`) once, front to back, and save to `out/model`.

    An example's number decides its row and augmentation, so a resumed run sees what it would have seen.
    `base` is where `model` comes from, if it was trained before; `passed_on` goes to TRL's SFTConfig.
    Returns the last logged metrics.

    Raises:
        TooManyBadClips: more than `max_bad_fraction` of the clips cannot be read.
    """
    tuning.prepare(model)
    lengths = Lengths(corpus, processor)
    plan = plan_passes(
        model,
        tuning,
        passed_on,
        name=out.name,
        batch_size=batch_size,
        job=job_of(tuning, pairs=False),
        longest=lambda job, _: lengths.longest_example(examples, job),
    )
    loading = loader_settings(passed_on)
    cache_bytes = CACHE_BYTES // max(1, loading["dataloader_num_workers"])
    features = ClipFeatures(processor, corpus, cache_bytes=cache_bytes)
    collator = SFTCollator(processor, features, augmentation, is_packed(model))
    settings = SFTConfig(
        **arguments(
            out.path,
            steps=len(examples) // batch_size,
            batch_size=batch_size,
            learning_rate=learning_rate,
            save_steps=save_steps,
            seed=seed,
            tuning=tuning,
            plan=plan,
            passed_on={"train_sampling_strategy": "sequential", **loading, **passed_on},
        )
    )
    parts = batch_size // settings.per_device_train_batch_size
    trainer = AudioSFTTrainer(
        model=model,
        args=settings,
        train_dataset=dealt(examples, lengths.cost, batch_size, parts),
        data_collator=FeedingCollator(collator, examples),
        processing_class=processor,
        peft_config=tuning.peft_config,
    )
    trainer.strategy, trainer.undecayed = tuning.strategy, tuning.undecayed
    trainer.tally.max_bad_fraction = max_bad_fraction
    metrics = {**fit(trainer, out, tuning.modules), **told(plan)}
    if ranks.is_first():
        publish(checkpoints(out.path / "checkpoints")[-1], base, processor, out.path)
    return metrics

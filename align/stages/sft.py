"""Supervised fine-tuning on multi-turn chats about clips; loss on the assistant's tokens only.

Differs from Qwen2-Audio's stage 2 (arXiv:2407.10759): pre-training targets can be mixed in (`replay`),
without which a small model forgets to transcribe. Voice chat, audio analysis and plain text are mixed as
they come, without a mode prompt. Reads: policy, corpus. Writes: model/, metrics.jsonl, left_out.jsonl.
    align run recipes/demo --only 2_sft
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from align.models.features import ClipFeatures
from align.models.qwen2_audio import model as qwen2_audio
from align.recipe.config.training import Filters, SFTConfig
from align.run_folder.artifacts import StageFolder
from align.run_folder.progress import Progress
from align.stages.tuning import tuning_of
from align.training import ranks, supervised
from align.training.audio_effect import saved_effects
from align.training.augment import chosen
from align.training.collate import SFTCollator
from align.training.filtering import keep
from align.training.order import Examples, Part
from align.training.preflight import check_heard
from align.training.rows import chat_row, task_row
from preference_data.dataset import dataset
from preference_data.dataset.dataset import Dataset
from preference_data.dataset.filters import Limits
from preference_data.dataset.manifest import Selection
from preference_data.schema import AudioClip, Chat, TaskExample


def run(config: SFTConfig, inputs: dict[str, Path], out: StageFolder) -> dict[str, float]:
    """Fine-tune the policy on chats; returns the last logged metrics."""
    corpus, policy = inputs[config.corpus], qwen2_audio.located(inputs[config.policy])
    tuning = tuning_of(config)
    model, processor = tuning.load(policy), qwen2_audio.load_processor(policy)
    check_heard(Dataset(corpus).table(AudioClip), processor, config.max_bad_fraction)
    chats, counts = Dataset(corpus).parts(Chat), dict[str, float]()
    if config.filters != Filters():
        collator = SFTCollator(processor, ClipFeatures(processor, corpus))
        effects = partial(_effects, config, model, collator, out)
        limits, least = _limits(config.filters), config.filters.min_audio_effect
        kept = keep(Dataset(corpus).table(Chat), limits, out, least, effects)
        chats, counts = _chosen(chats, np.array(kept.numbers)), kept.counts
    metrics = supervised.train(
        model,
        processor,
        _examples(config, corpus, chats),
        corpus,
        out,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        save_steps=config.save_steps,
        seed=config.seed,
        augmentation=chosen(**config.augment.model_dump()),
        tuning=tuning,
        base=policy,
        max_bad_fraction=config.max_bad_fraction,
        passed_on=config.trl,
    )
    return {**metrics, **counts}


def _limits(filters: Filters) -> Limits:
    return Limits(
        filters.min_answer_chars, filters.max_answer_chars, filters.max_similarity, tuple(filters.languages)
    )


def _effects(
    config: SFTConfig,
    model: qwen2_audio.Qwen2AudioForConditionalGeneration,
    collator: SFTCollator,
    out: StageFolder,
    chats: Sequence[Chat],
) -> list[float]:
    """What its clips are worth to each chat, by the policy that training starts from."""
    rows = [chat_row(chat) for chat in chats]
    with Progress(f"{out.name} without the clips", len(rows)) as progress:
        tell = progress.update if ranks.is_first() else None
        return saved_effects(model, collator, rows, out.path / "audio_effect", config.batch_size, tell)


def _chosen(chats: Sequence[dataset.Part[Chat]], numbers: np.ndarray) -> list[dataset.Part[Chat]]:
    """Of each data set only the chats of these numbers, which count through all of them."""
    left, start = [], 0
    for source in chats:
        end = start + len(source.records)
        own = numbers[(numbers >= start) & (numbers < end)] - start
        left.append(source._replace(records=Selection(source.records, own)))
        start = end
    return left


def _examples(config: SFTConfig, corpus: Path, chats: Sequence[dataset.Part[Chat]]) -> Examples:
    parts = [Part(name, records, share * (1 - config.replay), chat_row) for name, records, share in chats]
    if config.replay:
        parts += [
            Part(name, records, share * config.replay, partial(task_row, prompt_format=config.prompt_format))
            for name, records, share in Dataset(corpus).parts(TaskExample)
        ]
    return Examples(parts, config.steps * config.batch_size, config.seed)

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
from align.models.qwen2_audio.packed import pack
from align.recipe.config.training import Filters, SFTConfig
from align.run_folder.artifacts import StageFolder
from align.run_folder.progress import Progress
from align.stages.prompt_rows import prompt_rows
from align.stages.tuning import schedule_of, tuning_of
from align.training import processes
from align.training import run as training
from align.training.augmentation import augmentation_of
from align.training.collate import SFTCollator, chat_row, task_row
from align.training.data_loading import Examples, Part
from align.training.filtering import keep, saved_effects
from align.training.lengths import Lengths
from align.training.methods import supervised_fine_tuning
from align.training.preflight import NotReady, check_clip_lengths, describe_beyond
from preference_data.dataset.dataset import Dataset
from preference_data.dataset.filters import Limits
from preference_data.dataset.manifest import Selection
from preference_data.schema import AudioClip, Chat, TaskExample


def check(config: SFTConfig, inputs: dict[str, Path]) -> None:
    """Check data that are there before the run.

    Raises:
        NotReady, BadRecord, BadExample, BadDataset: a chat or a clip cannot be trained on.
    """
    corpus, policy = inputs[config.corpus], qwen2_audio.located(inputs[config.policy])
    processor = qwen2_audio.load_processor(policy)
    check_clip_lengths(Dataset(corpus).table(AudioClip), processor, config.max_bad_fraction)
    examples, lengths = _examples(config, corpus, _parts(config, corpus)), Lengths(corpus, processor)
    if message := describe_beyond(examples.distinct, lengths, qwen2_audio.context_of(policy)):
        raise NotReady(message)


def run(config: SFTConfig, inputs: dict[str, Path], out: StageFolder) -> dict[str, float]:
    """Fine-tune the policy on chats; returns the last logged metrics."""
    corpus, policy = inputs[config.corpus], qwen2_audio.located(inputs[config.policy])
    tuning = tuning_of(config)
    model, processor = tuning.load(policy), qwen2_audio.load_processor(policy)
    check_clip_lengths(Dataset(corpus).table(AudioClip), processor, config.max_bad_fraction)
    parts, counts = _parts(config, corpus), dict[str, float]()
    if config.filters != Filters():
        collator = SFTCollator(processor, ClipFeatures(processor, corpus), packed=tuning.packed)
        if tuning.packed:
            pack(model, tuning.attention)  # for the filter; training packs it again, which changes nothing
        effects = partial(_effects, config, model, collator, out)
        limits, least = _limits(config.filters), config.filters.min_audio_effect
        kept = keep(Dataset(corpus).table(Chat), limits, out, least, effects)
        parts, counts = _selected(parts, np.array(kept.numbers)), kept.counts
    method = supervised_fine_tuning(
        _examples(config, corpus, parts),
        augmentation_of(**config.augment.model_dump()),
        config.max_bad_fraction,
    )
    metrics = training.train(
        method,
        model,
        processor,
        corpus,
        out,
        schedule=schedule_of(config, config.steps),
        tuning=tuning,
        trl=config.trl,
        base=policy,
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
    """The audio effect of each chat, by the policy that training starts from."""
    rows = [chat_row(chat) for chat in chats]
    with Progress(f"{out.name} without the clips", len(rows), out.path) as progress:
        on_progress = progress.update if processes.is_first() else None
        return saved_effects(model, collator, rows, out.path / "audio_effect", config.batch_size, on_progress)


def _parts(config: SFTConfig, corpus: Path) -> list[Part]:
    """What is learned: each dataset's chats, or prompts with their references."""
    if config.prompts is None:
        return [Part(*part, chat_row) for part in Dataset(corpus).parts(Chat)]
    rows = list(prompt_rows(config.prompts, corpus, config.seed))
    without = [row["id"] for row in rows if not row["record"].answer_gt.strip()]
    if without or not rows:
        lacks = (
            f"{len(without)} prompts without a reference in answer_gt, such as {without[0]!r}"
            if without
            else "no prompt"
        )
        raise ValueError(
            f"prompts: {corpus} has {lacks}: nothing to learn there; remove prompts to learn its chats"
        )
    return [Part("references", rows, 1.0, dict)]


def _selected(parts: Sequence[Part], numbers: np.ndarray) -> list[Part]:
    """Each part with only the records of these numbers, which count through all parts."""
    left, start = [], 0
    for part in parts:
        end = start + len(part.records)
        own = numbers[(numbers >= start) & (numbers < end)] - start
        left.append(part._replace(records=Selection(part.records, own)))
        start = end
    return left


def _examples(config: SFTConfig, corpus: Path, parts: Sequence[Part]) -> Examples:
    parts = [part._replace(share=part.share * (1 - config.replay)) for part in parts]
    if config.replay:
        parts += [
            Part(name, records, share * config.replay, partial(task_row, prompt_format=config.prompt_format))
            for name, records, share in Dataset(corpus).parts(TaskExample)
        ]
    return Examples(parts, config.steps * config.batch_size, config.seed)

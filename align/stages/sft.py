"""Supervised fine-tuning on multi-turn chats about clips; loss on the assistant's tokens only.

Differs from Qwen2-Audio's stage 2 (arXiv:2407.10759): pre-training targets can be mixed in (`replay`),
without which a small model forgets to transcribe. Reads: policy, corpus. Writes: model/, metrics.jsonl.
    align run recipes/demo --only 2_sft
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from align.artifacts import StageFolder
from align.config import SFTConfig
from align.models import qwen2_audio
from align.training import supervised
from align.training.augment import chosen
from align.training.collate import Row
from align.training.order import mixed
from align.training.rows import chat_row, task_row
from preference_data import store
from preference_data.schema import Chat, TaskExample


def run(config: SFTConfig, inputs: dict[str, Path], out: StageFolder) -> dict[str, float]:
    """Fine-tune the policy on chats; returns the last logged metrics."""
    corpus, policy = inputs[config.corpus], qwen2_audio.located(inputs[config.policy])
    return supervised.train(
        qwen2_audio.load_model(policy),
        qwen2_audio.load_processor(policy),
        _rows(config, corpus),
        corpus,
        out,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        save_steps=config.save_steps,
        seed=config.seed,
        augmentation=chosen(config.model_dump()["augment"]),
        passed_on=config.trl,
    )


def _rows(config: SFTConfig, corpus: Path) -> list[Row]:
    chats = store.read(corpus / "sft.jsonl", Chat)
    targets = store.read(corpus / "pretrain.jsonl", TaskExample)
    drawn = mixed(
        [len(chats), len(targets)],
        [1 - config.replay, config.replay],
        config.steps * config.batch_size,
        np.random.default_rng(config.seed),
    )
    return [
        chat_row(chats[index]) if source == 0 else task_row(targets[index], config.dialect)
        for source, index in drawn
    ]

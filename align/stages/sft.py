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
from align.models.chat import assistant, user
from align.stages.tuning import tuning_of
from align.training import supervised
from align.training.augment import Augmentation
from align.training.collate import Row
from align.training.order import mixed
from preference_data import store
from preference_data.prompts import Dialect, pretraining_prompt
from preference_data.schema import Chat, TaskExample


def run(config: SFTConfig, inputs: dict[str, Path], out: StageFolder) -> dict[str, float]:
    """Fine-tune the policy on chats; returns the last logged metrics."""
    corpus, policy = inputs[config.corpus], qwen2_audio.located(inputs[config.policy])
    tuning = tuning_of(config)
    return supervised.train(
        tuning.load(policy),
        qwen2_audio.load_processor(policy),
        _rows(config, corpus),
        corpus,
        out,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        save_steps=config.save_steps,
        seed=config.seed,
        augmentation=Augmentation(**config.augment.model_dump()),
        tuning=tuning,
        base=policy,
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
        _chat_row(chats[index]) if source == 0 else _target_row(targets[index], config.dialect)
        for source, index in drawn
    ]


def _chat_row(chat: Chat) -> Row:
    messages = []
    for number, turn in enumerate(chat.turns):
        messages += [user(turn.question, len(chat.audios) if number == 0 else 0), assistant(turn.answer)]
    return {"messages": messages, "prompt": None, "completion": None, "audios": list(chat.audios)}


def _target_row(target: TaskExample, dialect: Dialect) -> Row:
    prompt = pretraining_prompt(target.task, len(target.audios), dialect)
    return {"messages": None, "prompt": prompt, "completion": target.text, "audios": list(target.audios)}

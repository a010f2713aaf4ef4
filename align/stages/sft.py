"""Supervised fine-tuning on multi-turn chats about clips; loss on the assistant's tokens only.

Differs from Qwen2-Audio's stage 2 (arXiv:2407.10759): pre-training targets can be mixed in (`replay`),
without which a small model forgets to transcribe. Reads: policy, corpus. Writes: model/, metrics.jsonl.
    align run recipes/demo --only 2_sft
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from trl import SFTConfig as TRLConfig

from align.artifacts import StageFolder
from align.config import SFTConfig
from align.models import qwen2_audio
from align.models.chat import assistant, user
from align.models.features import ClipFeatures
from align.training.arguments import arguments
from align.training.augment import Augmentation
from align.training.collate import SFTCollator
from align.training.fit import fit
from align.training.order import mixed
from align.training.trainers import AudioSFTTrainer
from preference_data import store
from preference_data.prompts import pretraining_prompt
from preference_data.schema import Chat, Transcript


def run(config: SFTConfig, inputs: dict[str, Path], out: StageFolder) -> dict[str, float]:
    """Fine-tune the policy on chats; returns the last logged metrics."""
    corpus, policy = inputs[config.corpus], qwen2_audio.located(inputs[config.policy])
    processor = qwen2_audio.load_processor(policy)
    trainer = AudioSFTTrainer(
        model=qwen2_audio.load_model(policy),
        args=TRLConfig(
            **arguments(
                out.path,
                steps=config.steps,
                batch_size=config.batch_size,
                learning_rate=config.learning_rate,
                save_steps=config.save_steps,
                seed=config.seed,
                passed_on={"train_sampling_strategy": "sequential", **config.trl},
            )
        ),
        train_dataset=_dataset(config, corpus),
        data_collator=SFTCollator(
            processor, ClipFeatures(processor, corpus), Augmentation(**config.augment.model_dump())
        ),
        processing_class=processor,
    )
    metrics = fit(trainer, out)
    qwen2_audio.save(trainer.model, processor, out.path / "model")
    return metrics


def _dataset(config: SFTConfig, corpus: Path) -> Dataset:
    chats = store.read(corpus / "sft.jsonl", Chat)
    targets = store.read(corpus / "pretrain.jsonl", Transcript)
    drawn = mixed(
        [len(chats), len(targets)],
        [1 - config.replay, config.replay],
        config.steps * config.batch_size,
        np.random.default_rng(config.seed),
    )
    rows = [
        _chat_row(chats[index]) if source == 0 else _target_row(targets[index], config.dialect)
        for source, index in drawn
    ]
    return Dataset.from_list([{**row, "draw": draw} for draw, row in enumerate(rows)])


def _chat_row(chat: Chat) -> dict[str, Any]:
    messages = []
    for number, turn in enumerate(chat.turns):
        messages += [user(turn.question, len(chat.audios) if number == 0 else 0), assistant(turn.answer)]
    return {"messages": messages, "prompt": None, "completion": None, "audios": list(chat.audios)}


def _target_row(target: Transcript, dialect: Any) -> dict[str, Any]:
    prompt = pretraining_prompt(target.task, len(target.audios), dialect)
    return {"messages": None, "prompt": prompt, "completion": target.text, "audios": list(target.audios)}

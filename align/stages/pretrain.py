"""Multi-task pre-training: audio and a task prompt in, text out (Qwen2-Audio, arXiv:2407.10759, stage 1).

Differs from the paper: starts from random weights instead of Whisper and Qwen, and can order clips by
a curriculum. Reads: corpus. Writes: model/ (safetensors, processor), metrics.jsonl.
    align run recipes/demo --only 1_pretrain
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from align.artifacts import StageFolder
from align.config import Lesson, PretrainConfig
from align.models import qwen2_audio
from align.stages.tuning import tuning_of
from align.training import supervised
from align.training.augment import Augmentation
from align.training.collate import Row
from align.training.order import passes
from preference_data import store
from preference_data.phrasebook import Phrasebook
from preference_data.prompts import TASKS, pretraining_prompt
from preference_data.schema import AudioClip, Facts, TaskExample


def run(config: PretrainConfig, inputs: dict[str, Path], out: StageFolder) -> dict[str, float]:
    """Train from random weights; returns the last logged metrics."""
    corpus = inputs[config.corpus]
    processor = _processor(config, Phrasebook.load(corpus / "phrasebook.yaml"))
    shape = config.model
    model = qwen2_audio.build_model(
        processor,
        d_model=shape.d_model,
        heads=shape.heads,
        audio_layers=shape.audio_layers,
        text_layers=shape.text_layers,
        seed=config.seed,
    )
    metrics = supervised.train(
        model,
        processor,
        _rows(config, corpus),
        corpus,
        out,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        save_steps=config.save_steps,
        seed=config.seed,
        augmentation=Augmentation(**config.augment.model_dump()),
        tuning=tuning_of(config),
        base=None,
        passed_on=config.trl,
    )
    return {"parameters": float(model.num_parameters()), **metrics}


def _processor(config: PretrainConfig, phrasebook: Phrasebook) -> qwen2_audio.Qwen2AudioProcessor:
    chat = ["system\nYou are a helpful assistant.\n", "user\nAudio 1: \nAudio 2: \n", "assistant\n"]
    texts = [*phrasebook.texts(), *chat, *(task.sentence for task in TASKS.values())]
    return qwen2_audio.build_processor(
        texts * 20,  # repeated so that BPE merges every word into one token
        vocab_size=config.model.vocab_size,
        mel_bins=config.model.mel_bins,
        hop_length=config.model.hop_length,
        clip_s=config.model.clip_s,
    )


def _rows(config: PretrainConfig, corpus: Path) -> list[Row]:
    examples = store.read(corpus / "pretrain.jsonl", TaskExample)
    clips = store.stream(corpus / "clips.jsonl", AudioClip)
    facts = {clip.path: clip.facts for clip in clips if clip.split == "train"}
    rows = []
    for index in _order(config, [facts[one.audios[0]] for one in examples]):
        one = examples[index]
        prompt = pretraining_prompt(one.task, len(one.audios), config.dialect)
        rows.append({"prompt": prompt, "completion": one.text, "audios": list(one.audios)})
    return rows


def _order(config: PretrainConfig, facts: list[Facts]) -> list[int]:
    """Indices of examples for every step: the lessons' clips first, then all."""
    rng = np.random.default_rng(config.seed)
    order: list[int] = []
    for lesson in config.curriculum:
        order += passes(_matching(lesson, facts), lesson.steps * config.batch_size, rng)
    rest = config.steps * config.batch_size - len(order)
    return order[: config.steps * config.batch_size] + passes(range(len(facts)), max(0, rest), rng)


def _matching(lesson: Lesson, facts: list[Facts]) -> list[int]:
    return [i for i, known in enumerate(facts) if known.get(lesson.slot) in lesson.values]

"""Does an answer need its clip? How much hearing it, instead of silence, raises the answer's probability.

An answer that is as likely without the clip teaches to answer without listening.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import Qwen2AudioForConditionalGeneration

from align.run_folder.artifacts import Interrupted, read_json, stop_requested, write_json
from align.training import ranks
from align.training.collate import Row, SFTCollator
from align.training.device import listening, own_device

CHUNK = 64
"""Rows whose effects are saved together."""


@torch.no_grad()
def audio_effects(
    model: Qwen2AudioForConditionalGeneration, collator: SFTCollator, rows: Sequence[Row]
) -> list[float]:
    """Mean over each row's answer tokens of log p(token | clips) - log p(token | as long a silence), in nats.

    A row without clips has the effect 0.
    """
    made = collator([{**row, "draw": 0} for row in rows])
    heard = {name: value.to(model.device) for name, value in made.items()}
    if "input_features" not in heard:
        return [0.0] * len(rows)
    silence = torch.as_tensor(_silence(collator)).to(heard["input_features"])
    unheard = {**heard, "input_features": silence.expand_as(heard["input_features"])}
    effects = answer_logps(model, heard) - answer_logps(model, unheard)
    return [float(effect) if row["audios"] else 0.0 for row, effect in zip(rows, effects, strict=True)]


def answer_logps(model: Qwen2AudioForConditionalGeneration, batch: dict[str, Tensor]) -> Tensor:
    """Mean log-probability (B,) of the labelled tokens of each row of an SFT batch.

    Only labelled positions go through the head: over 150,000 words it is what costs memory.
    """
    labels = batch["labels"][:, 1:]
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    hidden = model.model(**inputs, use_cache=False).last_hidden_state[:, :-1]
    is_answer = labels != -100
    logps = torch.zeros(labels.shape, device=labels.device)
    chosen = model.lm_head(hidden[is_answer]).float().log_softmax(-1)
    logps[is_answer] = chosen.gather(-1, labels[is_answer][:, None]).squeeze(-1)
    return logps.sum(-1) / is_answer.sum(-1).clamp(min=1)


def _silence(collator: SFTCollator) -> np.ndarray:
    """Features (M, F) of no sound."""
    extractor = collator.processor.feature_extractor
    wave = np.zeros(extractor.n_samples, dtype=np.float32)
    made = extractor([wave], sampling_rate=extractor.sampling_rate, padding="max_length")
    return np.asarray(made["input_features"][0], dtype=np.float32)


def saved_effects(
    model: Qwen2AudioForConditionalGeneration,
    collator: SFTCollator,
    rows: Sequence[Row],
    folder: Path,
    batch_size: int,
    on_progress: Callable[[int], object] | None = None,
) -> list[float]:
    """`audio_effects` of many rows, kept in `folder` chunk by chunk: a killed run goes on where it was.

    Several ranks share the chunks and the folder; each needs the whole model, so before DeepSpeed divides it.

    Raises:
        Interrupted: a stop was requested; whole chunks are kept.
    """
    starts = range(0, len(rows), CHUNK)
    paths = [folder / f"{number:06}.json" for number in range(len(starts))]
    with listening(model, own_device()):
        for first in range(0, len(starts), ranks.world_size()):
            if ranks.any_says(stop_requested.is_set()):
                raise Interrupted
            number = first + ranks.rank()
            if number < len(starts) and not paths[number].exists():
                chunk = rows[starts[number] : starts[number] + CHUNK]
                parts = [chunk[i : i + batch_size] for i in range(0, len(chunk), batch_size)]
                found = [effect for part in parts for effect in audio_effects(model, collator, part)]
                write_json(paths[number], found)
            if on_progress:
                on_progress(min((first + ranks.world_size()) * CHUNK, len(rows)))
    ranks.barrier()
    return [effect for path in paths for effect in read_json(path)]

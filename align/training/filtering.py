"""Chats that SFT leaves out, counted by reason and listed by id, and the audio effect by which some are.

The audio effect is how much a clip, instead of silence, raises the completion's probability. A completion
that is as likely without the clip teaches to answer without listening.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from math import nan
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import Qwen2AudioForConditionalGeneration

from align.models.answer_head import is_completion
from align.models.scoring import completion_logps
from align.run_folder.artifacts import (
    Interrupted,
    StageFolder,
    read_json,
    read_kept,
    stop_requested,
    write_json,
)
from align.training import processes
from align.training.collate import Row, SFTCollator
from align.training.processes import eval_mode, local_device
from preference_data.audio.clip_files import BadAudio
from preference_data.dataset.filters import Limits, review
from preference_data.schema import Chat
from preference_data.store import write_rows

CHUNK = 64
"""Rows whose effects are saved together."""
Effects = Callable[[Sequence[Chat]], Sequence[float]]
"""The audio effect of each chat, in nats per token."""


class Kept(NamedTuple):
    """Numbers of the chats that stay, in order, and the counts of all by reason, for the metrics."""

    numbers: list[int]
    counts: dict[str, float]


def keep(
    chats: Sequence[Chat],
    limits: Limits,
    out: StageFolder,
    min_audio_effect: float | None = None,
    effects: Effects | None = None,
) -> Kept:
    """Review all chats; those left out are listed in `left_out.jsonl`. All ranks get the same result.

    With `min_audio_effect`, `effects` are computed of the chats with clips that pass the rest.

    Raises:
        ValueError: none is left.
    """
    reasons: list[str | None] = list(review(chats, limits))
    if min_audio_effect is not None and effects is not None:
        numbers = [i for i, chat in enumerate(chats) if reasons[i] is None and chat.audios]
        for i, effect in zip(numbers, effects([chats[i] for i in numbers]), strict=True):
            if effect < min_audio_effect:
                reasons[i] = "needs_no_audio"
    left_out = [(chat.id, reason) for chat, reason in zip(chats, reasons, strict=True) if reason]
    if processes.is_first():
        write_rows(out.path / "left_out.jsonl", [{"id": name, "reason": reason} for name, reason in left_out])
    by_reason = Counter(reason for _, reason in left_out)
    if len(left_out) == len(chats):
        raise ValueError(f"filters leave none of {len(chats)} chats: {dict(by_reason)}; loosen them")
    counts = {f"left_out_{reason}": float(n) for reason, n in sorted(by_reason.items())}
    numbers = [i for i, reason in enumerate(reasons) if reason is None]
    return Kept(numbers, {"chats": float(len(chats)), "chats_kept": float(len(numbers)), **counts})


# -------------------------------------------------------------------------- audio effect


def audio_effects(
    model: Qwen2AudioForConditionalGeneration, collator: SFTCollator, rows: Sequence[Row]
) -> list[float]:
    """Mean over each row's completion tokens of log p(token | clips) - log p(token | silence), in nats.

    The silence is as long as the clips. The model is packed if the collator is. A row without clips has the
    effect 0, one with a clip that cannot be read NaN: it stays, and gives way when its turn comes.
    """
    try:
        batch = collator([{**row, "draw": 0} for row in rows])
    except BadAudio:
        if len(rows) == 1:
            return [nan]
        return [effect for row in rows for effect in audio_effects(model, collator, [row])]
    if "input_features" not in batch:
        return [0.0] * len(rows)
    features = batch["input_features"]
    silence = _silence(collator, features.shape[-1]).to(features).expand_as(features)
    effects = mean_logps(model, batch) - mean_logps(model, {**batch, "input_features": silence})
    return [float(effect) if row["audios"] else 0.0 for row, effect in zip(rows, effects, strict=True)]


def mean_logps(model: Qwen2AudioForConditionalGeneration, batch: Mapping[str, Any]) -> Tensor:
    """Mean log-probability (B,) of each row's completion tokens."""
    n_tokens = is_completion(batch)[:, 1:].sum(-1).clamp(min=1)
    return completion_logps(model, batch).sum(-1).cpu() / n_tokens


def _silence(collator: SFTCollator, n_frames: int) -> Tensor:
    """Features (M, F) of silence."""
    extractor = collator.processor.feature_extractor
    wave = np.zeros(extractor.n_samples, dtype=np.float32)
    features = extractor([wave], sampling_rate=extractor.sampling_rate, padding="max_length")
    return torch.as_tensor(features["input_features"][0])[:, :n_frames]


def saved_effects(
    model: Qwen2AudioForConditionalGeneration,
    collator: SFTCollator,
    rows: Sequence[Row],
    folder: Path,
    batch_size: int,
    on_progress: Callable[[int], object] | None = None,
) -> list[float]:
    """`audio_effects` of many rows, kept in `folder` chunk by chunk: a killed run goes on from there.

    Several ranks share the chunks and the folder; each needs the whole model, so before DeepSpeed divides it.

    Raises:
        Interrupted: a stop was requested; whole chunks are kept.
    """
    starts = range(0, len(rows), CHUNK)
    paths = [folder / f"{number:06}.json" for number in range(len(starts))]
    with eval_mode(model, local_device()):
        for first in range(0, len(starts), processes.world_size()):
            if processes.any_rank(stop_requested.is_set()):
                raise Interrupted
            number = first + processes.rank()
            if number < len(starts) and read_kept(paths[number], list) is None:
                chunk = rows[starts[number] : starts[number] + CHUNK]
                parts = [chunk[i : i + batch_size] for i in range(0, len(chunk), batch_size)]
                effects = [effect for part in parts for effect in audio_effects(model, collator, part)]
                write_json(paths[number], effects)
            if on_progress:
                on_progress(min((first + processes.world_size()) * CHUNK, len(rows)))
    processes.barrier()
    return [effect for path in paths for effect in read_json(path, list)]

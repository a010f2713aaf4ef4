"""Parts of random weights that `assemble` takes in the place of a released one, in transformers' folders.

A small Qwen2 learns to read what a released Whisper hears, on a laptop; a Whisper encoder of a released
one's shape is the control that says how much of a result is due to what the released one has learned.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2ForCausalLM,
    WhisperConfig,
    WhisperFeatureExtractor,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from align.models import shards
from align.models.qwen2_audio.model import small_qwen2, wake_audio_tower


def write_whisper(
    folder: Path, *, d_model: int, heads: int, layers: int, mel_bins: int, clip_s: int, seed: int
) -> None:
    """Write an encoder with Whisper's layers, positions and features, which hears `clip_s` seconds.

    It is normalised as Whisper's is; convolutions are those that let the signal through.
    """
    extractor = WhisperFeatureExtractor(feature_size=mel_bins, chunk_length=clip_s)
    config = WhisperConfig(
        num_mel_bins=mel_bins,
        d_model=d_model,
        encoder_layers=layers,
        encoder_attention_heads=heads,
        encoder_ffn_dim=4 * d_model,
        max_source_positions=extractor.nb_max_frames // 2,
        init_std=_spread(d_model),
    )
    torch.manual_seed(seed)
    encoder = WhisperEncoder(config)
    wake_audio_tower(encoder)
    folder.mkdir(parents=True, exist_ok=True)
    shards.write(((f"model.encoder.{name}", weight) for name, weight in encoder.state_dict().items()), folder)
    config.save_pretrained(folder)
    extractor.save_pretrained(folder)


def write_qwen2(
    folder: Path, tokenizer: PreTrainedTokenizerFast, *, d_model: int, heads: int, layers: int, seed: int
) -> None:
    """Write a Qwen2 that has the tokenizer's words."""
    config = small_qwen2(tokenizer, d_model=d_model, heads=heads, layers=layers, spread=_spread(d_model))
    torch.manual_seed(seed)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _spread(d_model: int) -> float:
    """Standard deviation of weights: transformers' 0.02 is for widths of thousands, 0.06 works at 128."""
    return 0.06 * math.sqrt(128 / d_model)

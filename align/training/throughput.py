"""How fast training is: examples, tokens and seconds of audio per second, in every logged row.

Over all processes, since the last row. Tokens are those of the rows, padding aside; audio is what they hear,
a clip of both answers of a pair twice. The first row of a process counts its warming up.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from preference_data.audio.decode import SAMPLE_RATE

_FRAMES_PER_TOKEN = 4
"""Convolution by 2, then pooling by 2."""


class Throughput(Trainer):
    """Mixin for a Trainer with a Qwen2AudioProcessor."""

    _counted: Tensor | None = None
    """Examples, tokens and audio tokens since the last row."""
    _counted_since = 0.0

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """One forward and backward; counts what went in."""
        if self._counted is None:
            self._counted, self._counted_since = torch.zeros(3, dtype=torch.float64), time.monotonic()
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        n_audio = (ids == self.processing_class.tokenizer.convert_tokens_to_ids("<|AUDIO|>")).sum().item()
        examples = len(inputs["pair_weight"]) if "pair_weight" in inputs else len(ids)
        self._counted += torch.tensor([examples, mask.sum().item(), n_audio], dtype=torch.float64)
        loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add `examples_per_s`, `tokens_per_s` and `audio_s_per_s` to a row about training."""
        if "loss" in logs and self._counted is not None:
            seconds = time.monotonic() - self._counted_since
            everywhere = self.accelerator.reduce(self._counted.to(self.args.device), reduction="sum")
            examples, tokens, n_audio = (everywhere / seconds).tolist()
            s_per_token = _FRAMES_PER_TOKEN * self.processing_class.feature_extractor.hop_length / SAMPLE_RATE
            logs |= {
                "examples_per_s": examples,
                "tokens_per_s": tokens,
                "audio_s_per_s": n_audio * s_per_token,
            }
            self._counted = None
        super().log(logs, *args, **kwargs)

"""A reward model's scalar as a reward."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device

from align.models.chat import encode_prompt, encode_untrusted, join, user
from align.models.features import Clip, ClipFeatures
from align.models.qwen2_audio import reward_model
from align.models.qwen2_audio.clips import expand_clips, pack_audio
from align.models.qwen2_audio.model import load_processor
from align.models.qwen2_audio.packed import pack_for_inference
from align.models.scoring import batches_within
from align.models.shards import weights_sha256
from align.rewards.reward import BadReward, Parts
from preference_data.prompts.prompts import BadExample, refuse_control
from preference_data.schema import Prompt

_MAX_TOKENS = 16_384
"""Packed tokens that go through the model at a time."""


class RewardModelReward:
    """What a saved reward model says of a completion of a prompt about its clips, any real number."""

    def __init__(self, model: Path, corpus: Path, weight: float = 1.0) -> None:
        """A reward model's folder, and below which folder the clips are.

        Raises:
            ValueError: the folder holds no reward model.
        """
        self.weights = {"model": weight}
        self._sha256 = weights_sha256(model)
        self._processor = load_processor(model)
        self._clips = ClipFeatures(self._processor, corpus)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = pack_for_inference(reward_model.load_model(model)).to(self._device).eval()

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Refuse a prompt that holds a token that steers the model."""
        for prompt in prompts:
            try:
                refuse_control(prompt.id, prompt.question)
            except BadExample as error:
                raise BadReward(f"reward.model: {error}") from None

    @torch.no_grad()
    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> Parts:
        """Equal completions of a prompt are scored once, and completions of one prompt together."""
        keys = [
            (prompt.audios, prompt.question, text) for prompt, text in zip(prompts, completions, strict=True)
        ]
        distinct = sorted(set(keys))
        rewards: list[float] = []
        for batch in batches_within(self._collate, distinct, _MAX_TOKENS):
            rewards += (
                self._model(**send_to_device(batch, self._device), use_cache=False).logits[:, 0].tolist()
            )
        of_key = dict(zip(distinct, rewards, strict=True))
        return {"model": [of_key[key] for key in keys]}

    def _collate(self, rows: Sequence[tuple[tuple[str, ...], str, str]]) -> dict[str, Any]:
        clips = self._clips.per_row([audios for audios, _, _ in rows])
        ids = [
            torch.tensor(self._encode(question, text, own))
            for (_, question, text), own in zip(rows, clips, strict=True)
        ]
        width = max(map(len, ids))
        mask = torch.stack([torch.arange(width) < len(row) for row in ids]).long()
        return {"attention_mask": mask, **pack_audio(self._processor, ids, clips)}

    def _encode(self, question: str, text: str, clips: Sequence[Clip]) -> list[int]:
        prompt = encode_prompt(self._processor, [user(question, len(clips))])
        return join(expand_clips(self._processor, prompt, clips), encode_untrusted(self._processor, text)).ids

    def identity(self) -> dict[str, Any]:
        """With the sha256 of the weights."""
        return {"kind": "reward_model", "weights_sha256": self._sha256, "weights": dict(self.weights)}

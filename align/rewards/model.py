"""A reward model's scalar as a reward."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device

from align.models.chat import as_messages, encode_prompt, encode_untrusted, join
from align.models.features import Clip, ClipFeatures
from align.models.qwen2_audio import reward_model
from align.models.qwen2_audio.clips import expand_clips, pack_audio
from align.models.qwen2_audio.model import load_processor
from align.models.qwen2_audio.packed import keep_tower_outputs, pack_for_inference
from align.models.scoring import batches_within
from align.models.shards import weights_sha256
from align.rewards.reward import BadReward, Parts
from preference_data.prompts.prompts import BadExample, refuse_control, texts_of
from preference_data.schema import Prompt

_MAX_TOKENS = 16_384
"""Packed tokens that go through the model at a time."""


class RewardModelReward:
    """What a saved reward model says of a completion of a prompt about its clips, any real number."""

    def __init__(self, model: Path, corpus: Path, weight: float = 1.0, run: Path | None = None) -> None:
        """A reward model's folder, and below which folder the clips are.

        What its audio tower gives is kept in the folder of a `run`.

        Raises:
            ValueError: the folder holds no reward model.
        """
        self.weights = {"model": weight}
        self._sha256 = weights_sha256(model)
        self._processor = load_processor(model)
        self._clips = ClipFeatures(self._processor, corpus)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = pack_for_inference(reward_model.load_model(model)).to(self._device).eval()
        self._kept = keep_tower_outputs(self._model, run)

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Refuse a prompt that holds a token that steers the model."""
        for prompt in prompts:
            try:
                refuse_control(prompt.id, *texts_of(prompt))
            except BadExample as error:
                raise BadReward(f"reward.model: {error}") from None

    @torch.no_grad()
    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> Parts:
        """Equal completions of a prompt are scored once, and completions of one prompt together."""
        keys = [(_key(prompt), text) for prompt, text in zip(prompts, completions, strict=True)]
        prompt_of = {key: prompt for (key, _), prompt in zip(keys, prompts, strict=True)}
        distinct = sorted(set(keys))
        rewards: list[float] = []
        scored = [(prompt_of[key], text) for key, text in distinct]
        for batch in batches_within(self._collate, scored, _MAX_TOKENS):
            rewards += (
                self._model(**send_to_device(batch, self._device), use_cache=False).logits[:, 0].tolist()
            )
        of_key = dict(zip(distinct, rewards, strict=True))
        return {"model": [of_key[key] for key in keys]}

    def _collate(self, rows: Sequence[tuple[Prompt, str]]) -> dict[str, Any]:
        clips = self._clips.per_row([prompt.audios for prompt, _ in rows], self._kept)
        ids = [
            torch.tensor(self._encode(prompt, text, own))
            for (prompt, text), own in zip(rows, clips, strict=True)
        ]
        width = max(map(len, ids))
        mask = torch.stack([torch.arange(width) < len(row) for row in ids]).long()
        return {"attention_mask": mask, **pack_audio(self._processor, ids, clips)}

    def _encode(self, prompt: Prompt, text: str, clips: Sequence[Clip]) -> list[int]:
        encoded = encode_prompt(self._processor, as_messages(prompt.messages))
        return join(
            expand_clips(self._processor, encoded, clips), encode_untrusted(self._processor, text)
        ).ids

    def identity(self) -> dict[str, Any]:
        """With the sha256 of the weights."""
        return {"kind": "reward_model", "weights_sha256": self._sha256, "weights": dict(self.weights)}


def _key(prompt: Prompt) -> tuple[Any, ...]:
    """All that the model reads of a prompt, such that it can be sorted."""
    earlier = [(turn.question, turn.answer, turn.audios) for turn in prompt.history]
    return prompt.audios, prompt.question, prompt.system or "", tuple(earlier)

"""A policy answers questions about clips, in batches of a fixed make-up.

Each batch draws from its own seed, so that its completions do not depend on which batches ran before,
in which process, or whether the run was killed in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from align.models.chat import Encoded, encode_prompt, encode_text, expand_audio, user
from align.models.features import Clip, ClipFeatures, stack
from align.models.qwen2_audio import model as qwen2_audio
from align.models.qwen2_audio.clips import n_audio_tokens
from preference_data.schema import stable_id


class Request(NamedTuple):
    """A question with its clips. A `plain` text is continued as it stands, without a chat around it."""

    text: str
    audios: tuple[str, ...]
    plain: bool = False


class Decoding(NamedTuple):
    """How to draw completions; `temperature` 0 is greedy."""

    max_new_tokens: int = 32
    temperature: float = 0.0
    top_p: float = 1.0
    completions: int = 1


class Sampler:
    """A loaded policy that completes batches of requests."""

    def __init__(
        self,
        policy: Path | str,
        audio_root: Path,
        *,
        model: qwen2_audio.Qwen2AudioForConditionalGeneration | None = None,
        features: ClipFeatures | None = None,
    ) -> None:
        self.processor = qwen2_audio.load_processor(policy)
        self.model = model if model is not None else qwen2_audio.load_model(policy)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model.to(self.device).eval()
        self.features = features or ClipFeatures(self.processor, audio_root)

    @torch.no_grad()
    def complete(self, requests: Sequence[Request], how: Decoding, seed: int) -> list[list[str]]:
        """`how.completions` texts per request."""
        batch = self._batch(requests)
        torch.manual_seed(seed)
        drawing: dict[str, Any] = {"do_sample": False}
        if how.temperature > 0:
            drawing = {"do_sample": True, "temperature": how.temperature, "top_p": how.top_p, "top_k": 0}
        tokens = self.model.generate(
            **batch, **drawing, max_new_tokens=how.max_new_tokens, num_return_sequences=how.completions
        )
        answers = tokens[:, batch["input_ids"].shape[1] :]
        k = how.completions
        return [
            [self._decode(row, request) for row in answers[i * k : (i + 1) * k]]
            for i, request in enumerate(requests)
        ]

    def _decode(self, tokens: Tensor, request: Request) -> str:
        """The text of an answer. Of a plain text tags are part, such as Qwen-Audio's time stamps."""
        tokenizer = self.processor.tokenizer
        if request.plain:
            ends = torch.tensor([tokenizer.eos_token_id, tokenizer.pad_token_id], device=tokens.device)
            tokens = tokens[~torch.isin(tokens, ends)]
        return str(tokenizer.decode(tokens, skip_special_tokens=not request.plain)).strip()

    def _batch(self, requests: Sequence[Request]) -> dict[str, Tensor]:
        """Left-padded input_ids and attention_mask (B, T) with the features of all clips."""
        clips = self.features.per_row([request.audios for request in requests])
        rows = [self._encode(request, own).ids for request, own in zip(requests, clips, strict=True)]
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), self.processor.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, width - len(row) :] = torch.tensor(row)
            mask[i, width - len(row) :] = 1
        inputs = {"input_ids": ids, "attention_mask": mask, **stack([c for own in clips for c in own])}
        return {name: tensor.to(self.device) for name, tensor in inputs.items()}

    def _encode(self, request: Request, clips: Sequence[Clip]) -> Encoded:
        encoded = (
            encode_text(self.processor, request.text)
            if request.plain
            else encode_prompt(self.processor, [user(request.text, len(request.audios))])
        )
        audio_id = self.processor.tokenizer.convert_tokens_to_ids("<|AUDIO|>")
        return expand_audio(encoded, [n_audio_tokens(clip.n_frames) for clip in clips], audio_id)


def batches(requests: Sequence[Request], size: int) -> list[Sequence[Request]]:
    """Requests in order, `size` at a time."""
    return [requests[i : i + size] for i in range(0, len(requests), size)]


def batch_seed(seed: int, number: int) -> int:
    """The seed of batch `number`: the same wherever and whenever it runs."""
    return int(stable_id(seed, number)[:8], 16)


def complete_all(
    sampler: Sampler,
    requests: Sequence[Request],
    how: Decoding,
    *,
    seed: int,
    batch_size: int,
    on_progress: Callable[[int], None] | None = None,
) -> list[list[str]]:
    """All requests through one sampler."""
    texts: list[list[str]] = []
    for number, batch in enumerate(batches(requests, batch_size)):
        texts += sampler.complete(batch, how, batch_seed(seed, number))
        if on_progress:
            on_progress(len(texts))
    return texts


def flatten(groups: Iterable[Sequence[str]]) -> list[str]:
    """The first completion of each request."""
    return [group[0] for group in groups]

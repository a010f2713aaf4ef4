"""Completions from transformers in this process: every clip encoded once, every prompt prefilled once.

The prompts of a batch are packed as training packs them (`align/kernels/README.md`): distinct clips on their
true length, what prompts share computed once, no padding. The keys and values of the packed row are then laid
out as rows, one for each completion, and decoded together.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor

from align.generation.decoding import NextTokens, decode, draw_tokens, stop_tokens, uniforms
from align.generation.engine import Completion, Decoding, Request, completion_text
from align.models.chat import Encoded, encode_prompt, encode_text
from align.models.features import Clip, ClipFeatures
from align.models.qwen2_audio.clips import expand_clips, pack_audio
from align.models.qwen2_audio.model import load_model, load_processor
from align.models.qwen2_audio.packed import keep_tower_outputs, pack_for_inference
from align.models.tower_outputs import TowerOutputs


class LiveEngine:
    """Completes with a packed Qwen2-Audio as it is in this process, such as one that is being trained.

    Args:
        model: with the packed backbone; in eval mode where it completes.
        processor: of the model.
        clips: where requests' clips are looked up; may be set later.
        tower_outputs: outputs of the model's tower, as long as that is frozen.
    """

    def __init__(
        self,
        model: Qwen2AudioForConditionalGeneration,
        processor: Qwen2AudioProcessor,
        clips: ClipFeatures,
        tower_outputs: TowerOutputs | None = None,
    ) -> None:
        self.model, self.processor, self.clips, self.tower_outputs = model, processor, clips, tower_outputs
        self.stops = stop_tokens(model, processor.tokenizer)

    def complete(
        self, numbered: Mapping[int, Request], decoding: Decoding, seed: int
    ) -> Iterator[tuple[int, list[Completion]]]:
        """All requests as one batch: callers divide, see `complete_all`."""
        requests, k = list(numbered.values()), decoding.completions
        if not requests:
            return
        draws = uniforms(decoding, seed, list(numbered))
        decoded = self._decode(requests, decoding, draws)
        for i, (number, request) in enumerate(numbered.items()):
            group = decoded[i * k : (i + 1) * k]
            yield (
                number,
                [
                    Completion(completion_text(self.processor.tokenizer, ids, request), ids, logps)
                    for ids, logps in group
                ],
            )

    @torch.no_grad()
    def _decode(
        self, requests: Sequence[Request], decoding: Decoding, draws: np.ndarray | None
    ) -> list[tuple[list[int], list[float]]]:
        """Tokens and their log-probabilities, R = requests x completions rows of them."""
        rows, clips = self._rows(requests)
        start = self._prefill(rows, clips, decoding.completions)
        return decode(*start, self._step, decoding, draws, self.stops)

    @torch.no_grad()
    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        clips: Sequence[Sequence[Clip]],
        decoding: Decoding,
        draws: np.ndarray | None,
    ) -> Generator[NextTokens, Collection[int] | None, None]:
        """The next token of each prompt's completion, step by step: the tokens that `complete` would return.

        Args:
            prompts: token ids, <|AUDIO|> repeated as often as each clip has vectors; a row each.
            clips: of each prompt.
            decoding: with a single completion.
            draws: `uniforms`, a row for each prompt.
        """
        start = self._prefill(prompts, clips, completions=1)
        yield from draw_tokens(*start, self._step, decoding, draws, self.stops)

    def _prefill(
        self, prompts: Sequence[Sequence[int]], clips: Sequence[Sequence[Clip]], completions: int
    ) -> tuple[Tensor, DynamicCache, Tensor]:
        """Logits (R, V) after the prompts, their cache and mask (R, T); R = prompts x completions."""
        batch = pack_audio(self.processor, prompts, clips)
        packed, lengths = batch["packed"].to(self.model.device), [len(row) for row in prompts]
        states, cache = self.model.model.prefill(packed, batch.get("input_features"))
        last = packed.index[torch.arange(len(prompts)), torch.tensor(lengths) - 1]
        logits = self.model.lm_head(states[last])
        places, mask = _left_padded(packed.index, lengths)
        _lay_out(cache, places.repeat_interleave(completions, 0))
        return logits.repeat_interleave(completions, 0), cache, mask.repeat_interleave(completions, 0)

    def _step(self, tokens: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:
        """Logits (R, V) after one more token (R, 1) each."""
        padded = None if bool(mask.all()) else mask[:, None, None, :]
        states = self.model.model.language_model(
            input_ids=tokens,
            attention_mask={"full_attention": padded},
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        logits: Tensor = self.model.lm_head(states[:, -1])
        return logits

    def _rows(self, requests: Sequence[Request]) -> tuple[list[list[int]], list[list[Clip]]]:
        """The prompts' token ids, and the features of their clips."""
        clips = self.clips.per_row([request.audios for request in requests], self.tower_outputs)
        return [self.encode(request, own).ids for request, own in zip(requests, clips, strict=True)], clips

    def encode(self, request: Request, clips: Sequence[Clip]) -> Encoded:
        """Tokens of a prompt, <|AUDIO|> repeated as often as each clip has vectors."""
        encoded = (
            encode_text(self.processor, request.text)
            if request.plain
            else encode_prompt(self.processor, request.messages)
        )
        return expand_clips(self.processor, encoded, clips)


class TransformersEngine(LiveEngine):
    """A Qwen2-Audio of its own on this process' device.

    Args:
        policy: folder of a saved model, or a Hub id.
        clips: where requests' clips are looked up; may be set later.
        run: folder of a run, where the outputs of policies' towers are kept; None keeps none.

    Raises:
        ValueError: the language model has sliding-window layers.
    """

    def __init__(self, policy: Path | str, clips: ClipFeatures, run: Path | None = None) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.run = run
        model = pack_for_inference(load_model(policy)).to(self.device).eval()
        super().__init__(model, load_processor(policy), clips, keep_tower_outputs(model, run))

    def load(self, policy: Path | str) -> None:
        """Complete as `policy` from now on: the same shape, other weights. The old ones stay if it fails."""
        self.model.load_state_dict(load_model(policy).state_dict())
        self.tower_outputs = keep_tower_outputs(self.model, self.run)

    def close(self) -> None:
        """Free the model's memory."""
        del self.model
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _left_padded(index: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Places (P, T) of prompts in the packed row, moved to the right end, and which of them are tokens."""
    width = index.shape[1]
    shift = width - torch.tensor(lengths, device=index.device)[:, None]
    column = torch.arange(width, device=index.device)[None] - shift
    mask = column >= 0
    return index.gather(1, column.clamp(min=0)) * mask, mask


def _lay_out(cache: DynamicCache, places: Tensor) -> None:
    """Turn keys and values (1, H, L, D) of the packed row into those of rows, (R, H, T, D), in place."""
    for layer in cache.layers:
        layer.keys = layer.keys[0][:, places].transpose(0, 1)
        layer.values = layer.values[0][:, places].transpose(0, 1)

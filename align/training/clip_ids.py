"""How rows of plain token ids carry their audio: each of a clip's tokens is an id that names the clip.

TRL's GRPO pads, shuffles, splits and joins prompts' and completions' ids and hands a model nothing else. So
while ids are in its hands, the <|AUDIO|> tokens of clip c are the id V + c, V being the size of the
vocabulary. Whatever becomes of the rows' order, each still says which clips it is about. Nothing is
remembered between calls. Shapes: N rows, T tokens of the longest, padded on either side.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from align.models.packing import PackedBatch
from align.training.collate import SFTCollator, audio_inputs


class ClipIds:
    """Clips by number.

    Args:
        collator: knows the processor, the clips' features, and whether batches are packed.
        paths: of all clips, the same list in all processes.
        vocabulary: size of the model's embedding table.
    """

    def __init__(self, collator: SFTCollator, paths: Sequence[str], vocabulary: int) -> None:
        self.collator, self.vocabulary = collator, vocabulary
        self.audio_id: int = collator.processor.tokenizer.convert_tokens_to_ids("<|AUDIO|>")
        self._paths = list(paths)
        self._numbers = {path: number for number, path in enumerate(self._paths)}

    def name(self, ids: Sequence[int], audios: Sequence[str]) -> list[int]:
        """A prompt's ids with names in place of <|AUDIO|>; other tokens stand between two clips."""
        named, clips, before = [], iter(audios), -1
        for token in ids:
            if token == self.audio_id and before != self.audio_id:
                name = self.vocabulary + self._numbers[next(clips)]
            named.append(name if token == self.audio_id else token)
            before = token
        return named

    def batch(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Any]:
        """What a model reads of rows (N, T) with named clips: ids, mask, and the clips."""
        is_token = attention_mask.cpu() == 1
        named = [ids[mask] for ids, mask in zip(input_ids.cpu(), is_token, strict=True)]
        plain = [ids.where(ids < self.vocabulary, self.audio_id) for ids in named]
        paths = [self._clips(ids) for ids in named]
        clips = self.collator.features.per_row(paths, self.collator.tower_outputs)
        audio = audio_inputs(self.collator.processor, plain, clips, self.collator.packed)
        if (packed := audio.get("packed")) is not None:
            audio["packed"] = _placed(packed, is_token, [len(ids) for ids in plain])
        return {
            "input_ids": input_ids.where(input_ids < self.vocabulary, self.audio_id),
            "attention_mask": attention_mask,
            **{name: value.to(input_ids.device) for name, value in audio.items()},
        }

    def _clips(self, ids: Tensor) -> list[str]:
        """Paths of a row's clips in order, one for each run of a name; a clip may come twice."""
        begins = (ids >= self.vocabulary) & (ids != torch.cat([ids.new_tensor([-1]), ids[:-1]]))
        return [self._paths[name - self.vocabulary] for name in ids[begins].tolist()]


def _placed(packed: PackedBatch, is_token: Tensor, lengths: Sequence[int]) -> PackedBatch:
    """The packed batch of rows whose tokens are not at their beginning: padded on the left, say."""
    index = torch.zeros(is_token.shape, dtype=torch.long)
    index[is_token] = torch.cat([row[:n] for row, n in zip(packed.index, lengths, strict=True)])
    return dataclasses.replace(packed, index=index)

"""Dataset rows -> padded tensors, for SFT and for preference pairs.

Rows hold text and clip paths; tokens and features are made here, batch by batch. Shapes: B rows,
T tokens, C clips, M mel bins, F frames.

For a model with the packed backbone (`packed`) a batch holds each distinct clip once, no longer than it
is, and how its rows are packed; else what the stock model wants: a clip per use, padded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Qwen2AudioProcessor

from align.models.chat import (
    Encoded,
    encode_chat,
    encode_completion,
    encode_prompt,
    encode_text,
    expand_audio,
    join,
    user,
)
from align.models.features import Clip, ClipFeatures, stack
from align.models.qwen2_audio.clips import n_audio_tokens, pack_rows, stack_unpadded
from align.training.augment import Augmentation, SpecAugment, augment, mask

Row = dict[str, Any]
MODEL_INPUTS = ("input_ids", "attention_mask", "input_features", "feature_attention_mask", "packed")
"""What of a batch a model reads; the rest is for losses and logs."""


@dataclass
class SFTCollator:
    """Rows of chats (`messages`) or plain texts (`prompt`, `completion`), each with `audios`.

    Gives input_ids, attention_mask, labels (B, T; -100 but on the answer) and the clips (see `_audio`).
    A row's features are augmented by its `draw` number alone.
    """

    processor: Qwen2AudioProcessor
    features: ClipFeatures
    augmentation: Augmentation | SpecAugment = field(default_factory=Augmentation)
    packed: bool = False

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Collate rows, see the class."""
        ids, labels, clips = [], [], []
        for row, own in zip(rows, self.features.per_row([row["audios"] for row in rows]), strict=True):
            encoded = _expand(self.processor, encode_row(self.processor, row), own)
            ids.append(torch.tensor(encoded.ids))
            mask = torch.tensor(encoded.mask)
            labels.append(torch.where(mask == 1, ids[-1], -100))
            clips.append([self._augment(clip, row["draw"]) for clip in own])
        return {
            **_pad(self.processor, ids),
            "labels": _right_pad(labels, -100),
            **_audio(self.processor, ids, clips, self.packed),
        }

    def _augment(self, clip: Clip, draw: int) -> Clip:
        if self.augmentation == Augmentation():
            return clip
        if isinstance(self.augmentation, SpecAugment):
            return clip._replace(mel=mask(clip.mel, clip.n_frames, self.augmentation, draw))
        padded = clip.padded()  # masks fall anywhere in it, whatever of it is used
        return padded._replace(mel=augment(padded.mel, self.augmentation, draw))


def labelled(batch: Mapping[str, Any]) -> Tensor:
    """Which tokens (B, T) of a batch, of either collator, the loss is on."""
    mask: Tensor = batch["labels"] != -100 if "labels" in batch else batch["completion_mask"] == 1
    return mask


def encode_row(processor: Qwen2AudioProcessor, row: Row) -> Encoded:
    """A chat or a plain text with its completion; each clip is one token still."""
    if row.get("messages") is not None:
        return encode_chat(processor, row["messages"])
    return join(encode_text(processor, row["prompt"]), encode_completion(processor, row["completion"]))


@dataclass
class PreferenceCollator:
    """Rows `question, chosen, rejected, audios, weight` -> the [chosen; rejected] batch that TRL's DPO reads.

    Gives input_ids, attention_mask, completion_mask (2B, T), the clips (see `_audio`), pair_weight (B,),
    and the reference's log-probs (B,) where TRL has added them to the rows.
    """

    processor: Qwen2AudioProcessor
    features: ClipFeatures
    packed: bool = False

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Collate rows, see the class."""
        clips = self.features.per_row([row["audios"] for row in rows])
        prompts = [
            _expand(self.processor, encode_prompt(self.processor, [user(row["question"], len(own))]), own)
            for row, own in zip(rows, clips, strict=True)
        ]
        both = [
            join(prompt, encode_completion(self.processor, row[side]))
            for side in ("chosen", "rejected")
            for prompt, row in zip(prompts, rows, strict=True)
        ]
        ids = [torch.tensor(encoded.ids) for encoded in both]
        batch = {
            **_pad(self.processor, ids),
            "completion_mask": _right_pad([torch.tensor(encoded.mask) for encoded in both], 0),
            **_audio(self.processor, ids, clips + clips, self.packed),
            "pair_weight": torch.tensor([row["weight"] for row in rows]),
        }
        for name in ("ref_chosen_logps", "ref_rejected_logps"):
            if name in rows[0]:
                batch[name] = torch.tensor([row[name] for row in rows])
        return batch


def _audio(
    processor: Qwen2AudioProcessor, ids: Sequence[Tensor], clips: Sequence[Sequence[Clip]], packed: bool
) -> dict[str, Any]:
    """Audio inputs of rows `ids`, each with its clips.

    Stock: input_features (C, M, F), a clip per use, and feature_attention_mask (C, F). Packed: each distinct
    clip once, and `packed`. Clips are the same where they are one object, as `ClipFeatures` hands them out.
    """
    used = [clip for own in clips for clip in own]
    if not packed:
        return dict(stack(used))
    distinct = list({id(clip.mel): clip for clip in used}.values())
    number = {id(clip.mel): i for i, clip in enumerate(distinct)}
    row_clips = [[number[id(clip.mel)] for clip in own] for own in clips]
    audio_id = processor.tokenizer.convert_tokens_to_ids("<|AUDIO|>")
    return {
        **stack_unpadded(distinct),
        "packed": pack_rows(ids, row_clips, [clip.n_frames for clip in distinct], audio_id),
    }


def _expand(processor: Qwen2AudioProcessor, encoded: Encoded, clips: Sequence[Clip]) -> Encoded:
    audio_id = processor.tokenizer.convert_tokens_to_ids("<|AUDIO|>")
    return expand_audio(encoded, [n_audio_tokens(clip.n_frames) for clip in clips], audio_id)


def _right_pad(rows: Sequence[Tensor], value: int) -> Tensor:
    return pad_sequence(list(rows), batch_first=True, padding_value=value)


def _pad(processor: Qwen2AudioProcessor, ids: Sequence[Tensor]) -> dict[str, Tensor]:
    return {
        "input_ids": _right_pad(ids, processor.tokenizer.pad_token_id),
        "attention_mask": _right_pad([torch.ones_like(row) for row in ids], 0),
    }

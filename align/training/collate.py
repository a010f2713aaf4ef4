"""Records -> rows -> batches of tensors, for SFT, for preference pairs and for labels.

Rows hold text and clip paths; tokens and features are computed here, batch by batch. Shapes: B rows,
T tokens, C clips, M mel bins, F frames.

For a model with the packed backbone (`packed`) a batch holds each distinct clip once, unpadded, and how its
rows are packed; for the stock model a clip per use, padded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Qwen2AudioProcessor

from align.generation.engine import Request, request_of
from align.models.chat import (
    Encoded,
    Message,
    as_messages,
    assistant,
    encode_chat,
    encode_completion,
    encode_prompt,
    encode_text,
    join,
    system,
    user,
)
from align.models.features import Clip, ClipFeatures, stack
from align.models.qwen2_audio.clips import expand_clips, pack_audio
from align.models.tower_outputs import TowerOutputs
from align.training.augmentation import Augmentation, SpecAugment, augment, mask
from preference_data import store
from preference_data.preferences.pairs import weigh
from preference_data.prompts.prompts import PromptFormat, prompt_of, refuse_control, target_of, texts_of
from preference_data.schema import (
    Axis,
    Chat,
    Label,
    PreferencePair,
    Prompt,
    TaskExample,
    conversation,
)

Row = dict[str, Any]

# -------------------------------------------------------------------------- rows


def task_row(example: TaskExample, prompt_format: PromptFormat) -> Row:
    """A pre-training example: a prompt in the prompt format and its target, without a chat around them.

    Raises:
        BadExample: the example does not have what its task needs.
    """
    prompt, target = prompt_of(example, prompt_format), target_of(example)
    texts = {"messages": None, "prompt": prompt, "completion": target}
    return {"id": example.id, **texts, "audios": list(example.audios)}


def chat_row(chat: Chat) -> Row:
    """A chat: each turn's clips stand before its text, numbered through the chat ("Audio 1: ...").

    A turn without text is voice chat; a chat without clips is plain text.

    Raises:
        BadExample: a text holds a token that steers the model.
    """
    refuse_control(chat.id, chat.system or "")
    messages = system(chat.system)
    for turn, clips in zip(chat.turns, chat.audios_per_turn, strict=True):
        refuse_control(chat.id, turn.question, turn.answer)
        messages += [user(turn.question, len(clips)), assistant(turn.answer)]
    texts = {"messages": messages, "prompt": None, "completion": None}
    return {"id": chat.id, **texts, "audios": list(chat.audios)}


def pair_row(pair: PreferencePair, weight: float) -> Row:
    """A preference pair about clips, after its conversation; its loss counts `weight` times.

    Raises:
        BadExample: a text holds a token that steers the model.
    """
    refuse_control(pair.id, *texts_of(pair), pair.chosen, pair.rejected)
    texts = {"prompt": pair.question, "chosen": pair.chosen, "rejected": pair.rejected}
    own = {"id": pair.id, "system": pair.system, "history": pair.history}
    return {**own, **texts, "audios": list(pair.audios), "weight": weight}


def pair_rows(pairs: Path, objective: Mapping[Axis, float]) -> list[Row]:
    """Of a folder's pairs those that an objective prefers, weighted by it.

    Raises:
        ValueError: there are none.
        BadExample: see `pair_row`.
    """
    weighted = weigh(store.read(pairs / "pairs.jsonl", PreferencePair), objective)
    if not weighted:
        raise ValueError(f"{pairs} holds no pair that objective {objective} prefers: nothing to learn")
    return [pair_row(pair, weight) for pair, weight in weighted]


def label_row(label: Label) -> Row:
    """A completion that is good or bad on its own, after its conversation; its loss counts `weight` times.

    Raises:
        BadExample: a text holds a token that steers the model.
    """
    messages = as_messages(label.prompt)
    refuse_control(label.id, *(message.text for message in label.prompt), label.completion)
    verdict = {"label": label.label, "weight": label.weight}
    text = {"id": label.id, "messages": messages, "completion": label.completion}
    return {**text, "audios": list(label.audios), **verdict}


def prompt_row(prompt: Prompt, kind: str) -> Row:
    """A prompt to complete in training, with its reference as completion; `kind` groups rewards.

    Raises:
        BadExample: a text holds a token that steers the model.
    """
    refuse_control(prompt.id, *texts_of(prompt), prompt.answer_gt)
    messages = as_messages(prompt.messages)
    own = {"record": prompt, "request": request_of(prompt), "kind": kind}
    row = {"id": prompt.id, "messages": messages, "prompt": None, "completion": prompt.answer_gt}
    return {**row, "audios": list(prompt.audios), **own}


def target_row(example: TaskExample, prompt_format: PromptFormat) -> Row:
    """The same of a pre-training example, whose target is the reference.

    Raises:
        BadExample: the example does not have what its task needs.
    """
    row = task_row(example, prompt_format)
    record = Prompt(
        id=example.id,
        audios=example.audios,
        question=row["prompt"],
        answer_gt=row["completion"],
        meta_info="",
        task_name=example.task,
    )
    request = Request(row["prompt"], example.audios, plain=True)
    return {**row, "record": record, "request": request, "kind": example.task}


def encode_row(processor: Qwen2AudioProcessor, row: Row) -> Encoded:
    """Tokens of a chat, or of a conversation or plain text with its completion; a clip is still one token."""
    if row.get("messages") is None:
        prompt = encode_text(processor, row["prompt"])
    elif row.get("completion") is None:
        return encode_chat(processor, row["messages"])
    else:
        prompt = encode_prompt(processor, row["messages"])
    return join(prompt, encode_completion(processor, row["completion"]))


def encode_pair(processor: Qwen2AudioProcessor, row: Row) -> tuple[Encoded, Encoded]:
    """Tokens of a preference pair's prompt with its chosen and its rejected; each clip is still one token."""
    prompt = encode_prompt(processor, _prompt(row))
    completions = encode_completion(processor, row["chosen"]), encode_completion(processor, row["rejected"])
    return join(prompt, completions[0]), join(prompt, completions[1])


# -------------------------------------------------------------------------- batches


@dataclass
class SFTCollator:
    """Rows of chats (`messages`) or plain texts (`prompt`, `completion`), each with `audios`.

    Gives input_ids, attention_mask, labels (B, T; -100 but on completions) and the clips (`audio_inputs`).
    A row's features are augmented by its `draw` number alone. `tower_outputs` of a frozen tower are for
    packed batches of clips as they are.
    """

    processor: Qwen2AudioProcessor
    features: ClipFeatures
    augmentation: Augmentation | SpecAugment = field(default_factory=Augmentation)
    packed: bool = False
    tower_outputs: TowerOutputs | None = None

    def __post_init__(self) -> None:
        if self.tower_outputs is not None and self.augmentation != Augmentation():
            raise ValueError("outputs of the tower are kept of clips as they are, not of augmented ones")

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Collate rows, see the class."""
        ids, labels, clips = [], [], []
        heard = self.features.per_row([row["audios"] for row in rows], self.tower_outputs)
        for row, own in zip(rows, heard, strict=True):
            encoded = expand_clips(self.processor, encode_row(self.processor, row), own)
            ids.append(torch.tensor(encoded.ids))
            mask = torch.tensor(encoded.mask)
            labels.append(torch.where(mask == 1, ids[-1], -100))
            clips.append([self._augment(clip, row) for clip in own])
        return {
            **_pad(self.processor, ids),
            "labels": _right_pad(labels, -100),
            **audio_inputs(self.processor, ids, clips, self.packed),
        }

    def _augment(self, clip: Clip, row: Row) -> Clip:
        if self.augmentation == Augmentation():
            return clip
        draw = row["draw"]
        if isinstance(self.augmentation, SpecAugment):
            return clip._replace(mel=mask(clip.mel, clip.n_frames, self.augmentation, draw))
        return clip._replace(mel=augment(clip.mel, clip.n_frames, self.augmentation, draw))


@dataclass
class PreferenceCollator:
    """Rows of `pair_row` -> [chosen; rejected], as TRL's DPO reads it.

    Gives input_ids, attention_mask, completion_mask (2B, T), the clips (`audio_inputs`), pair_weight (B,),
    and the reference's log-probs (B,) where the rows have them.
    """

    processor: Qwen2AudioProcessor
    features: ClipFeatures
    packed: bool = False
    tower_outputs: TowerOutputs | None = None

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Collate rows, see the class."""
        clips = self.features.per_row([row["audios"] for row in rows], self.tower_outputs)
        prompts = _prompts(self.processor, [_prompt(row) for row in rows], clips)
        completions = [row[side] for side in ("chosen", "rejected") for row in rows]
        return {
            **_completed(self.processor, prompts * 2, completions, clips * 2, self.packed),
            "pair_weight": torch.tensor([row["weight"] for row in rows]),
            **_columns(rows, "ref_chosen_logps", "ref_rejected_logps"),
        }


@dataclass
class LabelCollator:
    """Rows `messages, completion, audios, label, weight` -> a batch for `AudioKTOTrainer`.

    Gives input_ids, attention_mask, completion_mask (N, T), or (2N, T) `with_kl`: then N rows with the same
    prompts follow, whose completions are `mismatched`. Also the clips (`audio_inputs`), label and weight
    (N,), and the reference's log-probs (N,) where the rows have them.
    """

    processor: Qwen2AudioProcessor
    features: ClipFeatures
    packed: bool = False
    with_kl: bool = True
    tower_outputs: TowerOutputs | None = None

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Collate rows, see the class."""
        clips = self.features.per_row([row["audios"] for row in rows], self.tower_outputs)
        prompts = _prompts(self.processor, [row["messages"] for row in rows], clips)
        completions = [row["completion"] for row in rows]
        if self.with_kl:
            prompts, clips = prompts * 2, clips * 2
            completions += mismatched(completions)
        return {
            **_completed(self.processor, prompts, completions, clips, self.packed),
            **_columns(rows, "label", "weight", "ref_logps", "ref_KL_logps"),
        }


def mismatched(completions: Sequence[str]) -> list[str]:
    """For each row of a micro-batch the completion of the one before: TRL's rule for KTO's KL term."""
    return [*completions[-1:], *completions[:-1]]


def _prompts(
    processor: Qwen2AudioProcessor, chats: Sequence[list[Message]], clips: Sequence[Sequence[Clip]]
) -> list[Encoded]:
    """Chats up to where the assistant should speak."""
    return [
        expand_clips(processor, encode_prompt(processor, chat), own)
        for chat, own in zip(chats, clips, strict=True)
    ]


def _completed(
    processor: Qwen2AudioProcessor,
    prompts: Sequence[Encoded],
    completions: Sequence[str],
    clips: Sequence[Sequence[Clip]],
    packed: bool,
) -> dict[str, Any]:
    """Prompts with completions: input_ids, attention_mask, completion_mask (N, T), and the clips."""
    rows = [
        join(prompt, encode_completion(processor, completion))
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    ids = [torch.tensor(row.ids) for row in rows]
    return {
        **_pad(processor, ids),
        "completion_mask": _right_pad([torch.tensor(row.mask) for row in rows], 0),
        **audio_inputs(processor, ids, clips, packed),
    }


def _columns(rows: Sequence[Row], *names: str) -> dict[str, Tensor]:
    """The columns (N,) that the rows have."""
    return {name: torch.tensor([row[name] for row in rows]) for name in names if name in rows[0]}


def _prompt(row: Row) -> list[Message]:
    """The conversation of a preference pair's row."""
    earlier = row.get("system"), row.get("history", ())
    return as_messages(conversation(row["prompt"], tuple(row["audios"]), *earlier))


def audio_inputs(
    processor: Qwen2AudioProcessor, ids: Sequence[Tensor], clips: Sequence[Sequence[Clip]], packed: bool
) -> dict[str, Any]:
    """Audio inputs of rows `ids`, each with its clips.

    Stock: input_features (C, M, F), a clip per use, and feature_attention_mask (C, F). Packed: `pack_audio`.
    """
    if packed:
        return pack_audio(processor, ids, clips)
    return dict(stack([clip for own in clips for clip in own]))


def _right_pad(rows: Sequence[Tensor], value: int) -> Tensor:
    return pad_sequence(list(rows), batch_first=True, padding_value=value)


def _pad(processor: Qwen2AudioProcessor, ids: Sequence[Tensor]) -> dict[str, Tensor]:
    return {
        "input_ids": _right_pad(ids, processor.tokenizer.pad_token_id),
        "attention_mask": _right_pad([torch.ones_like(row) for row in ids], 0),
    }

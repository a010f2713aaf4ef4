"""Chats and prompts -> token ids, with one <|AUDIO|> token per 40 ms of each clip.

Ids equal those of the model's own processor on the same text and audio (tests compare them); going around
it lets a clip's features be computed once instead of once per appearance.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from preference_data import schema

Message = dict[str, Any]


class Encoded(NamedTuple):
    """Token ids (T,) and a mask (T,) that is 1 where the assistant speaks."""

    ids: list[int]
    mask: list[int]


def user(text: str, n_clips: int = 0) -> Message:
    """A user's message: clips first, then the text. Audio itself travels in a separate column."""
    parts: list[Message] = [{"type": "audio", "text": None} for _ in range(n_clips)]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def system(text: str | None) -> list[Message]:
    """The system prompt as a message; without one, the chat template adds the model's own."""
    return [{"role": "system", "content": [{"type": "text", "text": text}]}] if text else []


def assistant(text: str) -> Message:
    """An assistant's message."""
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def as_messages(records: Iterable[schema.Message]) -> list[Message]:
    """Messages of records as chat templates read them."""
    return [message.model_dump() for message in records]


def encode_chat(processor: ProcessorMixin, messages: Sequence[Message]) -> Encoded:
    """A whole chat; mask 1 on every assistant token including its end-of-turn."""
    encoded = processor.tokenizer.apply_chat_template(
        list(messages),
        chat_template=processor.chat_template,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    return Encoded(encoded["input_ids"], encoded["assistant_masks"])


def encode_prompt(processor: ProcessorMixin, messages: Sequence[Message]) -> Encoded:
    """A chat up to where the assistant should speak."""
    text = processor.tokenizer.apply_chat_template(
        list(messages), chat_template=processor.chat_template, tokenize=False, add_generation_prompt=True
    )
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    return Encoded(ids, [0] * len(ids))


def encode_completion(processor: ProcessorMixin, text: str) -> Encoded:
    """An answer with its end-of-turn, to stand after `encode_prompt` or a plain text."""
    whole = text + _end_of_turn(processor.tokenizer, processor.chat_template)
    ids = processor.tokenizer(whole, add_special_tokens=False)["input_ids"]
    return Encoded(ids, [1] * len(ids))


def encode_untrusted(processor: ProcessorMixin, text: str) -> Encoded:
    """`encode_completion` of text by whomever: tokens that steer a model are read as characters."""
    ids = processor.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    end = encode_completion(processor, "")
    return join(Encoded(ids, [1] * len(ids)), end)


@lru_cache(maxsize=8)
def _end_of_turn(tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    """The text that the chat template puts after an assistant's words, such as <|im_end|>."""
    encoded = tokenizer.apply_chat_template(
        [user("?"), assistant("")],
        chat_template=template,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    ids = [i for i, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mask]
    return str(tokenizer.decode(ids, skip_special_tokens=False))


def encode_text(processor: ProcessorMixin, text: str) -> Encoded:
    """Plain text without a chat around it, as in pre-training."""
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    return Encoded(ids, [0] * len(ids))


def join(first: Encoded, second: Encoded) -> Encoded:
    """Two stretches of tokens as one."""
    return Encoded(first.ids + second.ids, first.mask + second.mask)


def expand_audio(encoded: Encoded, n_tokens: Sequence[int], audio_token_id: int) -> Encoded:
    """Repeat each <|AUDIO|> as often as its clip has tokens.

    Raises:
        ValueError: the text has another number of clips than `n_tokens`.
    """
    if encoded.ids.count(audio_token_id) != len(n_tokens):
        raise ValueError(
            f"the text names {encoded.ids.count(audio_token_id)} clips but {len(n_tokens)} were given"
        )
    ids: list[int] = []
    mask: list[int] = []
    lengths = iter(n_tokens)
    for token, spoken in zip(encoded.ids, encoded.mask, strict=True):
        times = next(lengths) if token == audio_token_id else 1
        ids += [token] * times
        mask += [spoken] * times
    return Encoded(ids, mask)

"""What clients sent -> token ids, as training makes them. Clips are decoded in processes that may die."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from transformers import Qwen2AudioProcessor

from align.models.chat import Encoded, Message, encode_prompt, encode_text, expand_audio
from align.models.features import audible, n_frames
from align.models.qwen2_audio.clips import n_audio_tokens
from align.serving.errors import ApiError
from preference_data.audio.clip_files import BadAudio, ClipBytes
from preference_data.audio.decode import SAMPLE_RATE, DecoderPool

_DECODERS = 2


class Sound(NamedTuple):
    """A decoded clip: 16 kHz samples (S,), and the hash of the bytes that it came in."""

    sha256: str
    wave: np.ndarray

    @property
    def duration_s(self) -> float:
        """Seconds."""
        return len(self.wave) / SAMPLE_RATE


class EncodedPrompt(NamedTuple):
    """A prompt as token ids, clips expanded, and as what it was made of: messages, or a plain text."""

    ids: list[int]
    sounds: tuple[Sound, ...]
    messages: list[Message]
    text: str | None = None

    @property
    def is_plain(self) -> bool:
        """Whether a text is continued as it stands, without a chat around it."""
        return self.text is not None


def chat_prompt(
    processor: Qwen2AudioProcessor, messages: list[Message], sounds: Sequence[Sound]
) -> EncodedPrompt:
    """A conversation up to where the assistant should speak."""
    encoded = encode_prompt(processor, messages)
    return EncodedPrompt(_expanded(processor, encoded.ids, sounds), tuple(sounds), messages)


def plain_prompt(processor: Qwen2AudioProcessor, text: str, sounds: Sequence[Sound]) -> EncodedPrompt:
    """A text to be continued, as in pre-training."""
    encoded = encode_text(processor, text)
    return EncodedPrompt(_expanded(processor, encoded.ids, sounds), tuple(sounds), [], text)


def _expanded(processor: Qwen2AudioProcessor, ids: list[int], sounds: Sequence[Sound]) -> list[int]:
    audio_id = processor.tokenizer.convert_tokens_to_ids("<|AUDIO|>")
    n_tokens = [n_audio_tokens(n_frames(processor.feature_extractor, sound.wave)) for sound in sounds]
    return expand_audio(Encoded(ids, [0] * len(ids)), n_tokens, audio_id).ids


class ClipDecoder:
    """Decodes clips of strangers in processes of its own, which end with this one.

    Args:
        processor: of the model, which says how long a clip it hears.
        longest_s: clips that last longer, in seconds, are refused; as are those longer than the model hears.
    """

    def __init__(self, processor: Qwen2AudioProcessor, longest_s: float) -> None:
        self._extractor = processor.feature_extractor
        self.longest_s = min(longest_s, self._extractor.n_samples / SAMPLE_RATE)
        """Seconds; longer clips are refused."""
        self._pool = DecoderPool(_DECODERS, max_duration_s=self.longest_s)

    def decode(self, clip: ClipBytes) -> Sound:
        """The clip's samples; may be called from several threads.

        Raises:
            ApiError: naming where the clip stands and what is wrong with it.
        """
        try:
            wave = self._pool.load(clip._replace(name="clip"))
        except BadAudio as error:
            message = f"{clip.name}: the clip is refused: {error.code}: {error.detail}"
            raise ApiError(message, param=clip.name, code=error.code) from error
        return Sound(hashlib.sha256(clip.content).hexdigest(), audible(self._extractor, wave))

    def close(self) -> None:
        """End the processes."""
        self._pool.close()

"""A policy for the routes: requests become prompts, prompts become pieces of text."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import NamedTuple

from transformers import Qwen2AudioProcessor

from align.generation.engine import Decoding
from align.serving.answer_text import AnswerText
from align.serving.backend import Backend, CompletionFailed, EngineDied, Finish
from align.serving.errors import ApiError, unavailable
from align.serving.metrics import Metrics
from align.serving.prompts import ClipDecoder, EncodedPrompt, chat_prompt, plain_prompt
from align.serving.requests import (
    ChatRequest,
    Limits,
    TranscriptionRequest,
    check_text,
    read_chat,
    read_conversation,
    read_form,
    too_long,
)
from preference_data.prompts.prompts import AUDIO, PromptFormat, pretraining_prompt

log = logging.getLogger(__name__)
_BEAT_S = 1.0
"""How often it is looked whether a client still waits."""


class ClientLeft(Exception):
    """The client has closed the connection."""


class PendingAnswer(NamedTuple):
    """A prompt, and how the answer to it is to be drawn."""

    prompt: EncodedPrompt
    decoding: Decoding
    seed: int
    stops: tuple[str, ...] = ()


class Piece(NamedTuple):
    """A piece of an answer's text; the last one says why it ended, and how many tokens there were."""

    text: str
    finish: Finish | None = None
    n_tokens: int = 0


class Service:
    """A policy and all that its routes need.

    Args:
        processor: of the policy.
        backend: the engine.
        name: of the policy, for people.
        prompt_format: that the policy was pre-trained in; how it is asked for a transcript.
        limits: of requests.
    """

    def __init__(
        self,
        processor: Qwen2AudioProcessor,
        backend: Backend,
        *,
        name: str,
        prompt_format: PromptFormat,
        limits: Limits,
    ) -> None:
        self.backend, self.name, self.limits = backend, name, limits
        self.metrics = Metrics()
        self.created = int(time.time())
        self._processor, self._prompt_format = processor, prompt_format
        self._decoder = ClipDecoder(processor, limits.clip_s)

    @property
    def longest_clip_s(self) -> float:
        """Seconds; longer clips are refused."""
        return self._decoder.longest_s

    def close(self) -> None:
        """End the processes that decode clips."""
        self._decoder.close()

    # -------------------------------------------------------------------------- blocking: off the event loop

    def read_chat(self, body: bytes) -> tuple[ChatRequest, PendingAnswer]:
        """A chat as a prompt, its clips decoded; raises ApiError."""
        request = read_chat(body)
        conversation = read_conversation(request, self.limits)
        sounds = [self._decoder.decode(clip) for clip in conversation.clips]
        prompt = chat_prompt(self._processor, conversation.messages, sounds)
        wanted = request.max_completion_tokens or request.max_tokens
        temperature = 1.0 if request.temperature is None else request.temperature
        top_p = 1.0 if request.top_p is None else request.top_p
        decoding = self._decoding(prompt, wanted, temperature, top_p)
        seed = secrets.randbits(48) if request.seed is None else request.seed
        return request, PendingAnswer(prompt, decoding, seed, request.stops)

    def read_transcription(
        self, body: bytes, content_type: str
    ) -> tuple[TranscriptionRequest, PendingAnswer]:
        """A transcription's form as a prompt, its clip decoded; raises ApiError."""
        request, clip = read_form(body, content_type)
        sound = self._decoder.decode(clip)
        prompt = plain_prompt(self._processor, self._question(request), [sound])
        decoding = self._decoding(prompt, None, request.temperature, 1.0)
        return request, PendingAnswer(prompt, decoding, request.seed or 0)

    def _question(self, request: TranscriptionRequest) -> str:
        """As in pre-training; a prompt of the client's own stands for it."""
        if request.prompt:
            return AUDIO + check_text(request.prompt, "prompt")
        task = "transcribe_words" if request.wants_words else "transcribe"
        try:
            return pretraining_prompt(task, 1, self._prompt_format, audio_language=request.language or None)
        except ValueError as error:
            raise ApiError(f"language: {error}", param="language") from None

    def _decoding(
        self, prompt: EncodedPrompt, wanted: int | None, temperature: float, top_p: float
    ) -> Decoding:
        """How it is drawn, as many tokens as were wanted and as fit."""
        n, longest = len(prompt.ids), self.backend.longest
        if n >= longest:
            raise too_long(
                f"{n:,} tokens, {sum(sound.duration_s for sound in prompt.sounds):.1f} s of clips included; "
                f"the model takes {longest:,} with its answer"
            )
        if wanted is not None and wanted > self.limits.max_tokens:
            message = f"max_tokens: {wanted:,}, the limit is {self.limits.max_tokens:,}"
            raise ApiError(message, param="max_tokens")
        if wanted is not None and n + wanted > longest:
            raise too_long(f"{n:,} tokens and max_tokens {wanted:,}, the model takes {longest:,} together")
        most = min(wanted or self.limits.max_tokens, longest - n)
        return Decoding(most, temperature, top_p if temperature else 1.0)

    # -------------------------------------------------------------------------- answers

    async def pieces(self, answer: PendingAnswer) -> AsyncGenerator[Piece, None]:
        """The answer's text as it comes; the last piece has a finish reason.

        Raises:
            ApiError: the engine has died or has no memory.
        """
        text = AnswerText(self._processor.tokenizer, is_plain=answer.prompt.is_plain, stops=answer.stops)
        started, n = time.monotonic(), 0
        finish: Finish | None = None
        self.metrics.prompt_tokens.add(len(answer.prompt.ids))
        self.metrics.audio_seconds.add(sum(sound.duration_s for sound in answer.prompt.sounds))
        try:
            async with aclosing(self.backend.tokens(*answer[:3])) as drawn:
                async for step in drawn:
                    if not n:
                        self.metrics.first_token.observe(time.monotonic() - started)
                    n += len(step.tokens)
                    self.metrics.completion_tokens.add(len(step.tokens))
                    if piece := text.add(step.tokens):
                        yield Piece(piece)
                    finish = step.finish or finish
                    if text.is_stopped:
                        break
            if finish is None and not text.is_stopped:
                raise EngineDied("it ended in the middle of an answer")
        except EngineDied as error:
            self.metrics.failures.add()
            log.error("%s", error)
            raise unavailable("The engine has died: see /health, and start the server again") from error
        except CompletionFailed as error:
            self.metrics.failures.add()
            raise unavailable(f"Not completed: {error}") from error
        rest = text.finish()
        self.metrics.answer.observe(time.monotonic() - started)
        yield Piece(rest, "stop" if text.is_stopped else finish, n)

    async def whole(
        self, answer: PendingAnswer, has_left: Callable[[], Awaitable[bool]]
    ) -> tuple[str, Piece]:
        """The answer's whole text and its last piece; ends early where the client has left.

        Raises:
            ClientLeft: it has left.
        """
        texts, last, looked = [], Piece(""), time.monotonic()
        async with aclosing(self.pieces(answer)) as pieces:
            async for last in pieces:
                texts.append(last.text)
                if time.monotonic() - looked > _BEAT_S:
                    looked = time.monotonic()
                    if await has_left():
                        raise ClientLeft
        return "".join(texts), last

    def check_loaded(self) -> None:
        """Refuse before the policy is loaded, without reading the request."""
        if self.backend.is_loading:
            raise unavailable("The policy is still being loaded: try again soon")

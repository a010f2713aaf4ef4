"""The routes: OpenAI's chat completions, transcriptions and models; health and metrics.

Documentation pages that FastAPI would serve are off: they load scripts from elsewhere.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from typing import Any, NamedTuple

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp
from transformers import Qwen2AudioProcessor

from align.generation.engine import Decoding
from align.serving import metrics as prometheus
from align.serving.answer_text import AnswerText
from align.serving.backend import Backend, EngineDied, Finish, NotDrawn
from align.serving.errors import ApiError, unavailable
from align.serving.guard import Guard
from align.serving.metrics import Metrics
from align.serving.prompts import ClipDecoder, Prompt, chat_prompt, plain_prompt
from align.serving.requests import (
    MODEL,
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


class Left(Exception):
    """The client has closed the connection."""


class _Answer(NamedTuple):
    """A prompt and how its answer is drawn."""

    prompt: Prompt
    decoding: Decoding
    seed: int
    stops: tuple[str, ...] = ()


class _Piece(NamedTuple):
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

    def close(self) -> None:
        """End the processes that decode clips."""
        self._decoder.close()

    # -------------------------------------------------------------------------- blocking: off the event loop

    def read_chat(self, body: bytes) -> tuple[ChatRequest, _Answer]:
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
        return request, _Answer(prompt, decoding, seed, request.stops)

    def read_transcription(self, body: bytes, content_type: str) -> tuple[TranscriptionRequest, _Answer]:
        """A transcription's form as a prompt, its clip decoded; raises ApiError."""
        request, clip = read_form(body, content_type)
        sound = self._decoder.decode(clip)
        prompt = plain_prompt(self._processor, self._question(request), [sound])
        decoding = self._decoding(prompt, None, request.temperature, 1.0)
        return request, _Answer(prompt, decoding, request.seed or 0)

    def _question(self, request: TranscriptionRequest) -> str:
        """As in pre-training; a prompt of the client's own stands for it."""
        if request.prompt:
            return AUDIO + check_text(request.prompt, "prompt")
        try:
            return pretraining_prompt(
                "transcribe", 1, self._prompt_format, audio_language=request.language or None
            )
        except ValueError as error:
            raise ApiError(f"language: {error}", param="language") from None

    def _decoding(self, prompt: Prompt, wanted: int | None, temperature: float, top_p: float) -> Decoding:
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

    async def pieces(self, answer: _Answer) -> AsyncGenerator[_Piece, None]:
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
                        yield _Piece(piece)
                    finish = step.finish or finish
                    if text.is_stopped:
                        break
            if finish is None and not text.is_stopped:
                raise EngineDied("it ended in the middle of an answer")
        except EngineDied as error:
            self.metrics.failures.add()
            log.error("%s", error)
            raise unavailable("The engine has died: see /health, and start the server again") from error
        except NotDrawn as error:
            self.metrics.failures.add()
            raise unavailable(f"Not completed: {error}") from error
        rest = text.finish()
        self.metrics.answer.observe(time.monotonic() - started)
        yield _Piece(rest, "stop" if text.is_stopped else finish, n)

    async def whole(self, answer: _Answer, request: Request) -> tuple[str, _Piece]:
        """The answer's whole text and its last piece; ends early where the client leaves.

        Raises:
            Left: it has left.
        """
        texts, last, looked = [], _Piece(""), time.monotonic()
        async with aclosing(self.pieces(answer)) as pieces:
            async for last in pieces:
                texts.append(last.text)
                if time.monotonic() - looked > _BEAT_S:
                    looked = time.monotonic()
                    if await request.is_disconnected():
                        raise Left
        return "".join(texts), last

    async def check_ready(self) -> None:
        """Refuse where nothing can be drawn now."""
        health = await self.backend.health()
        if health.state == "loading":
            raise unavailable("The policy is still being loaded: try again soon")
        if health.state == "died":
            raise unavailable("The engine has died: see /health, and start the server again")


def make_app(service: Service, key: str) -> ASGIApp:
    """The application, behind its guard."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)

    @app.get("/health")
    async def health() -> JSONResponse:
        state, reason = await service.backend.health()
        content = {"status": state, "policy": service.name, **({"reason": reason[-1000:]} if reason else {})}
        return JSONResponse(content, 200 if state == "ready" else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        is_up = (await service.backend.health()).state == "ready"
        gauges = {
            "align_requests_in_flight": (
                "Requests under /v1 that are being answered.",
                lambda: service.metrics.in_flight,
            ),
            "align_engine_ready": ("1 where the engine answers.", lambda: is_up),
        }
        return Response(service.metrics.render(gauges), media_type=prometheus.CONTENT_TYPE)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(service)]}

    @app.get("/v1/models/{name}")
    async def model(name: str) -> dict[str, Any]:
        if name != MODEL:
            raise ApiError(f"The model {name[:100]!r} does not exist", 404, code="model_not_found")
        return _model(service)

    @app.post("/v1/chat/completions")
    async def chat(http: Request) -> Response:
        await service.check_ready()
        request, answer = await asyncio.to_thread(service.read_chat, await http.body())
        about = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": MODEL,
            "seed": answer.seed,
        }
        if request.stream:
            return await _streamed(service, request, answer, about)
        text, last = await service.whole(answer, http)
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "finish_reason": last.finish, "logprobs": None}
        usage = _usage(answer, last.n_tokens)
        return JSONResponse({**about, "object": "chat.completion", "choices": [choice], "usage": usage})

    @app.post("/v1/audio/transcriptions")
    async def transcribe(http: Request) -> Response:
        await service.check_ready()
        content_type = http.headers.get("content-type", "")
        request, answer = await asyncio.to_thread(service.read_transcription, await http.body(), content_type)
        if request.stream:
            return await _streamed_transcript(service, answer)
        text, last = await service.whole(answer, http)
        if request.response_format == "text":
            return PlainTextResponse(text + "\n")
        return JSONResponse({"text": text, "usage": _transcript_usage(answer, last.n_tokens)})

    @app.exception_handler(ApiError)
    async def refused(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ApiError)
        headers = {"retry-after": "5"} if error.status == 503 else None
        return JSONResponse(error.body, error.status, headers)

    @app.exception_handler(Left)
    async def left(_: Request, __: Exception) -> Response:
        return Response(status_code=499)

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        message = f"{error.detail}: {request.method} {request.url.path[:200]}"
        return JSONResponse(ApiError(message, error.status_code).body, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def failed(_: Request, __: Exception) -> JSONResponse:
        return JSONResponse(ApiError("The server failed", 500, kind="server_error").body, 500)

    return Guard(app, key, service.limits, service.metrics)


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": MODEL,
        "object": "model",
        "created": service.created,
        "owned_by": "align",
        "policy": service.name,
    }


def _usage(answer: _Answer, n_tokens: int) -> dict[str, int]:
    n = len(answer.prompt.ids)
    return {"prompt_tokens": n, "completion_tokens": n_tokens, "total_tokens": n + n_tokens}


def _transcript_usage(answer: _Answer, n_tokens: int) -> dict[str, Any]:
    usage = _usage(answer, n_tokens)
    return {
        "type": "tokens",
        "input_tokens": usage["prompt_tokens"],
        "output_tokens": n_tokens,
        "total_tokens": usage["total_tokens"],
    }


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"


async def _streamed(
    service: Service, request: ChatRequest, answer: _Answer, about: dict[str, Any]
) -> StreamingResponse:
    """A chat's answer as server-sent events."""
    with_usage = request.stream_options is not None and request.stream_options.include_usage
    common = {**about, "object": "chat.completion.chunk", **({"usage": None} if with_usage else {})}

    def chunk(delta: dict[str, Any], finish: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
        return _event({**common, "choices": [choice]})

    async def events(pieces: AsyncGenerator[_Piece, None]) -> AsyncGenerator[str, None]:
        yield chunk({"role": "assistant", "content": "", "refusal": None})
        async for piece in pieces:
            if piece.text:
                yield chunk({"content": piece.text})
            if piece.finish:
                yield chunk({}, piece.finish)
                if with_usage:
                    yield _event({**common, "choices": [], "usage": _usage(answer, piece.n_tokens)})
        yield "data: [DONE]\n\n"

    return await _event_stream(service, answer, events)


async def _streamed_transcript(service: Service, answer: _Answer) -> StreamingResponse:
    """A transcript as server-sent events."""

    async def events(pieces: AsyncGenerator[_Piece, None]) -> AsyncGenerator[str, None]:
        texts = []
        async for piece in pieces:
            texts.append(piece.text)
            if piece.text:
                yield _event({"type": "transcript.text.delta", "delta": piece.text})
            if piece.finish:
                usage = _transcript_usage(answer, piece.n_tokens)
                yield _event({"type": "transcript.text.done", "text": "".join(texts), "usage": usage})

    return await _event_stream(service, answer, events)


async def _event_stream(service: Service, answer: _Answer, events: Any) -> StreamingResponse:
    """Begins with the first piece, so that an engine that fails before it is an error and not a stream."""
    pieces = service.pieces(answer)
    first = await anext(pieces)

    async def all_pieces() -> AsyncGenerator[_Piece, None]:
        async with aclosing(pieces):
            yield first
            async for piece in pieces:
                yield piece

    async def guarded() -> AsyncGenerator[str, None]:
        async with aclosing(all_pieces()) as own, aclosing(events(own)) as texts:
            try:
                async for text in texts:
                    yield text
            except ApiError as error:
                with suppress(RuntimeError):
                    yield _event(error.body)

    headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
    return StreamingResponse(guarded(), media_type="text/event-stream", headers=headers)

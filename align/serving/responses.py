"""Responses in OpenAI's form: whole, and as server-sent events."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from fastapi.responses import StreamingResponse

from align.evaluation.benchmarks import srwt
from align.evaluation.benchmarks.wer import without_tags
from align.serving.errors import ApiError
from align.serving.requests import MODEL, ChatRequest, TranscriptionRequest
from align.serving.service import PendingAnswer, Piece, Service
from preference_data.prompts.time_stamps import SILENCE, stamp

Events = Callable[[AsyncGenerator[Piece, None]], AsyncGenerator[str, None]]
"""Writes the events of pieces as they come."""


def about_chat(answer: PendingAnswer) -> dict[str, Any]:
    """What a chat's answer and all its events have in common; the seed draws the same answer again."""
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "created": int(time.time()),
        "model": MODEL,
        "seed": answer.seed,
    }


def chat_completion(answer: PendingAnswer, text: str, last: Piece) -> dict[str, Any]:
    """A chat's whole answer."""
    message = {"role": "assistant", "content": text, "refusal": None}
    choice = {"index": 0, "message": message, "finish_reason": last.finish, "logprobs": None}
    usage = _usage(answer, last.n_tokens)
    return {**about_chat(answer), "object": "chat.completion", "choices": [choice], "usage": usage}


def transcript(
    request: TranscriptionRequest, answer: PendingAnswer, text: str, last: Piece
) -> dict[str, Any]:
    """A whole transcript; with the times of its words where they were asked for and came."""
    usage = _transcript_usage(answer, last.n_tokens)
    if request.response_format != "verbose_json":
        return {"text": text, "usage": usage}
    words = timed_words(text) if request.wants_words else None
    return {
        "task": "transcribe",
        "language": request.language or "en",
        "duration": answer.prompt.sounds[0].duration_s,
        "text": without_tags(text).strip() if request.wants_words else text,
        "words": words,
        "usage": usage,
    }


def timed_words(text: str) -> list[dict[str, Any]] | None:
    """Words with their times in seconds; None where the policy's stamps do not stand between words.

    The prompt ends with the first stamp, see `transcribe_words` in tasks.yaml. Pauses are left out.
    """
    stamped = srwt.parse(stamp(0) + text)
    if stamped is None:
        return None
    times = zip(stamped.words, stamped.times_s, stamped.times_s[1:], strict=False)
    return [
        {"word": word.strip(), "start": start, "end": end} for word, start, end in times if word != SILENCE
    ]


def _usage(answer: PendingAnswer, n_tokens: int) -> dict[str, int]:
    n = len(answer.prompt.ids)
    return {"prompt_tokens": n, "completion_tokens": n_tokens, "total_tokens": n + n_tokens}


def _transcript_usage(answer: PendingAnswer, n_tokens: int) -> dict[str, Any]:
    n = len(answer.prompt.ids)
    return {
        "type": "tokens",
        "input_tokens": n,
        "output_tokens": n_tokens,
        "total_tokens": n + n_tokens,
    }


def event(data: dict[str, Any]) -> str:
    """A server-sent event that holds JSON."""
    return f"data: {json.dumps(data)}\n\n"


async def stream_chat(service: Service, request: ChatRequest, answer: PendingAnswer) -> StreamingResponse:
    """A chat's answer as server-sent events."""
    with_usage = request.stream_options is not None and request.stream_options.include_usage
    common = {
        **about_chat(answer),
        "object": "chat.completion.chunk",
        **({"usage": None} if with_usage else {}),
    }

    def chunk(delta: dict[str, Any], finish: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
        return event({**common, "choices": [choice]})

    async def events(pieces: AsyncGenerator[Piece, None]) -> AsyncGenerator[str, None]:
        yield chunk({"role": "assistant", "content": "", "refusal": None})
        async for piece in pieces:
            if piece.text:
                yield chunk({"content": piece.text})
            if piece.finish:
                yield chunk({}, piece.finish)
                if with_usage:
                    yield event({**common, "choices": [], "usage": _usage(answer, piece.n_tokens)})
        yield "data: [DONE]\n\n"

    return await event_stream(service.pieces(answer), events)


async def stream_transcript(service: Service, answer: PendingAnswer) -> StreamingResponse:
    """A transcript as server-sent events."""

    async def events(pieces: AsyncGenerator[Piece, None]) -> AsyncGenerator[str, None]:
        texts = []
        async for piece in pieces:
            texts.append(piece.text)
            if piece.text:
                yield event({"type": "transcript.text.delta", "delta": piece.text})
            if piece.finish:
                usage = _transcript_usage(answer, piece.n_tokens)
                yield event({"type": "transcript.text.done", "text": "".join(texts), "usage": usage})

    return await event_stream(service.pieces(answer), events)


async def event_stream(pieces: AsyncGenerator[Piece, None], events: Events) -> StreamingResponse:
    """Pieces of an answer as server-sent events.

    Begins with the first piece, so that an engine that fails before it is an error and not a stream.
    """
    first = await anext(pieces)

    async def all_pieces() -> AsyncGenerator[Piece, None]:
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
                yield event(error.body)

    headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
    return StreamingResponse(guarded(), media_type="text/event-stream", headers=headers)

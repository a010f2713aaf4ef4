"""Answers as server-sent events, in OpenAI's form."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from fastapi.responses import StreamingResponse

from align.serving.errors import ApiError
from align.serving.requests import ChatRequest
from align.serving.service import Answer, Piece, Service

_Events = Callable[[AsyncGenerator[Piece, None]], AsyncGenerator[str, None]]


def usage_of(answer: Answer, n_tokens: int) -> dict[str, int]:
    """Tokens of a chat."""
    n = len(answer.prompt.ids)
    return {"prompt_tokens": n, "completion_tokens": n_tokens, "total_tokens": n + n_tokens}


def transcript_usage(answer: Answer, n_tokens: int) -> dict[str, Any]:
    """Tokens of a transcription, in the words that OpenAI has for them there."""
    usage = usage_of(answer, n_tokens)
    return {
        "type": "tokens",
        "input_tokens": usage["prompt_tokens"],
        "output_tokens": n_tokens,
        "total_tokens": usage["total_tokens"],
    }


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"


async def stream_chat(
    service: Service, request: ChatRequest, answer: Answer, about: dict[str, Any]
) -> StreamingResponse:
    """A chat's answer as server-sent events."""
    with_usage = request.stream_options is not None and request.stream_options.include_usage
    common = {**about, "object": "chat.completion.chunk", **({"usage": None} if with_usage else {})}

    def chunk(delta: dict[str, Any], finish: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
        return _event({**common, "choices": [choice]})

    async def events(pieces: AsyncGenerator[Piece, None]) -> AsyncGenerator[str, None]:
        yield chunk({"role": "assistant", "content": "", "refusal": None})
        async for piece in pieces:
            if piece.text:
                yield chunk({"content": piece.text})
            if piece.finish:
                yield chunk({}, piece.finish)
                if with_usage:
                    yield _event({**common, "choices": [], "usage": usage_of(answer, piece.n_tokens)})
        yield "data: [DONE]\n\n"

    return await _event_stream(service, answer, events)


async def stream_transcript(service: Service, answer: Answer) -> StreamingResponse:
    """A transcript as server-sent events."""

    async def events(pieces: AsyncGenerator[Piece, None]) -> AsyncGenerator[str, None]:
        texts = []
        async for piece in pieces:
            texts.append(piece.text)
            if piece.text:
                yield _event({"type": "transcript.text.delta", "delta": piece.text})
            if piece.finish:
                usage = transcript_usage(answer, piece.n_tokens)
                yield _event({"type": "transcript.text.done", "text": "".join(texts), "usage": usage})

    return await _event_stream(service, answer, events)


async def _event_stream(service: Service, answer: Answer, events: _Events) -> StreamingResponse:
    """Begins with the first piece, so that an engine that fails before it is an error and not a stream."""
    pieces = service.pieces(answer)
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
                yield _event(error.body)

    headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
    return StreamingResponse(guarded(), media_type="text/event-stream", headers=headers)

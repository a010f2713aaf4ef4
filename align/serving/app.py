"""The routes: OpenAI's chat completions, transcriptions and models; health and metrics.

Documentation pages that FastAPI would serve are off: they load scripts from elsewhere.
"""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from align.serving import metrics as prometheus
from align.serving.errors import ApiError
from align.serving.guard import Guard
from align.serving.requests import MODEL
from align.serving.responses import chat_completion, stream_chat, stream_transcript, transcript
from align.serving.service import ClientLeft, Service


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
            "align_requests_in_flight": ("Requests that are being answered.", service.metrics.in_flight),
            "align_engine_ready": ("1 where the engine answers.", is_up),
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
        service.check_loaded()
        request, answer = await asyncio.to_thread(service.read_chat, await http.body())
        if request.stream:
            return await stream_chat(service, request, answer)
        text, last = await service.whole(answer, http.is_disconnected)
        return JSONResponse(chat_completion(answer, text, last))

    @app.post("/v1/audio/transcriptions")
    async def transcribe(http: Request) -> Response:
        service.check_loaded()
        content_type = http.headers.get("content-type", "")
        request, answer = await asyncio.to_thread(service.read_transcription, await http.body(), content_type)
        if request.stream:
            return await stream_transcript(service, answer)
        text, last = await service.whole(answer, http.is_disconnected)
        if request.response_format == "text":
            return PlainTextResponse(text + "\n")
        return JSONResponse(transcript(request, answer, text, last))

    @app.exception_handler(ApiError)
    async def refused(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ApiError)
        headers = {"retry-after": "5"} if error.status == 503 else None
        return JSONResponse(error.body, error.status, headers)

    @app.exception_handler(ClientLeft)
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

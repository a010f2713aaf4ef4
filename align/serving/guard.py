"""What stands before the routes: key, size and requests at a time are checked before a body is read.

A body that is refused is not kept. It is read and thrown away for a moment, because a client that is still
sending would see a broken connection instead of the answer.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Collection
from contextlib import suppress
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from align.serving.errors import ApiError
from align.serving.metrics import Metrics
from align.serving.requests import Limits

ROUTES: Final = frozenset(
    ("/health", "/metrics", "/v1/models", "/v1/chat/completions", "/v1/audio/transcriptions")
)
OPEN: Final = frozenset(("/health", "/metrics"))
"""Routes that need no key: they hold states and counts."""
_LEFT = 499
"""The status that is counted where a client has left before it was answered (nginx's)."""
_LINGERS_S = 2.0
_BODY_WITHIN_S = 120.0


class Guard:
    """Lets requests pass to `app` with their whole body.

    Args:
        app: the routes.
        key: what clients must send as `Authorization: Bearer KEY`.
        limits: the size of a body, and requests at a time.
        metrics: where every answer is counted.
        open_routes: paths that need no key.
    """

    def __init__(
        self,
        app: ASGIApp,
        key: str,
        limits: Limits,
        metrics: Metrics,
        open_routes: Collection[str] = OPEN,
    ) -> None:
        self._app, self._limits, self._metrics, self._open = app, limits, metrics, open_routes
        self._key = b"Bearer " + key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """An ASGI application."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path, is_answered = scope["path"], False

        def count(status: int) -> None:
            route = path if path in ROUTES else "other"
            self._metrics.requests.add(route=route, status=str(status))

        async def counted(message: Message) -> None:
            nonlocal is_answered
            if message["type"] == "http.response.start":
                is_answered = True
                count(message["status"])
            await send(message)

        try:
            await (self._app if path in self._open else self._guarded)(scope, receive, counted)
        finally:
            if not is_answered:
                count(_LEFT)

    async def _guarded(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        try:
            self._check(headers)
            self._metrics.in_flight += 1
            try:
                body = await self._body(receive)
                if body is not None:
                    await self._app(scope, _replay(body, receive), send)
            finally:
                self._metrics.in_flight -= 1
        except ApiError as error:
            await _refuse(error, receive, send)

    def _check(self, headers: dict[bytes, bytes]) -> None:
        if not hmac.compare_digest(headers.get(b"authorization", b""), self._key):
            message = "Incorrect API key provided: send Authorization: Bearer with the server's key"
            raise ApiError(message, 401, code="invalid_api_key")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._limits.body_bytes:
            raise self._too_large(f"{int(length):,} bytes")
        if self._metrics.in_flight >= self._limits.in_flight:
            message = f"{self._limits.in_flight} requests are being answered, the limit: try again"
            raise ApiError(message, 429, kind="requests", code="rate_limit_exceeded")

    async def _body(self, receive: Receive) -> bytes | None:
        """The whole body; None where the client has left."""
        chunks, n = [], 0
        try:
            async with asyncio.timeout(_BODY_WITHIN_S):
                while (message := await receive())["type"] == "http.request":
                    chunks.append(message.get("body", b""))
                    n += len(chunks[-1])
                    if n > self._limits.body_bytes:
                        raise self._too_large("more")
                    if not message.get("more_body"):
                        return b"".join(chunks)
        except TimeoutError:
            raise ApiError(f"The body did not come within {_BODY_WITHIN_S:g} s", 408) from None
        return None

    def _too_large(self, size: str) -> ApiError:
        limit = f"{self._limits.body_bytes:,} bytes"
        return ApiError(f"The request has {size}, the limit is {limit}", 413, code="request_too_large")


def _replay(body: bytes, receive: Receive) -> Receive:
    """Gives the body once, then whatever comes."""
    given = False

    async def replayed() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed


async def _refuse(error: ApiError, receive: Receive, send: Send) -> None:
    content = error.encoded
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    if error.status in (408, 413):
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": content, "more_body": True})
    with suppress(TimeoutError):
        async with asyncio.timeout(_LINGERS_S):
            while (await receive()).get("more_body"):
                pass
    await send({"type": "http.response.body", "body": b""})

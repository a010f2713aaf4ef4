"""The ASGI app that faces the network: Argilla's, with what stands before it.

    /media/...           our own routes: clips and listening
    /api/v1/me           Argilla's answer, and the cookie that lets <audio> elements in
    POST /api/v1/token   Argilla's answer, unless the form is too long, and a cookie to know the browser by
    everything           headers that keep other sites, and scripts that are not the UI's own, out

Needs ARGILLA_HOME_PATH in the environment, as Argilla does; its search engine and Redis are set up elsewhere.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from argilla_server._app import app as argilla
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from . import sign_in, ui
from .listening import Listening
from .media import Media

NOT_A_PAGE = "default-src 'none'; frame-ancestors 'none'"
"""The policy of data. It also empties Argilla's /api/v1/docs, which would run scripts from a public CDN."""


class Front:
    """Routes a request to Argilla or to our own apps, and sets the headers of every answer."""

    def __init__(self, home: Path) -> None:
        """Serve the clips below `home`/media and keep `home`/listening.db."""
        pages = ui.folder(argilla)
        ui.add_scripts(pages)
        ui.remove_remote_fonts(pages)
        self._page_policy = ui.policy(pages)
        self._media = Media(home / "media", Listening(home / "listening.db"))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request; lifespan events are Argilla's alone."""
        if scope["type"] != "http":
            return await argilla(scope, receive, send)
        path: str = scope["path"]
        policy = NOT_A_PAGE if path.startswith(("/api/", "/media/")) else self._page_policy
        app = self._app(scope)
        if app is not self._media:
            scope = _without_range(scope)
        await app(scope, receive, _with_headers(send, policy))

    def _app(self, scope: Scope) -> ASGIApp:
        path: str = scope["path"]
        if path == "/media" or path.startswith("/media/"):
            return self._media
        if _is_odd(path):
            return PlainTextResponse("No such page.", 404)
        if path == "/api/v1/token" and scope["method"] == "POST":
            size = Headers(scope=scope).get("content-length", "0")
            if not size.isdecimal() or int(size) > sign_in.MAX_SIGN_IN_BYTES:
                return JSONResponse({"detail": "This form is too long for a sign-in."}, 413)
            return _token
        if path == "/api/v1/me":
            return _me
        return argilla


async def _token(scope: Scope, receive: Receive, send: Send) -> None:
    attempt = sign_in.Attempt.of(Request(scope))
    sign_in.attempt.set(attempt)

    def cookie() -> str | None:
        return sign_in.browser_cookie(attempt.signed_in, _secure(scope)) if attempt.signed_in else None

    await argilla(scope, receive, _with_cookie(send, cookie))


async def _me(scope: Scope, receive: Receive, send: Send) -> None:
    token = sign_in.bearer(Request(scope))

    def cookie() -> str | None:
        return sign_in.media_cookie(token, _secure(scope)) if token else None

    await argilla(scope, receive, _with_cookie(send, cookie))


def _secure(scope: Scope) -> bool:
    return bool(scope["scheme"] == "https")


def _with_cookie(send: Send, cookie: Callable[[], str | None]) -> Send:
    async def send_with_cookie(message: Message) -> None:
        is_good = message["type"] == "http.response.start" and message["status"] < 300
        if is_good and (value := cookie()):
            MutableHeaders(scope=message).append("set-cookie", value)
        await send(message)

    return send_with_cookie


def _with_headers(send: Send, policy: str) -> Send:
    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name in [name for name in headers.keys() if name.startswith("access-control-")]:
                del headers[name]  # our pages come from this origin; no other has any business here
            headers["content-security-policy"] = policy
            headers["cross-origin-resource-policy"] = "same-origin"
            headers["referrer-policy"] = "same-origin"
            headers["x-content-type-options"] = "nosniff"
            headers["x-frame-options"] = "SAMEORIGIN"
        await send(message)

    return send_with_headers


def _without_range(scope: Scope) -> Scope:
    # Argilla's Starlette spends quadratic time on a long Range header (CVE-2025-62727); the UI sends none.
    return {**scope, "headers": [header for header in scope["headers"] if header[0] != b"range"]}


def _is_odd(path: str) -> bool:
    return path.startswith("//") or ".." in path.split("/") or "\\" in path or "\0" in path


app = Front(Path(os.environ["ARGILLA_HOME_PATH"]))

"""Serves the page of a run to browsers of this machine: read-only, until it is told to stop."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route

from align.release.watch_page import WatchPage

HOST = "127.0.0.1"
_NAMES = (HOST, "localhost")
"""What browsers of this machine call it; other names that lead here (DNS rebinding) are refused."""
_HEADERS = {
    "cache-control": "no-store",
    "content-security-policy": "frame-ancestors 'none'",  # beside the policy of each page itself
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
_STOPS_WITHIN_S = 2


class CannotWatch(RuntimeError):
    """The port is taken; the message says what to do."""


def make_app(watched: WatchPage) -> Starlette:
    """The application: the page, its clips, and at the end the report with the pages that it links to."""

    def page(request: Request) -> Response:
        if watched.is_over:
            return RedirectResponse("/report.html", 303, _HEADERS)
        return HTMLResponse(watched.render(), headers=_HEADERS)

    def report(request: Request) -> Response:
        path = watched.run / "report.html"
        return FileResponse(path, headers=_HEADERS) if path.is_file() else _missing()

    def clip(request: Request) -> Response:
        sound = watched.clip(request.path_params["digest"])
        return _missing() if sound is None else Response(sound, 200, _HEADERS, "audio/mpeg")

    def own_page(request: Request) -> Response:
        path = watched.own_page(**request.path_params)
        return FileResponse(path, headers=_HEADERS) if path else _missing()

    routes = [
        Route("/", page),
        Route("/report.html", report),
        Route("/clips/{digest}.mp3", clip),
        Route("/{stage}/{name}", own_page),
    ]
    return Starlette(routes=routes, middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=_NAMES)])


def serve(watched: WatchPage, port: int, on_listening: Callable[[str], object]) -> None:
    """Serve until SIGINT or SIGTERM.

    Args:
        watched: what to serve.
        port: 0 takes a free one.
        on_listening: called with the page's address.

    Raises:
        CannotWatch: the port is taken.
    """
    try:
        listening = socket.create_server((HOST, port))
    except OSError as error:
        raise CannotWatch(f"{HOST}:{port}: {error.strerror}; choose another --port") from error
    with listening:
        config = uvicorn.Config(
            make_app(watched),
            ws="none",
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=_STOPS_WITHIN_S,
        )
        for stop in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises them again when it has stopped
            signal.signal(stop, lambda *_: None)
        on_listening(f"http://{HOST}:{listening.getsockname()[1]}/")
        uvicorn.Server(config).run(sockets=[listening])


def _missing() -> Response:
    return PlainTextResponse("There is no such page in this run.\n", 404, _HEADERS)

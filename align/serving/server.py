"""Runs the server in the foreground, from before the policy is loaded until it is told to stop."""

from __future__ import annotations

import secrets
import signal
import socket
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import uvicorn
from starlette.types import ASGIApp

from align.generation.engine import EngineName
from align.models.qwen2_audio.model import load_processor
from align.serving.app import make_app
from align.serving.backend import Backend, EngineDied
from align.serving.requests import Limits
from align.serving.service import Service
from preference_data.prompts.prompts import PromptFormat

_KEEP_ALIVE_S = 75
_STOPS_WITHIN_S = 5


class CannotServe(RuntimeError):
    """The address is taken, or the policy cannot be loaded; the message says which and what to do."""


class Settings(NamedTuple):
    """Where and what to serve. Port 0 takes a free one."""

    policy: Path | str
    name: str
    engine: EngineName
    key: str
    host: str
    port: int
    prompt_format: PromptFormat
    limits: Limits


def new_key() -> str:
    """A key that nobody guesses."""
    return f"align-{secrets.token_urlsafe(32)}"


def serve(settings: Settings, on_listening: Callable[[str], object], on_ready: Callable[[], object]) -> None:
    """Serve until SIGINT or SIGTERM.

    Args:
        settings: see there.
        on_listening: called with the URL; requests are refused until the policy is loaded.
        on_ready: called when it is loaded, in another thread.

    Raises:
        CannotServe: before or while the policy is loaded. An engine that dies later is /health's to tell.
    """
    listening = bind(settings.host, settings.port)
    backend = open_backend(settings.engine, settings.policy)
    service = None
    try:
        processor = load_processor(settings.policy)
        service = Service(
            processor,
            backend,
            name=settings.name,
            prompt_format=settings.prompt_format,
            limits=settings.limits,
        )
        on_listening(url_of(listening))
        run(make_app(service, settings.key), listening, [backend], on_ready)
    finally:
        backend.close()
        if service:
            service.close()
        listening.close()


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens, before anything is loaded.

    Raises:
        CannotServe: the address is taken, or is none.
    """
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, proto)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen()
    except OSError as error:
        raise CannotServe(f"{host}:{port}: {error.strerror}; choose another --port or --host") from error
    return listening


def url_of(listening: socket.socket) -> str:
    """The address under which clients reach a socket."""
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def open_backend(engine: EngineName, policy: Path | str, *, n_policies: int = 1) -> Backend:
    """An engine that begins to load a policy, one of `n_policies` that are served together."""
    if engine == "vllm":
        from align.serving.vllm_backend import VllmBackend

        return VllmBackend(policy, n_policies=n_policies)
    from align.serving.transformers_backend import TransformersBackend

    return TransformersBackend(policy)


def run(
    app: ASGIApp, listening: socket.socket, backends: Sequence[Backend], on_ready: Callable[[], object]
) -> None:
    """Answer until a signal comes, or until it shows that a policy cannot be loaded.

    Raises:
        CannotServe: it cannot be.
    """
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=_STOPS_WITHIN_S,
    )
    server = uvicorn.Server(config)
    failures: list[EngineDied] = []

    def wait_for_engines() -> None:
        try:
            for backend in backends:
                backend.wait()
        except EngineDied as error:
            failures.append(error)
            server.should_exit = True
        else:
            on_ready()

    for stop in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises them again when it has stopped
        signal.signal(stop, lambda *_: None)  # not SIG_IGN, which vLLM's process would inherit
    threading.Thread(target=wait_for_engines, daemon=True).start()
    server.run(sockets=[listening])
    if failures:
        raise CannotServe(f"the policy cannot be loaded: {failures[0]}") from failures[0]

"""A vLLM server of ours behind the routes: it sees checked clips and texts, and no client reaches it."""

from __future__ import annotations

import json
import threading
from collections.abc import AsyncGenerator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import httpx

from align.generation.engine import Decoding, request_seed
from align.generation.vllm.server import Server, ServerFailed, longest_context, memory_of_others_gb
from align.serving.backend import CompletionFailed, EngineDied, Health, Step
from align.serving.prompts import EncodedPrompt, Sound
from preference_data.audio.encode import encode, input_audio

_HEALTH_WITHIN_S = 30.0


class VllmBackend:
    """Starts a vLLM server in a thread that lives as long: the server ends with the thread that started it.

    Args:
        policy: folder of a saved model, or a Hub id.
        n_policies: how many servers share the GPU's memory, this one among them.
    """

    def __init__(self, policy: Path | str, *, n_policies: int = 1) -> None:
        self.longest = longest_context(policy)
        self._n_policies = n_policies
        self._is_closed = threading.Event()
        self._started: Future[Server] = Future()
        self._client: httpx.AsyncClient | None = None
        self._thread = threading.Thread(target=self._run, args=(policy,), name="vllm", daemon=True)
        self._thread.start()

    @property
    def is_loading(self) -> bool:
        """See `Backend`."""
        return not self._started.done()

    async def health(self) -> Health:
        """Whether the server's process is there and says that its engine is."""
        if self.is_loading:
            return Health("loading")
        try:
            server = self._server()
            answer = await self._connection(server).get("/health", timeout=_HEALTH_WITHIN_S)
        except EngineDied as error:
            return Health("died", str(error))
        except httpx.HTTPError as error:
            return Health("died", f"vLLM does not answer: {error!r}")
        return Health("ready") if answer.status_code == 200 else Health("died", "vLLM's engine has died")

    async def tokens(
        self, prompt: EncodedPrompt, decoding: Decoding, seed: int
    ) -> AsyncGenerator[Step, None]:
        """See `Backend`."""
        server = self._server()
        body = _body(prompt, decoding, seed)
        try:
            async with self._connection(server).stream("POST", "/v1/chat/completions", json=body) as answer:
                if answer.status_code != 200:
                    await answer.aread()
                    raise self._failure(answer.text)
                async for line in answer.aiter_lines():
                    if line.startswith("data: ") and line != "data: [DONE]":
                        event = json.loads(line.removeprefix("data: "))
                        if "error" in event:
                            raise self._failure(line)
                        for choice in event["choices"]:
                            yield Step(choice.get("token_ids") or [], choice.get("finish_reason"))
        except httpx.HTTPError as error:
            raise self._failure(repr(error)) from error

    def wait(self) -> None:
        """See `Backend`."""
        self._started.result()

    def close(self) -> None:
        """End the server; one that is still starting ends with this process."""
        self._is_closed.set()
        if self._started.done():
            self._thread.join()

    def _run(self, policy: Path | str) -> None:
        try:
            server = Server(policy, training_gb=memory_of_others_gb(self._n_policies))
        except Exception as error:
            reason = str(error) if isinstance(error, ServerFailed) else f"{type(error).__name__}: {error}"
            self._started.set_exception(EngineDied(reason))
            return
        self._started.set_result(server)
        self._is_closed.wait()
        server.stop()

    def _server(self) -> Server:
        """The server, if it lives."""
        server = self._started.result(timeout=0)
        try:
            server.check()
        except ServerFailed as error:
            raise EngineDied(str(error)) from error
        return server

    def _failure(self, words: str) -> CompletionFailed:
        """What vLLM said instead of tokens; raises where it has died of it."""
        self._server()
        return CompletionFailed(f"vLLM: {words[:300]}")

    def _connection(self, server: Server) -> httpx.AsyncClient:
        if self._client is None:  # made in the event loop that uses it
            transport = httpx.AsyncHTTPTransport(
                uds=str(server.socket), limits=httpx.Limits(max_connections=None)
            )
            self._client = httpx.AsyncClient(transport=transport, base_url="http://vllm", timeout=None)
        return self._client


def _body(prompt: EncodedPrompt, decoding: Decoding, seed: int) -> dict[str, Any]:
    sounds = iter(prompt.sounds)
    messages = [
        {**message, "content": [_part(part, sounds) for part in message["content"]]}
        for message in prompt.messages
    ]
    if prompt.is_plain:
        parts = [*map(_input_audio, prompt.sounds), {"type": "text", "text": prompt.text}]
        messages = [{"role": "plain", "content": parts}]
    return {
        "model": "policy",
        "messages": messages,
        "max_tokens": decoding.max_new_tokens,
        "temperature": decoding.temperature,
        "top_p": decoding.top_p,
        "seed": request_seed(seed, 0) >> 2,  # as `VllmEngine` draws request 0
        "stream": True,
        "return_token_ids": True,
    }


def _part(part: dict[str, Any], sounds: Any) -> dict[str, Any]:
    return _input_audio(next(sounds)) if part["type"] == "audio" else part


def _input_audio(sound: Sound) -> dict[str, Any]:
    return input_audio(encode(sound.wave, "WAV", "FLOAT"))

"""Completions from a vLLM server. Clips are decoded here, as for training, and travel as 16 kHz float WAV.

Greedy completions are those of `TransformersEngine`. Drawn ones are a function of (seed, number, i) as well,
but of vLLM's own random numbers: the two engines draw different completions from the same distribution.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx

from align.generation.engine import Completion, Decoding, Request, completion_text, request_seed
from align.generation.vllm.server import Server, ServerFailed
from align.models.features import ClipFeatures
from align.models.qwen2_audio.model import load_processor
from preference_data.audio.encode import encode, input_audio

_AT_ONCE = 64
"""Requests in flight: more than vLLM computes at a time, so that it never waits for us."""
_ATTEMPTS = 3


class VllmEngine:
    """A Qwen2-Audio in a vLLM server of its own, which ends with `close` or with this process.

    Args:
        policy: folder of a saved model, or a Hub id.
        clips: where requests' clips are looked up; may be set later.
        training_gb: see `Server`.

    Raises:
        ServerFailed: the server is not installed or did not start.
    """

    def __init__(self, policy: Path | str, clips: ClipFeatures, *, training_gb: float | None = None) -> None:
        self.clips = clips
        self._tokenizer = load_processor(policy).tokenizer
        self.server = Server(policy, training_gb=training_gb)

    def complete(
        self, numbered: Mapping[int, Request], decoding: Decoding, seed: int
    ) -> Iterator[tuple[int, list[Completion]]]:
        """Each request's completions, as they are done.

        Raises:
            ServerFailed: the server died or refused a request; what was yielded is good.
        """
        done: queue.SimpleQueue[Any] = queue.SimpleQueue()
        client = threading.Thread(
            target=lambda: asyncio.run(self._complete(numbered, decoding, seed, done)), daemon=True
        )
        client.start()
        while (item := done.get()) is not None:
            if isinstance(item, BaseException):
                self.server.check()
                raise item
            yield item

    def load(self, policy: Path | str) -> None:
        """Complete as `policy` from now on: the same shape, other weights. See `Server.load`."""
        self.server.load(Path(policy))

    def close(self) -> None:
        """End the server."""
        self.server.stop()

    async def _complete(
        self, numbered: Mapping[int, Request], decoding: Decoding, seed: int, done: queue.SimpleQueue[Any]
    ) -> None:
        waiting = iter(numbered.items())

        async def work(client: httpx.AsyncClient) -> None:
            for number, request in waiting:
                body = await asyncio.to_thread(self._body, request, decoding, number, seed)
                answer = await self._post(client, body)
                if answer.status_code != 200:
                    raise ServerFailed(f"vLLM refused request {number}: {answer.text[:300]}")
                choices = answer.json()["choices"]
                done.put((number, [self._completion(choice, request) for choice in choices]))

        transport = httpx.AsyncHTTPTransport(
            uds=str(self.server.socket), limits=httpx.Limits(max_connections=None)
        )
        try:
            async with (
                httpx.AsyncClient(transport=transport, base_url="http://vllm", timeout=None) as client,
                asyncio.TaskGroup() as group,
            ):
                for _ in range(min(_AT_ONCE, len(numbered))):
                    group.create_task(work(client))
        except BaseExceptionGroup as errors:
            first = errors.exceptions[0]
            done.put(ServerFailed(f"vLLM: {first!r}") if isinstance(first, httpx.HTTPError) else first)
        done.put(None)

    async def _post(self, client: httpx.AsyncClient, body: dict[str, Any]) -> httpx.Response:
        """Again where a connection broke: the seed is in the request, so the answer is the same."""
        for _ in range(_ATTEMPTS - 1):
            with suppress(httpx.TransportError):
                return await client.post("/v1/chat/completions", json=body)
            self.server.check()
        return await client.post("/v1/chat/completions", json=body)

    def _body(self, request: Request, decoding: Decoding, number: int, seed: int) -> dict[str, Any]:
        return {
            "model": "policy",
            "messages": self._messages(request),
            "n": decoding.completions,
            "max_tokens": decoding.max_new_tokens,
            "temperature": decoding.temperature,
            "top_p": decoding.top_p,
            "seed": request_seed(seed, number) >> 2,  # vLLM adds i for completion i; they must fit 63 bits
            "bad_words": self._tokenizer.convert_ids_to_tokens(decoding.suppress),
            "logprobs": True,
            "return_token_ids": True,
        }

    def _messages(self, request: Request) -> list[dict[str, Any]]:
        """The chat with the clips in their places."""
        clips = iter(request.audios)
        return [
            {
                "role": "plain" if request.plain else message["role"],
                "content": [
                    self._clip(next(clips)) if part["type"] == "audio" else part
                    for part in message["content"]
                ],
            }
            for message in request.messages
        ]

    def _clip(self, path: str) -> dict[str, Any]:
        return input_audio(encode(self.clips.wave(path), "WAV", "FLOAT"))

    def _completion(self, choice: dict[str, Any], request: Request) -> Completion:
        ids = choice["token_ids"]
        logps = [token["logprob"] for token in choice["logprobs"]["content"]]
        return Completion(completion_text(self._tokenizer, ids, request), ids, logps)

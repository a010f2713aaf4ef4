"""One transformers engine in a thread: requests that wait become a batch, batches take turns token by token.

A batch is what waits when there is room for one, of requests that are drawn alike. It keeps its make-up, so
that no cache is laid out anew; with a few batches in turn, a short answer does not wait for a long one. Meant
for one policy and a small load; vLLM is for more.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Collection, Generator
from concurrent.futures import Future
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from align.generation.decoding import NextTokens, uniforms
from align.generation.engine import Decoding
from align.generation.transformers_engine import TransformersEngine
from align.models.features import Clip, ClipFeatures, mel_features
from align.models.qwen2_audio.model import context_of, load_processor
from align.serving.backend import CompletionFailed, EngineDied, Finish, Health, Step
from align.serving.prompts import EncodedPrompt

_ROWS = 16
"""Requests in a batch."""
_BATCHES = 2
"""Batches that take turns."""


class _Job(NamedTuple):
    """A request on its way; `send` gets what is drawn, or an error, and may be called in any thread."""

    prompt: EncodedPrompt
    decoding: Decoding
    seed: int
    send: Callable[[Step | EngineDied | CompletionFailed], object]
    cancellation: threading.Event
    """Set when nobody waits for it any more."""


class TransformersBackend:
    """Loads a policy in a thread of its own and completes there.

    Args:
        policy: folder of a saved model, or a Hub id.
    """

    def __init__(self, policy: Path | str) -> None:
        self.longest = context_of(policy)
        self._waiting: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._is_closed = False
        self._death: EngineDied | None = None
        self._loaded: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(policy,), name="engine", daemon=True)
        self._thread.start()

    @property
    def is_loading(self) -> bool:
        """See `Backend`."""
        return not self._loaded.done()

    async def health(self) -> Health:
        """How the thread is."""
        if self._death:
            return Health("died", str(self._death))
        return Health("loading" if self.is_loading else "ready")

    async def tokens(
        self, prompt: EncodedPrompt, decoding: Decoding, seed: int
    ) -> AsyncGenerator[Step, None]:
        """See `Backend`."""
        loop = asyncio.get_running_loop()
        inbox: asyncio.Queue[Step | EngineDied | CompletionFailed] = asyncio.Queue()

        def send(item: Step | EngineDied | CompletionFailed) -> None:
            loop.call_soon_threadsafe(inbox.put_nowait, item)

        job = _Job(prompt, decoding, seed, send, threading.Event())
        with self._changed:
            if self._death:
                raise self._death
            self._waiting.append(job)
            self._changed.notify()
        try:
            while not isinstance(item := await inbox.get(), Exception):
                yield item
                if item.finish:
                    return
            raise item
        finally:
            job.cancellation.set()

    def wait(self) -> None:
        """See `Backend`."""
        self._loaded.result()

    def close(self) -> None:
        """End the thread after the token that it computes; one that still loads ends with this process."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        if self._loaded.done():
            self._thread.join()

    # -------------------------------------------------------------------------- in the thread

    def _run(self, policy: Path | str) -> None:
        active: list[_Batch] = []
        try:
            engine = TransformersEngine(policy, ClipFeatures(load_processor(policy), Path()))
            self._loaded.set_result(None)
            while (jobs := self._next_jobs(active)) is not None:
                if jobs:
                    active.append(_Batch(engine, jobs))
                active = [batch for batch in active if batch.step()]
        except BaseException as error:
            self._end(EngineDied(f"{type(error).__name__}: {error}"), active)
        else:
            self._end(EngineDied("the server is stopping"), active)

    def _next_jobs(self, active: list[_Batch]) -> list[_Job] | None:
        """Requests for one more batch, where there is room; None when it is time to end.

        Waits only where there is nothing else to do.
        """
        with self._changed:
            while not (self._waiting or active or self._is_closed):
                self._changed.wait()
            if self._is_closed:
                return None
            jobs: list[_Job] = []
            if len(active) < _BATCHES:
                others: deque[_Job] = deque()
                while self._waiting and len(jobs) < _ROWS:
                    job = self._waiting.popleft()
                    if job.cancellation.is_set():
                        continue
                    alike = not jobs or _sampling(job) == _sampling(jobs[0])
                    (jobs if alike else others).append(job)
                self._waiting.extendleft(reversed(others))
            return jobs

    def _end(self, death: EngineDied, active: list[_Batch]) -> None:
        with self._changed:
            self._death = death
            jobs = [*self._waiting, *(job for batch in active for job in batch.jobs)]
            self._waiting.clear()
        for job in jobs:
            job.send(death)
        if not self._loaded.done():
            self._loaded.set_exception(death)


def _sampling(job: _Job) -> Decoding:
    """How a request's tokens are drawn, but for how many."""
    return job.decoding._replace(max_new_tokens=0)


class _Batch:
    """Requests that are decoded together; a row each."""

    def __init__(self, engine: TransformersEngine, jobs: list[_Job]) -> None:
        self._engine, self._jobs, self._counts = engine, dict(enumerate(jobs)), [0] * len(jobs)
        self._steps: Generator[NextTokens, Collection[int] | None, None] | None = None
        self._leaving: list[int] = []

    @property
    def jobs(self) -> list[_Job]:
        """Requests that are not complete."""
        return list(self._jobs.values())

    def step(self) -> bool:
        """Draw a token for each request; returns whether any goes on."""
        try:
            drawn = self._steps.send(self._leaving) if self._steps else self._begin()
        except StopIteration:
            drawn = None
        except torch.OutOfMemoryError:
            return self._give_up()
        if drawn is not None:
            self._send(drawn)
        return bool(self._jobs)

    def _begin(self) -> NextTokens:
        """Run the prompts, and draw the first tokens."""
        jobs = self.jobs
        decoding = _sampling(jobs[0])._replace(
            max_new_tokens=max(job.decoding.max_new_tokens for job in jobs)
        )
        ids = [job.prompt.ids for job in jobs]
        self._steps = self._engine.stream(ids, _clips(self._engine, jobs), decoding, _draws(jobs, decoding))
        return next(self._steps)

    def _send(self, drawn: NextTokens) -> None:
        self._leaving = []
        for row, token in zip(drawn.rows.tolist(), drawn.tokens.tolist(), strict=True):
            job = self._jobs[row]
            self._counts[row] += 1
            is_cut = self._counts[row] == job.decoding.max_new_tokens
            finish: Finish | None = "stop" if token in self._engine.stops else "length" if is_cut else None
            job.send(Step([token], finish))
            if finish or job.cancellation.is_set():
                del self._jobs[row]
                self._leaving.append(row)

    def _give_up(self) -> bool:
        for job in self._jobs.values():
            job.send(
                CompletionFailed(
                    "the GPU has no memory for so much at a time; send fewer requests, or shorter ones"
                )
            )
        self._jobs.clear()
        torch.cuda.empty_cache()
        return False


def _clips(engine: TransformersEngine, jobs: list[_Job]) -> list[list[Clip]]:
    """Features of each prompt's clips; a clip that several prompts have is computed, and heard, once."""
    waves = {sound.sha256: sound.wave for job in jobs for sound in job.prompt.sounds}
    features = mel_features(engine.processor.feature_extractor, waves.values())
    clips = dict(zip(waves, features, strict=True))
    return [[clips[sound.sha256] for sound in job.prompt.sounds] for job in jobs]


def _draws(jobs: list[_Job], decoding: Decoding) -> np.ndarray | None:
    """Random numbers of each request: a function of its own seed."""
    draws = [uniforms(decoding, job.seed, [0]) for job in jobs]
    return None if draws[0] is None else np.concatenate([row for row in draws if row is not None])

"""An engine that says what a test wants, behind the real page, routes and files."""

import asyncio
import threading
from contextlib import contextmanager

import uvicorn

from align.chat.app import HOST, make_app
from align.chat.judgements import KeptJudgements
from align.chat.turns import Policy
from align.models.qwen2_audio.model import load_processor
from align.serving.backend import Health, Step
from align.serving.requests import Limits
from align.serving.server import bind, url_of
from align.serving.service import Service

KEY = "test-key"
STAMPED = "the<|0.20|>tone<|0.45|><|sil|><|0.60|>is<|0.72|>high<|0.90|>"


class Parrot:
    """Says to a chat what it was asked, and `before` it; and to every clip the same stamped words."""

    longest, is_loading = 4096, False

    def __init__(self, tokenizer, before, pause_s):
        self._tokenizer, self._before, self._pause_s = tokenizer, before, pause_s

    async def health(self):
        return Health("ready")

    async def tokens(self, prompt, decoding, seed):
        parts = prompt.messages[-1]["content"] if prompt.messages else []
        words = self._before + "".join(part["text"] or "" for part in parts)
        text = STAMPED if prompt.is_plain else words
        for token in self._tokenizer.encode(text):
            await asyncio.sleep(self._pause_s)
            yield Step([token])
        yield Step([self._tokenizer.eos_token_id], "stop")

    def wait(self):
        pass

    def close(self):
        pass


@contextmanager
def chatting(model, keep, *names, limits=None, pause_s=0.0, differ=True):
    """The address of a page for stand-ins of these names, without its key; `model` gives the tokenizer."""
    limits, processor = limits or Limits(), load_processor(model)
    services = [
        Service(
            processor,
            Parrot(processor.tokenizer, f"{i} " if i and differ else "", pause_s),
            name=name,
            prompt_format="sentences",
            limits=limits,
        )
        for i, name in enumerate(names)
    ]
    policies = [Policy(service.name, f"{i}" * 64, service) for i, service in enumerate(services)]
    app = make_app(policies, KEY, limits, KeptJudgements(keep) if keep else None, "ann")
    with bind(HOST, 0) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            yield url_of(listening)
        finally:
            server.should_exit = True
            thread.join()
            for service in services:
                service.close()

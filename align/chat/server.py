"""Runs the page in the foreground, from before the policies are loaded until it is told to stop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from align.chat.app import HOST, make_app
from align.chat.judgements import KeptJudgements
from align.chat.turns import Policy
from align.generation.engine import EngineName
from align.models.qwen2_audio.model import load_processor
from align.models.shards import weights_sha256
from align.serving.requests import Limits
from align.serving.server import bind, open_backend, run, url_of
from align.serving.service import Service
from preference_data.prompts.prompts import PromptFormat


class NamedModel(NamedTuple):
    """The folder of a saved model, and what people call it."""

    name: str
    model: Path | str


class Settings(NamedTuple):
    """What to talk to, and where. Port 0 takes a free one; `keep_in` is None where nothing may be kept."""

    models: Sequence[NamedModel]
    engine: EngineName
    key: str
    port: int
    prompt_format: PromptFormat
    limits: Limits
    keep_in: Path | None
    annotator: str


def chat(settings: Settings, on_listening: Callable[[str], object], on_ready: Callable[[], object]) -> None:
    """Serve the page until SIGINT or SIGTERM.

    Args:
        settings: see there.
        on_listening: called with the page's address, the key in it.
        on_ready: called when all policies are loaded, in another thread.

    Raises:
        CannotServe: the port is taken, or a policy cannot be loaded.
        FileExistsError: what is to be kept would go to a folder that something else made.
        FileNotFoundError: a model has no weights here, so that nothing could say whose its answers are.
    """
    with ExitStack() as stack:
        judgements = KeptJudgements(settings.keep_in) if settings.keep_in else None
        listening = stack.enter_context(bind(HOST, settings.port))
        shas = [weights_sha256(named.model) for named in settings.models]
        policies, backends = [], []
        for named, sha256 in zip(settings.models, shas, strict=True):
            backend = open_backend(settings.engine, named.model, n_policies=len(settings.models))
            stack.callback(backend.close)
            service = Service(
                load_processor(named.model),
                backend,
                name=named.name,
                prompt_format=settings.prompt_format,
                limits=settings.limits,
            )
            stack.callback(service.close)
            policies.append(Policy(named.name, sha256, service))
            backends.append(backend)
        app = make_app(policies, settings.key, settings.limits, judgements, settings.annotator)
        on_listening(f"{url_of(listening)}/#{settings.key}")
        run(app, listening, backends, on_ready)

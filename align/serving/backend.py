"""The interface between the routes and an engine that draws tokens."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Literal, NamedTuple, Protocol

from align.generation.engine import Decoding
from align.serving.prompts import EncodedPrompt

State = Literal["loading", "ready", "died"]


class EngineDied(RuntimeError):
    """The engine draws no more tokens; the message says why."""


class CompletionFailed(RuntimeError):
    """The engine did not complete this prompt, for lack of memory or another reason; it goes on."""


class Health(NamedTuple):
    """The state of an engine, and for one that died, why."""

    state: State
    reason: str = ""


Finish = Literal["stop", "length"]
"""Why an answer ended: by itself, or at its limit of tokens."""


class Step(NamedTuple):
    """Tokens that were drawn, a stop token included; the last ones say why there are no more."""

    tokens: list[int]
    finish: Finish | None = None


class Backend(Protocol):
    """An engine that draws tokens for many requests at a time. It starts loading where it is made."""

    longest: int
    """Tokens of a prompt and its answer together."""

    @property
    def is_loading(self) -> bool:
        """Whether it cannot draw yet."""
        ...

    async def health(self) -> Health:
        """How it is now."""
        ...

    def tokens(self, prompt: EncodedPrompt, decoding: Decoding, seed: int) -> AsyncGenerator[Step, None]:
        """The tokens of a single completion as they are drawn.

        A caller that stops early closes the iterator; the engine then draws no more for it.

        Raises:
            EngineDied: now or before.
            CompletionFailed: it did not complete this prompt.
        """
        ...

    def wait(self) -> None:
        """Wait until it is loaded.

        Raises:
            EngineDied: it could not be.
        """
        ...

    def close(self) -> None:
        """End it and what it has started."""
        ...

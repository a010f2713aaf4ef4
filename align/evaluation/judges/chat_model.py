"""A model that answers prompts, as judges see it: an endpoint, or a model in this process."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

Message = dict[str, Any]
"""{"role": "system" or "user", "content": text}; to a model that hears, a list of OpenAI's content parts."""

PARAMETERS: Mapping[str, Any] = MappingProxyType({"temperature": 0.0, "max_tokens": 1024})
"""The default request parameters."""

_COUNTS = ("max_tokens", "max_completion_tokens")
"""Parameters that are numbers of tokens."""

NO_REPLY, TOO_LONG, FILTERED = "no_reply", "too_long", "filtered"
UNANSWERED = (NO_REPLY, TOO_LONG, FILTERED)
"""Finish reasons of questions that the model never answered: every attempt failed, or the server turned the
prompt away, as too long, by its content filter or else. They cost nothing and are sent again at the next
run."""


class Reply(NamedTuple):
    """A model's reply as it came, usable or not; of an unanswered question, `text` is the reason.

    `finish_reason` is "stop", "length" or "content_filter", another word of the server's, or one of
    `UNANSWERED`; tokens are 0 where the server does not count them.
    """

    text: str
    finish_reason: str | None
    prompt_tokens: int = 0
    completion_tokens: int = 0


class JudgeFailed(RuntimeError):
    """The judge model cannot be used; its replies so far are kept, so the same command goes on."""


class JudgeMisconfigured(JudgeFailed):
    """Trying again cannot help: key, URL, model, parameters or credit must change."""


class JudgeUnavailable(JudgeFailed):
    """The endpoint does not answer for now."""


class ChatModel(Protocol):
    """A model that answers prompts: `endpoint.Endpoint` or `local_model.LocalModel`."""

    @property
    def name(self) -> str:
        """The model, as people know it."""
        ...

    @property
    def parameters(self) -> Mapping[str, Any]:
        """How it decodes, in the words of a chat request: `max_tokens`, ..."""
        ...

    @property
    def identity(self) -> Mapping[str, Any]:
        """Model and parameters: all that shapes its replies, for the cache."""
        ...

    def reply(self, prompts: Sequence[Sequence[Message]], on_reply: Callable[[int, Reply], None]) -> None:
        """Answer every prompt, calling `on_reply(index, reply)` as each is ready.

        Raises:
            JudgeFailed: the model cannot be used, or `on_reply` raised it to stop.
        """
        ...


def open_chat_model(
    model: str, url: str | None, parameters: Mapping[str, Any], concurrency: int = 8
) -> ChatModel:
    """The model `model` at `url`, or without a URL, in the folder `model`.

    Args:
        model: as its server names it, or a folder.
        url: of the API, up to and with "/v1".
        parameters: changes to `PARAMETERS`; see `request_parameters`.
        concurrency: requests in flight, of an endpoint.

    Raises:
        FileNotFoundError: the folder holds no model.
        ValueError: URL, parameters or folder cannot be used.
    """
    # Imported here: the one brings a client that takes a second to import, the other brings torch.
    if url:
        from align.evaluation.judges.endpoint import Endpoint

        return Endpoint(url, model, parameters=parameters, concurrency=concurrency)
    from align.evaluation.judges.local_model import LocalModel

    return LocalModel(Path(model).expanduser(), local_max_tokens(parameters))


def request_parameters(changes: Mapping[str, Any]) -> dict[str, Any]:
    """`PARAMETERS` with changes: a value adds or replaces one, None leaves it out.

    Raises:
        ValueError: a change is of what we must decide ourselves.
    """
    if ours := sorted({"model", "messages", "stream", "n"} & set(changes)):
        raise ValueError(f"judge parameter {ours[0]!r}: is set by us and cannot be changed")
    for name, value in changes.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError):
            raise ValueError(f"judge parameter {name!r}: {value!r} cannot be sent as JSON") from None
        if name in _COUNTS and not (value is None or type(value) is int and value > 0):
            raise ValueError(f"judge parameter {name!r}: {value!r} is not a number of tokens")
    # A whole number is the default, too: an equal request has an equal key in the cache.
    real = {name: value for name, value in changes.items() if value != PARAMETERS.get(name, ...)}
    return {name: value for name, value in {**PARAMETERS, **real}.items() if value is not None}


def local_max_tokens(changes: Mapping[str, Any]) -> int:
    """`max_tokens`, the one parameter of a local model: it decodes greedily.

    Raises:
        ValueError: another parameter is given, or this is not a number of tokens.
    """
    others = {name: value for name, value in request_parameters(changes).items() if name != "max_tokens"}
    if others not in ({}, {"temperature": 0}):
        raise ValueError(
            f"judge parameters {others}: a local judge decodes greedily; it takes max_tokens alone"
        )
    tokens = request_parameters(changes).get("max_tokens")
    if type(tokens) is not int or tokens < 1:
        raise ValueError(f"judge parameter max_tokens: {tokens!r} is not a number of tokens")
    return tokens


def parameter_advice(changes: Mapping[str, Any]) -> str:
    """The options and the recipe's key that make these changes."""
    flags = " ".join(f"--parameter {name}={'null' if v is None else v}" for name, v in changes.items())
    keys = ", ".join(f"{name}: {'null' if v is None else v}" for name, v in changes.items())
    return f"{flags} (in a recipe judge: {{parameters: {{{keys}}}}})"

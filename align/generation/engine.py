"""Requests, completions, and the interface of engines. Completions must not depend on the engine.

A request's draws are a function of the run's seed and the request's number, so its completions are the same
whatever else is in flight, on however many workers, and after a resume.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

from transformers import PreTrainedTokenizerBase

from align.models.chat import Message, as_messages
from align.models.features import ClipFeatures
from preference_data.schema import Prompt, Turn, conversation, stable_id

EngineName = Literal["transformers", "vllm"]


class Request(NamedTuple):
    """A prompt with its clips. A `plain` text is continued as it stands, without a chat around it.

    `system` and `history` stand before it in the chat, and `audios` are all clips in order, as of a `Prompt`.
    """

    text: str
    audios: tuple[str, ...]
    plain: bool = False
    system: str | None = None
    history: tuple[Turn, ...] = ()

    @property
    def messages(self) -> list[Message]:
        """The chat to answer."""
        return as_messages(conversation(self.text, self.audios, self.system, self.history))


def request_of(prompt: Prompt) -> Request:
    """The request for a prompt's completions."""
    return Request(prompt.question, prompt.audios, system=prompt.system, history=prompt.history)


class Decoding(NamedTuple):
    """How completions are drawn. Nothing else decides: a checkpoint's own settings are ignored.

    `temperature` 0 is greedy. `top_p` keeps the likeliest tokens that together have this probability.
    `completions` of each prompt are drawn. Tokens in `suppress` never are.
    """

    max_new_tokens: int = 32
    temperature: float = 0.0
    top_p: float = 1.0
    completions: int = 1
    suppress: tuple[int, ...] = ()


class Completion(NamedTuple):
    """A completion: its text, its tokens up to and with the end of turn, and log p of each of them.

    Log-probabilities, in nats, are those of the model as it is, before temperature and top-p. A completion
    that does not end with a stop token was cut at `max_new_tokens`.
    """

    text: str
    token_ids: list[int]
    logps: list[float]


class Engine(Protocol):
    """A loaded policy that completes requests."""

    clips: ClipFeatures
    """Where the clips of requests are looked up. May be set between calls."""

    def complete(
        self, numbered: Mapping[int, Request], decoding: Decoding, seed: int
    ) -> Iterator[tuple[int, list[Completion]]]:
        """Each request's number and its `decoding.completions` completions, as they are done."""
        ...

    def load(self, policy: Path | str) -> None:
        """Complete as `policy` from now on: the same shape, other weights."""
        ...

    def close(self) -> None:
        """Free the memory, and end any process that the engine started."""
        ...


def request_seed(seed: int, number: int, completion: int = 0) -> int:
    """64 bits for one completion of request `number`: the same wherever and whenever it is drawn."""
    return int(stable_id(seed, number, completion)[:16], 16)


def completion_text(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], request: Request) -> str:
    """The text of a completion."""
    return decode_tokens(tokenizer, tokens, is_plain=request.plain).strip()


def decode_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], *, is_plain: bool) -> str:
    """Tokens as text. Tags are part of a plain text's, such as Qwen-Audio's time stamps."""
    if is_plain:
        tokens = [i for i in tokens if i not in (tokenizer.eos_token_id, tokenizer.pad_token_id)]
    return str(tokenizer.decode(tokens, skip_special_tokens=not is_plain))


def open_engine(name: EngineName, policy: Path | str, clips: ClipFeatures, run: Path | None = None) -> Engine:
    """The engine of this name with `policy` loaded, in this process or one that it starts.

    Outputs of its audio tower are kept in the folder of a `run`; vLLM encodes clips itself and keeps none.
    """
    if name == "vllm":
        from align.generation.vllm.engine import VllmEngine

        return VllmEngine(policy, clips)
    from align.generation.transformers_engine import TransformersEngine

    return TransformersEngine(policy, clips, run)

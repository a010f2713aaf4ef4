"""A language model as judge: every answer rated in both orders, no reply paid for twice."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple, Protocol

from align.evaluation.benchmarks.air_bench import Item
from align.evaluation.judges.prompt import Asked, JudgeProtocol, Message, Strict
from align.evaluation.judges.ratings import Order, OrderReply, Rating
from align.evaluation.judges.reply_cache import UNANSWERED, Reply, ReplyCache
from align.run_folder.artifacts import sha256_json
from align.run_folder.progress import Progress

ORDERS: tuple[Order, Order] = ("reference_first", "response_first")
_BYTES_PER_TOKEN = 4
"""Of UTF-8, roughly, over languages and tokenizers."""


class ChatModel(Protocol):
    """What answers prompts: `endpoint.Endpoint` or `local_model.LocalModel`."""

    @property
    def name(self) -> str:
        """The model, as people know it."""
        ...

    @property
    def identity(self) -> Mapping[str, Any]:
        """Model and parameters: all that shapes its replies, for the cache."""
        ...

    def reply(self, prompts: Sequence[Sequence[Message]], on_reply: Callable[[int, Reply], None]) -> None:
        """Answer every prompt, calling `on_reply(index, reply)` as each is ready."""
        ...


class Estimate(NamedTuple):
    """What rating would cost. Tokens are estimates; `cost` is None where a price is unknown."""

    calls: int
    cached: int
    prompt_tokens: int
    completion_tokens: int
    cost: float | None

    def __str__(self) -> str:
        cost = "cost unknown: no prices given" if self.cost is None else f"about {self.cost:.2f}"
        return (
            f"{self.calls} calls ({self.cached} more are cached), about {self.prompt_tokens} prompt and "
            f"{self.completion_tokens} reply tokens, {cost}"
        )


class _Call(NamedTuple):
    key: str
    order: Order
    asked: Asked


class LLMJudge:
    """Rates responses against the reference, by what a model replies in both orders.

    Args:
        model: answers the prompts.
        cache: the file of replies; one is enough for all models, prompts and parameters.
        protocol: how to ask and read, see `prompt`.
    """

    shares_ground_truth = False

    def __init__(self, model: ChatModel, cache: Path, protocol: JudgeProtocol | None = None) -> None:
        self.model = model
        self.protocol = protocol or Strict()
        self.cache = ReplyCache(cache)
        self.name = f"{model.name} ({self.protocol.name})"
        self.prompt_sha256 = self.protocol.prompt_sha256

    def rate(self, items: Sequence[Item], responses: Sequence[str], label: str = "judge") -> list[Rating]:
        """One rating per item, in order; an empty response is judged as the empty answer it is.

        Raises:
            JudgeFailed: the model cannot be used. Replies so far are kept, the next call goes on from there.
        """
        pairs = self._calls(items, responses)
        replies = self._replies({call.key: call.asked for pair in pairs for call in pair}, label)
        return [
            self._rating(item.uniq_id, tuple(self._order_reply(call, replies[call.key]) for call in pair))
            for item, pair in zip(items, pairs, strict=True)
        ]

    def estimate(
        self,
        items: Sequence[Item],
        responses: Sequence[str],
        prompt_price: float | None = None,
        completion_price: float | None = None,
    ) -> Estimate:
        """What `rate` would still have to ask; prices are per million tokens, in any currency."""
        prompts = {call.key: call.asked for pair in self._calls(items, responses) for call in pair}
        cached = self.cache.get(prompts)
        missing = [asked for key, asked in prompts.items() if key not in cached]
        size = sum(len(message["content"].encode()) for asked in missing for message in asked.messages)
        tokens = (size // _BYTES_PER_TOKEN, len(missing) * self.protocol.expected_tokens)
        cost = None
        if prompt_price is not None and completion_price is not None:
            cost = (tokens[0] * prompt_price + tokens[1] * completion_price) / 1e6
        return Estimate(len(missing), len(cached), *tokens, cost)

    def _calls(self, items: Sequence[Item], responses: Sequence[str]) -> list[list[_Call]]:
        return [
            [self._call(item, response, order) for order in ORDERS]
            for item, response in zip(items, responses, strict=True)
        ]

    def _call(self, item: Item, response: str, order: Order) -> _Call:
        asked = self.protocol.ask(item, response, order)
        key = sha256_json({**self.model.identity, "order": order, "messages": asked.messages})
        return _Call(key, order, asked)

    def _replies(self, prompts: Mapping[str, Asked], label: str) -> dict[str, Reply]:
        """Cached replies, and those of the model to the rest, each kept as it comes."""
        replies = self.cache.get(prompts)
        missing = [key for key in prompts if key not in replies]
        unscored = 0

        def keep(index: int, reply: Reply) -> None:
            nonlocal unscored
            key = missing[index]
            if reply.finish_reason not in UNANSWERED:
                self.cache.put(key, reply)
            replies[key] = reply
            unscored += self.protocol.read(prompts[key], reply.text, reply.finish_reason).state != "scored"
            progress.update(len(replies), unscored=unscored)

        with Progress(label, len(prompts)) as progress:
            progress.update(len(replies))
            if missing:
                self.model.reply([prompts[key].messages for key in missing], keep)
        return replies

    def _rating(self, uniq_id: str, replies: tuple[OrderReply, ...]) -> Rating:
        states = {reply.state for reply in replies}
        if "refused" in states or "invalid" in states:
            return Rating(uniq_id, "refused" if "refused" in states else "invalid", None, None, replies)
        responses = [reply.response for reply in replies if reply.response is not None]
        references = [reply.reference for reply in replies if reply.reference is not None]
        if max(responses) - min(responses) > self.protocol.max_disagreement:
            return Rating(uniq_id, "inconsistent", None, None, replies)
        return Rating(uniq_id, "scored", fmean(responses), fmean(references), replies)

    def _order_reply(self, call: _Call, reply: Reply) -> OrderReply:
        read = self.protocol.read(call.asked, reply.text, reply.finish_reason)
        reference, response = read.first, read.second
        if call.order == "response_first":
            reference, response = response, reference
        return OrderReply(call.order, reference, response, read.state, *reply)

"""A language model as judge: every answer scored in both orders, no reply paid for twice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, NamedTuple

from align.evaluation.benchmarks.air_bench import Item
from align.evaluation.comparison import TIE_MARGIN
from align.evaluation.judged_answers import JudgedAnswer, Order, OrderReply, State
from align.evaluation.judges import canary
from align.evaluation.judges.chat_model import ChatModel, Reply, open_chat_model
from align.evaluation.judges.prompt import JudgePrompt, JudgeProtocol, Official, Strict
from align.evaluation.judges.reply_cache import ReplyCache
from align.run_folder.artifacts import sha256_json

ORDERS: tuple[Order, Order] = ("reference_first", "response_first")
_BYTES_PER_TOKEN = 4
"""UTF-8 bytes per token, roughly, over languages and tokenizers."""


class Estimate(NamedTuple):
    """The cost of judging. Tokens are estimates; `cost` is None where a price is unknown."""

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


def open_judge(
    model: str,
    cache: Path,
    *,
    url: str | None = None,
    protocol: Literal["strict", "official"] = "strict",
    parameters: Mapping[str, Any] | None = None,
    concurrency: int = 8,
    canary_items: int = 0,
) -> LLMJudge:
    """The judge model behind an OpenAI-compatible `url`; without one, that in the folder `model`.

    See `open_chat_model` and `LLMJudge`.
    """
    chat_model = open_chat_model(model, url, parameters or {}, concurrency)
    return LLMJudge(chat_model, cache, Official() if protocol == "official" else Strict(), canary_items)


class _Call(NamedTuple):
    key: str
    order: Order
    prompt: JudgePrompt


class LLMJudge:
    """Scores responses against the reference, by what a model replies in both orders.

    Args:
        model: answers the prompts.
        cache: the file of replies; one is enough for all models, prompts and parameters.
        protocol: how to prompt and to read, see `prompt`.
        canary_items: how many questions the tricks of `canary` are tried on when the judge is described; 0
            tries none, and a gate that wants the uplift will refuse.
    """

    is_free = False

    def __init__(
        self, model: ChatModel, cache: Path, protocol: JudgeProtocol | None = None, canary_items: int = 0
    ) -> None:
        self.model = model
        self.protocol = protocol or Strict()
        self.cache = ReplyCache(cache)
        self.canary_items = canary_items
        self.name = f"{model.name} ({self.protocol.name})"

    def judge(
        self, items: Sequence[Item], responses: Sequence[str], label: str | None = "judge"
    ) -> list[JudgedAnswer]:
        """One row per item, in order; an empty response is judged as the empty answer it is.

        Without a `label` no progress is shown.

        Raises:
            JudgeFailed: the model cannot be used. Replies so far are kept, the next call goes on from there.
        """
        pairs = self._calls(items, responses)
        replies = self._replies({call.key: call.prompt for pair in pairs for call in pair}, label)
        return [
            self._judged(item, response, [self._order_reply(call, replies[call.key]) for call in pair])
            for item, response, pair in zip(items, responses, pairs, strict=True)
        ]

    def describe(self, items: Sequence[Item]) -> dict[str, Any]:
        """Its name, model, protocol and prompt, and how far known tricks sway it."""
        points = canary.measure(self, items[: self.canary_items]) if self.canary_items else {}
        worst = max(points, key=points.__getitem__, default="")
        return {
            "name": self.name,
            "shares_ground_truth": False,
            "model": self.model.name,
            "protocol": self.protocol.name,
            "prompt_sha256": self.protocol.prompt_sha256,
            "tie_margin": TIE_MARGIN,
            "canary_uplift": fmean(points.values()) if points else None,
            "canary_worst": {"trick": worst, "points": points[worst]} if points else None,
        }

    def estimate(
        self,
        items: Sequence[Item],
        responses: Sequence[str],
        prompt_price: float | None = None,
        completion_price: float | None = None,
    ) -> Estimate:
        """The calls that `judge` would still make; prices are per million tokens, in any currency."""
        prompts = {call.key: call.prompt for pair in self._calls(items, responses) for call in pair}
        cached = self.cache.get(prompts)
        missing = [prompt for key, prompt in prompts.items() if key not in cached]
        size = sum(len(message["content"].encode()) for prompt in missing for message in prompt.messages)
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
        prompt = self.protocol.write(item, response, order)
        key = sha256_json({**self.model.identity, "order": order, "messages": prompt.messages})
        return _Call(key, order, prompt)

    def _replies(self, prompts: Mapping[str, JudgePrompt], label: str | None) -> dict[str, Reply]:
        def state_of(key: str, reply: Reply) -> State:
            return self.protocol.read(prompts[key], reply.text, reply.finish_reason).state

        return self.cache.complete(self.model, lambda key: prompts[key].messages, prompts, state_of, label)

    def _judged(self, item: Item, response: str, replies: Sequence[OrderReply]) -> JudgedAnswer:
        states = {reply.state for reply in replies}
        scores = [reply.response for reply in replies if reply.response is not None]
        references = [reply.reference for reply in replies if reply.reference is not None]
        state: State = "scored"
        if "refused" in states or "invalid" in states:
            state = "refused" if "refused" in states else "invalid"
        elif max(scores) - min(scores) > self.protocol.max_disagreement:
            state = "inconsistent"
        means = {"score": fmean(scores), "reference_score": fmean(references)} if state == "scored" else {}
        return JudgedAnswer.to(item, response, state=state, replies=tuple(replies), **means)

    def _order_reply(self, call: _Call, reply: Reply) -> OrderReply:
        reading = self.protocol.read(call.prompt, reply.text, reply.finish_reason)
        reference, response = reading.first, reading.second
        if call.order == "response_first":
            reference, response = response, reference
        return OrderReply(call.order, reference, response, reading.state, *reply)

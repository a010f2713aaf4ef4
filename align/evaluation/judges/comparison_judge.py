"""A chat model as annotator: it ranks the completions of comparisons on both axes, in both orders.

The rule: each comparison is put to the model as people see it and reversed, at temperature 0. A completion's
place is its mean rank over the two replies. Completions whose preference the order turns round are a tie, and
so is what stands between them; "all bad" counts where both replies say so. A comparison without two usable
replies has no judgement.

Retests, adjudications and corrections are not put to it: they measure people, or ask for a person's decision.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from align.evaluation.judged_answers import State
from align.evaluation.judges.chat_model import (
    NO_REPLY,
    UNANSWERED,
    ChatModel,
    JudgeMisconfigured,
    Message,
    Reply,
)
from align.evaluation.judges.prompt import (
    REFUSED,
    defused,
    encodable,
    fill,
    unguessable_mark,
    visible,
    without_thought,
)
from align.evaluation.judges.reply_cache import ReplyCache
from align.run_folder.artifacts import sha256_json
from preference_data.audio.encode import input_audio
from preference_data.prompts.prompts import transcript
from preference_data.schema import AXES, Axis, Comparison, Judgement, Prompt, Ranking

PROMPT = Path(__file__).with_name("comparison_prompt.txt")
Order = Literal["as_shown", "reversed"]
ORDERS: tuple[Order, Order] = ("as_shown", "reversed")
Outcome = Literal[
    "used", "no_reply", "too_long", "filtered", "refused", "cut", "not_json", "other_mark", "ranks"
]
"""What came of a reply. `no_reply`, `too_long`, `filtered`: the server turned the prompt away. `cut`: it
ended before its answer. `not_json`: it is no object of the wanted form. `other_mark`: not this prompt's.
`ranks`: not one rank for each completion."""

_FENCE = re.compile(r"\s*```(?:json)?\s*\n(.*?)\n?\s*```\s*", re.IGNORECASE | re.DOTALL)
_CLIPS_KEPT = 16
_TURNED_AWAY = 5
"""Prompts turned away, and none answered, after which the rest is not sent."""


class CannotJudge(ValueError):
    """A prompt that this judge can say nothing about."""


class RankingReply(NamedTuple):
    """A reply and the rankings in it, in the comparison's own places whatever the order; a row of a file."""

    comparison: str
    order: Order
    outcome: Outcome
    factuality: tuple[int, ...] | None
    behaviour: tuple[int, ...] | None
    text: str
    finish_reason: str | None
    prompt_tokens: int
    completion_tokens: int


class ModelJudgements(NamedTuple):
    """Judgements, and all replies behind them and behind those that could not be made: two a comparison."""

    judgements: list[Judgement]
    replies: list[RankingReply]


class _Axis(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    ranks: tuple[int, ...]
    all_bad: bool


class _Answer(BaseModel):
    """The JSON that the prompt wants."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    mark: str
    reason: str = ""
    factuality: _Axis
    behaviour: _Axis


class _Call(NamedTuple):
    key: str
    comparison: Comparison
    order: Order
    system: str
    user: str
    mark: str
    audios: tuple[str, ...]


class ComparisonJudge:
    """Has a chat model judge comparisons; no reply is paid for twice.

    Args:
        model: answers the prompts; it decodes at temperature 0 unless its parameters say otherwise.
        cache: the file of replies.
        wav_of: the bytes of a WAV file by the clip's path in a prompt, for a model that hears. None: it
            reads the prompt's description and reference instead.
    """

    def __init__(self, model: ChatModel, cache: Path, wav_of: Callable[[str], bytes] | None = None) -> None:
        self.model, self.cache = model, ReplyCache(cache)
        self._wav_of = lru_cache(_CLIPS_KEPT)(wav_of) if wav_of else None
        text = PROMPT.read_text(encoding="utf-8")
        self.prompt_sha256 = hashlib.sha256(text.encode()).hexdigest()
        system, hears, reads, self._user = re.split(r"\n=== \w+ ===\n", text.rstrip("\n"))
        self._system = system.replace("{source}", hears if wav_of else reads)

    @property
    def hears(self) -> bool:
        """Whether the model gets the clips."""
        return self._wav_of is not None

    def judge(
        self, comparisons: Sequence[Comparison], prompts: Mapping[str, Prompt], label: str | None = "judge"
    ) -> ModelJudgements:
        """Judge comparisons and gold, in their order.

        Raises:
            CannotJudge: the model cannot hear, and a prompt has no reference to judge by.
            JudgeFailed: the model cannot be used. Replies so far are kept, the next call goes on from there.
        """
        wanted = [item for item in comparisons if item.purpose in ("comparison", "gold")]
        self._check(prompts[item.prompt_id] for item in wanted)
        digests = self._digests({path for item in wanted for path in prompts[item.prompt_id].audios})
        calls = [
            self._call(item, prompts[item.prompt_id], order, digests) for item in wanted for order in ORDERS
        ]
        came = self._replies({call.key: call for call in calls}, label)
        replies = [self._read(call, came[call.key]) for call in calls]
        both = zip(wanted, replies[::2], replies[1::2], strict=True)
        judged = (self._judgement(item, (first, second)) for item, first, second in both)
        return ModelJudgements([item for item in judged if item], [reply for reply, _ in replies])

    def _check(self, prompts: Iterable[Prompt]) -> None:
        mute = {} if self.hears else {item.id: item for item in prompts if not item.answer_gt.strip()}
        if mute:
            raise CannotJudge(
                f"judge {self.model.name!r} cannot hear, and prompt {next(iter(mute))!r} has no reference in "
                f"answer_gt to judge by ({len(mute)} prompts have none). Next: a judge that hears (judge: "
                "{hears: true}), references in the corpus (a column `reference` of a manifest), or by: people"
            )

    def _digests(self, audios: Iterable[str]) -> dict[str, str]:
        wav_of = self._wav_of
        return {path: hashlib.sha256(wav_of(path)).hexdigest() for path in sorted(audios)} if wav_of else {}

    # ------------------------------------------------------------------ what is sent

    def _call(
        self, comparison: Comparison, prompt: Prompt, order: Order, digests: Mapping[str, str]
    ) -> _Call:
        texts = comparison.texts if order == "as_shown" else comparison.texts[::-1]
        background = {}
        if not self.hears:
            background = {"Description of the audio": prompt.meta_info, "Reference answer": prompt.answer_gt}
        question = {"Question": transcript(prompt) or "(The clip holds the question.)"}
        answers = {f"Answer {number}": text for number, text in enumerate(texts, 1)}
        groups = [_quotable(group) for group in (background, question, answers)]
        mark = unguessable_mark([text for group in groups for text in group.values()])
        slots = {
            **dict(
                zip(("background", "question", "answers"), (_quote(g, mark) for g in groups), strict=True)
            ),
            "places": ", ".join(f"<{name.lower()}>" for name in answers),
            "n": str(len(texts)),
            "mark": mark,
        }
        system, user = fill(self._system, slots), fill(self._user, slots)
        audios = prompt.audios if self.hears else ()
        heard = [digests[path] for path in audios]
        key = sha256_json({**self.model.identity, "system": system, "user": user, "clips": heard})
        return _Call(key, comparison, order, system, user, mark, audios)

    def _messages(self, call: _Call) -> tuple[Message, ...]:
        system: Message = {"role": "system", "content": call.system}
        if not self._wav_of:
            return system, {"role": "user", "content": call.user}
        clips = [input_audio(self._wav_of(path)) for path in call.audios]
        return system, {"role": "user", "content": [*clips, {"type": "text", "text": call.user}]}

    def _replies(self, calls: Mapping[str, _Call], label: str | None) -> dict[str, Reply]:
        answered = bool(self.cache.get(calls))
        turned_away = 0

        def state_of(key: str, reply: Reply) -> State:
            nonlocal answered, turned_away
            turned_away += reply.finish_reason == NO_REPLY
            answered = answered or reply.finish_reason not in UNANSWERED
            if turned_away >= _TURNED_AWAY and not answered:
                raise self._answers_nothing(turned_away, reply)
            outcome = self._read(calls[key], reply)[0].outcome
            return "scored" if outcome == "used" else "refused" if outcome == "refused" else "invalid"

        return self.cache.complete(self.model, lambda key: self._messages(calls[key]), calls, state_of, label)

    def _answers_nothing(self, turned_away: int, last: Reply) -> JudgeMisconfigured:
        step = "say hears: false if it cannot hear; else mend it" if self.hears else "mend it"
        return JudgeMisconfigured(
            f"judge {self.model.name!r} turned the first {turned_away} prompts away and answered none; last: "
            f"{visible(last.text)[:300]}. Next: {step} as the server says, then run the same command again"
        )

    # ------------------------------------------------------------------ what comes back

    def _read(self, call: _Call, reply: Reply) -> tuple[RankingReply, dict[Axis, Ranking]]:
        """The reply as a row, and its rankings in the comparison's own places; none where it is unusable."""
        outcome, rankings = _rankings(reply, call.mark, len(call.comparison.texts))
        if call.order == "reversed":
            rankings = {
                axis: ranking.model_copy(update={"ranks": ranking.ranks[::-1]})
                for axis, ranking in rankings.items()
            }
        row = RankingReply(
            call.comparison.id,
            call.order,
            outcome,
            rankings["factuality"].ranks if rankings else None,
            rankings["behaviour"].ranks if rankings else None,
            *reply,
        )
        return row, rankings

    def _judgement(
        self, comparison: Comparison, replies: Sequence[tuple[RankingReply, Mapping[Axis, Ranking]]]
    ) -> Judgement | None:
        if not all(rankings for _, rankings in replies):
            return None
        merged = {axis: merge(*(rankings[axis] for _, rankings in replies)) for axis in AXES}
        heard = 1.0 if self.hears else None
        return Judgement.of(comparison, self.model.name, "model", heard=heard, **merged)


def merge(first: Ranking, second: Ranking) -> Ranking:
    """Of two rankings of the same completions, the one by mean rank; what they contradict is tied."""
    n = len(first.ranks)
    means = [fmean(ranks) for ranks in zip(first.ranks, second.ranks, strict=True)]
    in_order = sorted(range(n), key=means.__getitem__)
    ranks, rank = [1] * n, 1
    for place in range(1, n):
        is_contradicted = any(
            any(reply.ranks[worse] < reply.ranks[better] for reply in (first, second))
            for better in in_order[:place]
            for worse in in_order[place:]
        )
        rank += means[in_order[place]] > means[in_order[place - 1]] and not is_contradicted
        ranks[in_order[place]] = rank
    return Ranking(ranks=tuple(ranks), all_bad=first.all_bad and second.all_bad)


def _rankings(reply: Reply, mark: str, n: int) -> tuple[Outcome, dict[Axis, Ranking]]:
    """What a reply says of `n` completions in the order of its prompt; nothing but a whole answer counts."""
    if reply.finish_reason in UNANSWERED:
        outcomes: dict[str | None, Outcome] = {"too_long": "too_long", "filtered": "filtered"}
        return outcomes.get(reply.finish_reason, "no_reply"), {}
    if reply.finish_reason in REFUSED:
        return "refused", {}
    text = without_thought(reply.text)
    if reply.finish_reason == "length" or text is None:
        return "cut", {}
    fenced = _FENCE.fullmatch(text)
    try:
        answer = _Answer.model_validate_json(fenced[1] if fenced else text.strip())
    except ValidationError:
        return "not_json", {}
    if answer.mark != mark:
        return "other_mark", {}
    axes: dict[Axis, _Axis] = {"factuality": answer.factuality, "behaviour": answer.behaviour}
    if any(len(item.ranks) != n or not set(item.ranks) <= set(range(1, n + 1)) for item in axes.values()):
        return "ranks", {}
    return "used", {axis: Ranking.dense(item.ranks, all_bad=item.all_bad) for axis, item in axes.items()}


def _quotable(texts: Mapping[str, str]) -> dict[str, str]:
    return {name: visible(defused(encodable(text))) for name, text in texts.items()}


def _quote(texts: Mapping[str, str], mark: str) -> str:
    return "".join(f"[{name}]\n<<{mark}\n{text}\n{mark}>>\n" for name, text in texts.items())

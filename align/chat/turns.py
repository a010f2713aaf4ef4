"""A question as it was put to one policy or two, and their answers in an order drawn for each turn."""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import AsyncGenerator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from align.models.chat import Message
from align.serving.errors import ApiError
from align.serving.prompts import Sound
from align.serving.service import PendingAnswer, Piece, Service
from preference_data.schema import (
    CHOICES,
    Comparison,
    Completion,
    Judgement,
    Prompt,
    Ranking,
    Turn,
    comparison_id,
    stable_id,
)

Choice = Literal["a", "b", "tie", "both_bad"]
_REMEMBERED = 30
"""Turns that can still be answered and judged. Their clips are held in memory."""


class Policy(NamedTuple):
    """A policy on the page: what people call it, the hash of its weights, and what answers for it."""

    name: str
    sha256: str
    service: Service


class Vote(BaseModel):
    """What somebody says of a turn's answers, and how much of its clips they had heard by then."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    better: Choice | None = None
    about: Literal["both", "factuality", "behaviour"] = "both"
    """On which axis `better` holds."""
    thumbs: list[bool | None] = Field(default=[], max_length=2)
    """Whether each answer is good, in the order in which they stand on the page."""
    heard: float | None = Field(None, ge=0, le=1)
    """Share of the clips that was played or recorded; the least over several."""
    keep: bool = False

    def ranking(self, axis: Literal["factuality", "behaviour"]) -> Ranking | None:
        """The order of both answers on an axis; None where nothing was said about it."""
        return CHOICES[self.better] if self.better and self.about in ("both", axis) else None


class Answer:
    """A policy's answer: its text as far as it has come, and why it ended."""

    def __init__(self, policy: Policy, pending: PendingAnswer) -> None:
        self.policy, self.pending = policy, pending
        self.text, self.n_tokens = "", 0
        self.finish: str | None = None
        """None: it still comes, or was stopped."""
        self.has_begun = False

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """Its text as it is drawn, kept here too.

        Raises:
            ApiError: it was asked for before, or the engine cannot answer.
        """
        if self.has_begun:
            raise ApiError("This answer was streamed already; ask again for another", 409)
        self.has_begun = True
        async for piece in self.policy.service.pieces(self.pending):
            self.text += piece.text
            self.finish, self.n_tokens = piece.finish or self.finish, piece.n_tokens or self.n_tokens
            yield piece


class TurnOfPolicies:
    """A question, and the answers of one policy or two in the order in which the page shows them."""

    def __init__(self, prompt: Prompt, sounds: Mapping[str, Sound], answers: Sequence[Answer]) -> None:
        self.id = secrets.token_urlsafe(12)
        self.prompt, self.sounds, self.answers = prompt, sounds, answers
        self.better: Choice | None = None
        """The vote; it holds, because whoever has given it has seen the names."""

    @property
    def names(self) -> list[str]:
        """Which policy gave which answer."""
        return [answer.policy.name for answer in self.answers]

    @property
    def is_same(self) -> bool:
        """Whether two answers are equal, so that none is better."""
        return len({answer.text for answer in self.answers}) < len(self.answers)

    @property
    def is_open(self) -> bool:
        """Whether the page may show the names: there is nothing left to be blind about."""
        return len(self.answers) == 1 or self.better is not None or self._is_whole() and self.is_same

    def vote(self, vote: Vote) -> None:
        """Take a vote on which answer is better.

        Raises:
            ApiError: there is nothing to vote on, or the names are known.
        """
        if not self._is_whole():
            raise ApiError("An answer was stopped or is still coming: only whole ones are judged", 409)
        if len(vote.thumbs) not in (0, len(self.answers)):
            raise ApiError(f"thumbs: {len(self.answers)} of them, or none", param="thumbs")
        if vote.better and len(self.answers) == 1:
            raise ApiError("better: there is a single answer; give a thumb", param="better")
        if vote.better and self.is_same:
            raise ApiError("better: both answers are the same; give a thumb", param="better")
        if self.better and vote.better != self.better:
            raise ApiError("The names are known since the first vote, so it holds; or ask again", 409)
        if not vote.better and not self.is_open:
            raise ApiError("better: say which answer is, or that both are bad or the same", param="better")
        if not vote.better and not any(thumb is not None for thumb in vote.thumbs):
            raise ApiError("thumbs: there is none", param="thumbs")
        self.better = vote.better

    def completions(self) -> list[Completion]:
        """The answers as records, equal ones once."""
        made: dict[str, Completion] = {}
        for index, answer in enumerate(self.answers):
            sha = answer.policy.sha256
            made.setdefault(
                answer.text,
                Completion(
                    id=stable_id(self.prompt.id, sha, answer.text),
                    prompt_id=self.prompt.id,
                    index=index,
                    text=answer.text,
                    policy=sha,
                    n_tokens=answer.n_tokens or None,
                ),
            )
        return list(made.values())

    def comparison(self) -> Comparison | None:
        """Both answers in the order in which they were shown; None of a single one."""
        completions = self.completions()
        if len(completions) == 1:
            return None
        texts = tuple(item.text for item in completions)
        return Comparison(
            id=comparison_id(self.prompt.id, texts),
            prompt_id=self.prompt.id,
            completions=tuple(item.id for item in completions),
            texts=texts,
            everyone=False,
        )

    def judgement(self, vote: Vote, annotator: str) -> Judgement:
        """A vote as a record; one without a ranking is a rating."""
        completions, comparison = self.completions(), self.comparison()
        texts = tuple(item.text for item in completions)
        about = comparison.id if comparison else comparison_id(self.prompt.id, texts)
        thumbs = tuple(vote.thumbs[: len(texts)])
        return Judgement(
            id=stable_id(about, annotator),
            comparison=about,
            prompt_id=self.prompt.id,
            completions=tuple(item.id for item in completions),
            texts=texts,
            kind="choice" if vote.better else "rating",
            annotator=annotator,
            annotator_kind="person",
            factuality=vote.ranking("factuality"),
            behaviour=vote.ranking("behaviour"),
            thumbs=thumbs if any(thumb is not None for thumb in thumbs) else (),
            submitted_at=datetime.now(UTC).isoformat(timespec="seconds"),
            heard=vote.heard if self.sounds else 1.0,
        )

    def _is_whole(self) -> bool:
        return all(answer.finish for answer in self.answers)


class Turns:
    """The last turns of all pages, by id; the oldest are forgotten."""

    def __init__(self, policies: Sequence[Policy]) -> None:
        self.policies = policies
        self._turns: OrderedDict[str, TurnOfPolicies] = OrderedDict()

    def begin(self, body: bytes) -> TurnOfPolicies:
        """Read a conversation in OpenAI's form and draw who answers first; blocks while clips are decoded.

        Raises:
            ApiError: see `Service.read_chat`; or its turns do not alternate.
        """
        pending = [policy.service.read_chat(body)[1] for policy in self.policies]
        answers = [Answer(policy, each) for policy, each in zip(self.policies, pending, strict=True)]
        secrets.SystemRandom().shuffle(answers)
        sounds = [(clip_path(sound), sound) for sound in pending[0].prompt.sounds]
        prompt = prompt_of(pending[0].prompt.messages, [path for path, _ in sounds])
        turn = TurnOfPolicies(prompt, dict(sounds), answers)
        self._turns[turn.id] = turn
        while len(self._turns) > _REMEMBERED:
            self._turns.popitem(last=False)
        return turn

    def find(self, name: str) -> TurnOfPolicies:
        """The turn of this id.

        Raises:
            ApiError: there is none.
        """
        if name not in self._turns:
            message = f"There is no turn {name[:40]!r}: the server remembers {_REMEMBERED}; ask again"
            raise ApiError(message, 404)
        return self._turns[name]


def clip_path(sound: Sound) -> str:
    """Where a clip is kept, below the folder of what is kept: named by what it was sent as."""
    return f"clips/{sound.sha256[:32]}.wav"


def prompt_of(messages: Sequence[Message], clips: Sequence[str]) -> Prompt:
    """A conversation up to its last question as a record.

    Raises:
        ApiError: its turns do not alternate, or a clip stands behind a text: training has clips first.
    """
    has_system = messages[0]["role"] == "system"
    rest = list(messages[1:] if has_system else messages)
    roles = [message["role"] for message in rest]
    if roles != (["user", "assistant"] * len(roles))[: len(roles)]:
        raise ApiError("messages: user and assistant must take turns", param="messages")
    places = iter(clips)
    asked = [(_text(message), _own_clips(message, places)) for message in rest[::2]]
    history = tuple(
        Turn(question=text, answer=_text(answer), audios=own)
        for (text, own), answer in zip(asked, rest[1::2], strict=False)
    )
    parts: dict[str, Any] = {
        "system": _text(messages[0]) or None if has_system else None,
        "audios": tuple(clips),
        "history": history,
        "question": asked[-1][0],
    }
    earlier = [turn.model_dump_json() for turn in history]
    name = stable_id("chat", parts["system"], *clips, *earlier, asked[-1][0])
    try:
        return Prompt(id=name, answer_gt="", meta_info="", task_name="chat", **parts)
    except ValueError as error:
        message = f"messages: a turn has neither a text nor a clip ({error})"
        raise ApiError(message, param="messages") from None


def _text(message: Message) -> str:
    return "".join(part["text"] or "" for part in message["content"])


def _own_clips(message: Message, places: Any) -> tuple[str, ...]:
    kinds = [part["type"] for part in message["content"]]
    n = kinds.count("audio")
    if "audio" in kinds[n:]:
        raise ApiError("messages: a turn's clips stand before its text", param="messages")
    return tuple(next(places) for _ in range(n))

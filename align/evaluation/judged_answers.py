"""A policy's answers with what the judge made of them: one row per question, kept as JSON lines.

Judges return these rows, `comparison` sets two policies' rows side by side, and the pages read them back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from pydantic import BaseModel, ConfigDict, model_validator

from align.evaluation.benchmarks.air_bench import Item
from preference_data.schema import AXES, Axis
from preference_data.store import BadRecord, write_rows
from preference_data.store import read as read_records

State = Literal["scored", "invalid", "refused", "inconsistent"]
"""`invalid`: no usable score in a reply; `refused`: the judge declined; `inconsistent`: both orders gave
scores but disagree too much for their mean to say anything."""

Order = Literal["reference_first", "response_first"]
"""Which answer stands first in the judge's prompt."""


class OrderReply(NamedTuple):
    """One call: the judge's words and the scores read from them, already assigned to their answers.

    `reference` and `response` are None unless `state` is "scored"; a single reply is never "inconsistent".
    """

    order: Order
    reference: float | None
    response: float | None
    state: State
    text: str
    finish_reason: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0


class JudgedAnswer(BaseModel):
    """One benchmark question, a policy's answer and what the judge made of it.

    Scores are means over both orders, on the judge's scale; None unless `state` is "scored". An inconsistent
    answer keeps its scores in `replies`. The yes-or-no marks are None where a judge gives none.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    uniq_id: str | int
    task_name: str
    category: str
    audio: str
    """Path relative to the evaluation's folder of audio."""
    question: str
    answer_gt: str
    response: str = ""
    score: float | None = None
    state: State = "scored"
    reference_score: float | None = None
    replies: tuple[OrderReply, ...] = ()
    factual: bool | None = None
    behaves: bool | None = None
    fact_is_right: bool | None = None
    """Whether what the question asks for is right, whatever else the answer claims."""
    abstains: bool | None = None
    answerable: bool | None = None
    kind: str = ""
    """Kind of question: what the judge calls it, else its task; empty where nobody noted it."""
    entropy: float | None = None
    """Nats per token of the answer; None where its log-probabilities are not known."""

    @model_validator(mode="after")
    def _a_score_goes_with_its_state(self) -> JudgedAnswer:
        if (self.state == "scored") != (self.score is not None):
            raise ValueError(f"state {self.state!r} does not go with score {self.score!r}")
        return self

    @classmethod
    def to(cls, item: Item, response: str, **judged: Any) -> JudgedAnswer:
        """The row of an answer to a benchmark's question; `judged` holds score, state, marks or replies."""
        return cls(
            uniq_id=item.uniq_id,
            task_name=item.task_name,
            category=item.category,
            audio=item.audio,
            question=item.question,
            answer_gt=item.answer_gt,
            response=response,
            **{"kind": item.task_name, **judged},
        )

    def mark(self, metric: str) -> bool | None:
        """A metric's yes-or-no mark; None where the question cannot show it or the judge gives none."""
        if metric == "factuality":
            return self.factual
        if metric == "behaviour":
            return self.behaves
        is_shown = self.answerable is (metric == "fact_accuracy")
        return self.fact_is_right if is_shown else None


class Judge(Protocol):
    """Scores a policy's answers. `is_free`: judging costs nothing, so that controls may be judged, too."""

    is_free: bool

    def judge(
        self, items: Sequence[Item], responses: Sequence[str], label: str = "judge"
    ) -> list[JudgedAnswer]:
        """One row per item, in order; `label` names the work in progress reports."""
        ...

    def describe(self, items: Sequence[Item]) -> dict[str, Any]:
        """The judge's identity and limits, for `scores.json`; some of `items` may be used to try it."""
        ...


def preference_points(answers: Sequence[JudgedAnswer]) -> dict[Axis, list[float | None]]:
    """By axis, the value that says which of two answers is better: its mark, else the overall score."""
    return {
        axis: [answer.score if (mark := answer.mark(axis)) is None else float(mark) for answer in answers]
        for axis in AXES
    }


def write(path: Path, answers: Sequence[JudgedAnswer], audio_prefix: str = "") -> None:
    """Write the rows as JSON lines, every reply included; `audio_prefix` goes before each clip's path."""
    write_rows(
        path,
        (
            {
                **answer.model_dump(exclude={"replies"}, exclude_unset=True),
                "audio": audio_prefix + answer.audio,
                "replies": [reply._asdict() for reply in answer.replies],
            }
            for answer in answers
        ),
    )


def read(path: Path) -> dict[str | int, JudgedAnswer]:
    """The rows of a file by `uniq_id`, in its order.

    Raises:
        FileNotFoundError: there is no such file.
        BadRecord: naming the file, the line and the problem.
    """
    rows = read_records(path, JudgedAnswer)
    if duplicates := [key for key, n in Counter(row.uniq_id for row in rows).items() if n > 1]:
        raise BadRecord(f"{path}: uniq_id {duplicates[0]!r} is there twice")
    return {row.uniq_id: row for row in rows}

"""What a judge returns: one rating per item, with every reply it rests on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from preference_data.store import write_rows

State = Literal["scored", "invalid", "refused", "inconsistent"]
"""`invalid`: no usable score in a reply; `refused`: the judge declined; `inconsistent`: both orders gave
scores but disagree too much for their mean to say anything."""

Order = Literal["reference_first", "response_first"]
"""Which answer stands first in the prompt."""


class OrderReply(NamedTuple):
    """One call: the judge's words and the scores read from them, already assigned to their answers.

    `reference` and `response` are None unless `state` is "scored"; a single reply is never "inconsistent".
    """

    order: Order
    reference: float | None
    response: float | None
    state: State
    text: str
    finish_reason: str | None
    prompt_tokens: int
    completion_tokens: int


class Rating(NamedTuple):
    """One item's outcome. Scores are means over the orders, on the judge's scale; None unless scored.

    An inconsistent item keeps its scores in `replies`.
    """

    uniq_id: str
    state: State
    score: float | None
    reference: float | None
    replies: tuple[OrderReply, ...]


def write_replies(path: Path, ratings: Sequence[Rating]) -> None:
    """Every rating with every raw reply, as JSON lines."""
    rows = [
        {**rating._asdict(), "replies": [reply._asdict() for reply in rating.replies]} for rating in ratings
    ]
    write_rows(path, rows)

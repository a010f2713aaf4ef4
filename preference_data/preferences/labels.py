"""Completions that are good or bad on their own -> labels, by stated rules; KTO trains on them.

Judgements -> labels, one axis at a time:

1. Votes are those of `pairs`: no retests, no gold, the clip was heard.
2. A vote for a side says that it is good and that the other is bad; "both bad" says the latter of both. A tie
   says nothing.
3. A completion is labelled when at least `min_agreement` of what was said about it agrees.

Scores -> labels: a reward of at least `good_from` is good, one of at most `bad_to` bad, between is neither.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from preference_data.preferences import agreement
from preference_data.schema import (
    Axis,
    Completion,
    CompletionScore,
    Judgement,
    Label,
    Prompt,
    stable_id,
)


class Tally(NamedTuple):
    """How many completions became which label."""

    desirable: int
    undesirable: int
    undecided: int
    """Something was said about them, but not clearly."""


def of_judgements(
    judgements: Iterable[Judgement],
    prompts: Mapping[str, Prompt],
    completions: Mapping[str, Completion],
    *,
    axis: Axis,
    min_agreement: float,
    min_heard: float,
) -> tuple[list[Label], Tally]:
    """Labels on an axis by the rules above."""
    said: dict[str, list[bool]] = defaultdict(list)
    for item in judgements:
        if item.purpose != "comparison" or not agreement.is_vote(item, min_heard):
            continue
        choice = getattr(item, axis)
        if choice != "tie":
            said[item.completion_a].append(choice == "a")
            said[item.completion_b].append(choice == "b")
    verdicts: dict[str, bool | None] = {}
    for completion, votes in said.items():
        share = sum(votes) / len(votes)
        is_good = share >= 0.5
        verdicts[completion] = is_good if max(share, 1 - share) >= min_agreement else None
    return _labels(verdicts, prompts, completions, source=axis)


def of_scores(
    scores: Iterable[CompletionScore],
    prompts: Mapping[str, Prompt],
    completions: Mapping[str, Completion],
    *,
    good_from: float,
    bad_to: float,
) -> tuple[list[Label], Tally]:
    """Labels by a reward. Completions without one are left out."""
    verdicts = {
        score.id: True if score.reward >= good_from else False if score.reward <= bad_to else None
        for score in scores
        if score.reward is not None
    }
    return _labels(verdicts, prompts, completions, source="reward")


def _labels(
    verdicts: Mapping[str, bool | None],
    prompts: Mapping[str, Prompt],
    completions: Mapping[str, Completion],
    source: str,
) -> tuple[list[Label], Tally]:
    """A label for every completion with a verdict; the same text to the same prompt is labelled once."""
    labels: dict[str, Label] = {}
    for id_, is_good in verdicts.items():
        if is_good is None or not completions[id_].text:
            continue
        prompt, text = prompts[completions[id_].prompt_id], completions[id_].text
        key = stable_id(prompt.id, text, source)
        labels.setdefault(
            key,
            Label(
                id=key,
                prompt_id=prompt.id,
                prompt=prompt.messages,
                completion=text,
                audios=prompt.audios,
                label=is_good,
                source=source,
            ),
        )
    good = sum(label.label for label in labels.values())
    undecided = sum(is_good is None for is_good in verdicts.values())
    return list(labels.values()), Tally(good, len(labels) - good, undecided)

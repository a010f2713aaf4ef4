"""Completions that annotators typed, and whether somebody else approves them.

A typed completion is the claim of one person that it is better than what was compared. It is approved on an
axis when another annotator has compared it (a judgement whose purpose is "correction") and ranks it strictly
above everything beside it, and not everything as bad. White space around it does not count.
"""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

from preference_data.preferences.rules import CountedJudgements
from preference_data.preferences.votes import FIRST, SECOND, subject, vote
from preference_data.schema import Axis, Judgement


class Correction(NamedTuple):
    """A typed completion of a prompt."""

    prompt_id: str
    text: str
    typists: frozenset[str]
    annotators: frozenset[str]
    """Who judged the comparisons that it was typed for, and the typists."""
    worse: tuple[str, ...]
    """The texts of these comparisons, sorted, without its own."""
    reviews: tuple[Judgement, ...]
    """Judgements of it by others than the typists, the last of each."""


def find(counted: CountedJudgements) -> list[Correction]:
    """What counted annotators typed, also while they decided, sorted by prompt and text."""
    typed: dict[tuple[str, str], list[Judgement]] = defaultdict(list)
    for item in (*counted.votes, *counted.adjudications, *counted.corrections):
        if text := (item.corrected or "").strip():
            typed[item.prompt_id, text].append(item)
    by_comparison: dict[str, set[str]] = {subject(item): set() for own in typed.values() for item in own}
    for item in counted.votes:
        if subject(item) in by_comparison:
            by_comparison[subject(item)].add(item.annotator)
    judged: dict[tuple[str, str], list[Judgement]] = defaultdict(list)
    for review in counted.corrections:
        for text in {text.strip() for text in review.texts}:
            judged[review.prompt_id, text].append(review)
    return [
        _correction(own, text, by_comparison, judged[prompt, text])
        for (prompt, text), own in sorted(typed.items())
    ]


def place_of(review: Judgement, text: str) -> int | None:
    """Where a review has a text, whatever white space is around it."""
    return next((i for i, other in enumerate(review.texts) if other.strip() == text.strip()), None)


def is_approval(review: Judgement, text: str, axis: Axis) -> bool:
    """Whether a review ranks a typed text strictly above all others, and something is good."""
    ranking = review.ranking(axis)
    own = place_of(review, text)
    if ranking is None or own is None:
        return False
    return all(ranking.prefers(own, place) for place in range(len(review.texts)) if place != own)


def is_reviewed(item: Correction, axis: Axis) -> bool:
    """Whether anybody else has judged it on an axis, whatever they say."""
    return any(review.ranking(axis) is not None for review in item.reviews)


def leads(item: Correction, worse: str, axis: Axis) -> dict[str, int]:
    """By annotator, 1 if they prefer a typed completion to a text, -1 if they prefer the text, 0 if neither.

    Its typists prefer it. Empty where nobody who had the two beside each other approves it.
    """
    side = dict.fromkeys(sorted(item.typists), 1)
    is_approved = False
    for review in item.reviews:
        ranking = review.ranking(axis)
        own, other = place_of(review, item.text), place_of(review, worse)
        if ranking is not None and own is not None and other is not None:
            side[review.annotator] = {FIRST: 1, SECOND: -1}.get(vote(ranking, own, other), 0)
            is_approved |= is_approval(review, item.text, axis)
    return side if is_approved else {}


def _correction(
    given: list[Judgement], text: str, by_comparison: dict[str, set[str]], judged: list[Judgement]
) -> Correction:
    typists = frozenset(item.annotator for item in given)
    reviews = {
        item.annotator: item
        for item in sorted(judged, key=lambda item: (item.submitted_at or "", item.id))
        if item.annotator not in typists
    }
    return Correction(
        given[0].prompt_id,
        text,
        typists,
        typists.union(*(by_comparison[subject(item)] for item in given)),
        tuple(sorted({worse for item in given for worse in item.texts if worse.strip() != text})),
        tuple(reviews[name] for name in sorted(reviews)),
    )

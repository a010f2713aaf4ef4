"""Judgements as votes: which of them are opinions, and what each says of every pair of its completions.

A judgement of K completions holds K (K - 1) / 2 votes, one for each pair. Agreement, weights of annotators
and preference pairs are all counted from the same table.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from preference_data.schema import MOST_COMPARED, Axis, Judgement, Ranking

FIRST, SECOND, TIE, BOTH_BAD = range(4)
"""What a vote says of two completions, in the order of places: the first is better, the second is, ..."""
VALUES = (FIRST, SECOND, TIE, BOTH_BAD)
PLACE_PAIRS = tuple((i, j) for j in range(MOST_COMPARED) for i in range(j))
"""Pairs of places. Of K completions the first K (K - 1) / 2 of them."""
_I, _J = (np.array(side) for side in zip(*PLACE_PAIRS, strict=True))


class VoteTable(NamedTuple):
    """Votes on an axis, a row for each judgement and pair of its completions; all but two are columns."""

    subjects: Sequence[Judgement]
    """By number of a comparison, sorted by id: a judgement whose order of completions the votes have."""
    annotators: Sequence[str]
    """By number, sorted."""
    comparison: npt.NDArray[np.intp]
    annotator: npt.NDArray[np.intp]
    pair: npt.NDArray[np.intp]
    """Number within `PLACE_PAIRS`, of the places in the subject's order."""
    value: npt.NDArray[np.intp]


def is_heard(judgement: Judgement, min_heard: float) -> bool:
    """Whether its annotator had played at least that share of the clip; of people, unknown is not heard.

    A model that cannot hear counts: it has to agree with people who can, see `model_agreement`.
    """
    return (1.0 if judgement.annotator_kind == "model" else judgement.heard or 0.0) >= min_heard


def subject(judgement: Judgement) -> str:
    """The comparison that a judgement is about: its own, or the one that it repeats."""
    return judgement.about or judgement.comparison


def opinions(judgements: Iterable[Judgement]) -> list[Judgement]:
    """Judgements that say which completion is better, sorted by id; the others measure annotators.

    These are the comparisons, and retests by annotators who did not judge the comparison itself: theirs is a
    second opinion. A retest by the same annotator tells about the annotator alone. Nobody has two opinions
    on a comparison.
    """
    ordered = sorted(judgements, key=lambda item: item.id)
    by_annotator = {
        (item.comparison, item.annotator): item for item in ordered if item.purpose == "comparison"
    }
    for item in ordered:
        if item.purpose == "retest":
            by_annotator.setdefault((subject(item), item.annotator), item)
    kept = {item.id for item in by_annotator.values()}
    return [item for item in ordered if item.id in kept]


def counted(judgements: Iterable[Judgement], min_heard: float) -> list[Judgement]:
    """Opinions of those who heard the clip and found it usable."""
    return [item for item in opinions(judgements) if not item.audio_unusable and is_heard(item, min_heard)]


def vote(ranking: Ranking, first: int, second: int) -> int:
    """What a ranking says of the completions in two places. All bad is both bad of every two."""
    if ranking.all_bad:
        return BOTH_BAD
    if ranking.ranks[first] == ranking.ranks[second]:
        return TIE
    return FIRST if ranking.prefers(first, second) else SECOND


def places_in(judgement: Judgement, texts: Sequence[str]) -> list[int]:
    """Where a judgement has each of `texts`.

    Raises:
        ValueError: it does not hold one of them.
    """
    try:
        return [judgement.texts.index(text) for text in texts]
    except ValueError:
        raise ValueError(
            f"judgement {judgement.id} of {judgement.annotator} repeats comparison {subject(judgement)}, but "
            "has other texts: judgements of two data sets are mixed; pull them again"
        ) from None


def tabulate(judgements: Iterable[Judgement], axis: Axis) -> VoteTable:
    """All votes of judgements on an axis; ratings, which have no order, hold none."""
    ranked: list[tuple[Judgement, Ranking]] = []
    for item in judgements:
        ranking = item.ranking(axis)
        if ranking is not None and len(ranking.ranks) > 1:
            ranked.append((item, ranking))
    subjects = _subjects(item for item, _ in ranked)
    number = {name: i for i, name in enumerate(subjects)}
    annotators = sorted({item.annotator for item, _ in ranked})
    code = {name: i for i, name in enumerate(annotators)}
    blank = (0,) * MOST_COMPARED
    ranks = np.array(
        [(*_in_order(item, ranking, subjects), *blank)[:MOST_COMPARED] for item, ranking in ranked], np.int8
    ).reshape(-1, MOST_COMPARED)
    all_bad = np.array([ranking.all_bad for _, ranking in ranked], bool)
    first, second = ranks[:, _I], ranks[:, _J]
    values = np.select(
        [all_bad[:, None] & (second > 0), first < second, first > second], [BOTH_BAD, FIRST, SECOND], TIE
    )
    row, pair = np.nonzero(second)  # places that hold nothing have no rank
    return VoteTable(
        list(subjects.values()),
        annotators,
        np.array([number[_ordered_like(item)] for item, _ in ranked], np.intp)[row],
        np.array([code[item.annotator] for item, _ in ranked], np.intp)[row],
        pair,
        values[row, pair].astype(np.intp),
    )


def _ordered_like(judgement: Judgement) -> str:
    """The comparison whose order of completions a judgement's votes have: a retest is brought into it."""
    return subject(judgement) if judgement.purpose == "retest" else judgement.comparison


def _subjects(judgements: Iterable[Judgement]) -> dict[str, Judgement]:
    """For each comparison a judgement of itself, else of what repeats it; sorted by id."""
    best: dict[str, Judgement] = {}
    for item in judgements:
        name = _ordered_like(item)
        other = best.get(name)
        if other is None or (item.about is not None, item.comparison) < (
            other.about is not None,
            other.comparison,
        ):
            best[name] = item
    return dict(sorted(best.items()))


def _in_order(judgement: Judgement, ranking: Ranking, subjects: Mapping[str, Judgement]) -> Sequence[int]:
    """Ranks in the order in which the subject has the completions."""
    texts = subjects[_ordered_like(judgement)].texts
    if texts == judgement.texts:
        return ranking.ranks
    return [ranking.ranks[place] for place in places_in(judgement, texts)]

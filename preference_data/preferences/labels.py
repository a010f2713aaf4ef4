"""Completions that are good or bad on their own -> labels, by stated rules; KTO trains on them.

Judgements -> labels, one axis at a time:

1. The judgements are those of `rules`: no controls, annotators who count, heard, with usable audio.
2. A thumb says of a completion that it is good or bad. A ranking says that the only completion in first place
   is good and the only one in last place bad; where all are bad it says so of each. Of ties and of the middle
   it says nothing.
3. What says more directly outweighs: of a completion that has thumbs these alone count. An adjudicator's
   judgement outweighs both. An annotator counts once, with the average of what they say.
4. A completion is labelled when at least `min_agreement` of what was said about it agrees.
5. A label weighs its evidence, as a pair does (`pairs.evidence`), scaled to average 1 over all.

What annotators typed is not labelled.

Scores -> labels: a reward of at least `good_from` is good, one of at most `bad_to` bad, between is neither.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from preference_data.preferences.pairs import ROUNDING, evidence
from preference_data.preferences.rules import CountedJudgements
from preference_data.schema import (
    Axis,
    Completion,
    CompletionScore,
    Judgement,
    Label,
    Prompt,
    Ranking,
    stable_id,
)

_BY_RANKING, _BY_THUMB, _BY_ADJUDICATOR = range(3)
"""How directly something is said; more outweighs less."""


class Tally(NamedTuple):
    """How many completions became which label."""

    desirable: int
    undesirable: int
    undecided: int
    """Something was said about them, but not clearly."""


class _Statement(NamedTuple):
    """That somebody says of a text that it is good, or bad, and how directly."""

    directness: int
    annotator: str
    is_good: bool


class _Verdict(NamedTuple):
    """Whether a text is good, None where that is undecided, and who says so."""

    is_good: bool | None
    judges: int = 1
    agree: float = 1.0
    total: float = 1.0
    """Votes, by weight."""


def of_judgements(
    counted: CountedJudgements, prompts: Mapping[str, Prompt], *, axis: Axis, min_agreement: float
) -> tuple[list[Label], Tally]:
    """Labels on an axis by the rules above."""
    said: dict[tuple[str, str], list[_Statement]] = defaultdict(list)
    for item in counted.votes:
        for text, directness, is_good in _statements(item, axis):
            said[item.prompt_id, text].append(_Statement(directness, item.annotator, is_good))
    for item in counted.adjudications:
        for text, _, is_good in _statements(item, axis):
            said[item.prompt_id, text].append(_Statement(_BY_ADJUDICATOR, item.annotator, is_good))
    weights = counted.weights[axis]
    verdicts = {
        key: verdict
        for key, statements in sorted(said.items())
        if (verdict := _verdict(statements, weights, min_agreement))
    }
    clear = {key: verdict for key, verdict in verdicts.items() if verdict.is_good is not None and key[1]}
    sure = evidence(
        [verdict.agree for verdict in clear.values()],
        [verdict.total - verdict.agree for verdict in clear.values()],
    )
    weight = dict(zip(clear, (sure / sure.mean() if clear else sure).tolist(), strict=True))
    return _labels(verdicts, prompts, axis, weight)


def of_scores(
    scores: Iterable[CompletionScore],
    prompts: Mapping[str, Prompt],
    completions: Mapping[str, Completion],
    *,
    good_from: float,
    bad_to: float,
) -> tuple[list[Label], Tally]:
    """Labels by a reward. Completions without one are left out."""
    verdicts: dict[tuple[str, str], _Verdict] = {}
    for score in scores:
        if score.reward is not None:
            is_good = True if score.reward >= good_from else False if score.reward <= bad_to else None
            completion = completions[score.id]
            verdicts.setdefault((completion.prompt_id, completion.text), _Verdict(is_good))
    return _labels(verdicts, prompts, "reward", {})


def _statements(item: Judgement, axis: Axis) -> Iterator[tuple[str, int, bool]]:
    """(text, how directly, whether it is good) for all that a judgement says."""
    ranking = item.ranking(axis)
    for place, text in enumerate(item.texts):
        thumb = item.thumbs[place] if item.thumbs else None
        if thumb is not None:
            yield text, _BY_THUMB, thumb
        elif ranking is not None and (is_good := _by_ranking(ranking, place)) is not None:
            yield text, _BY_RANKING, is_good


def _by_ranking(ranking: Ranking, place: int) -> bool | None:
    rank, last = ranking.ranks[place], max(ranking.ranks)
    if ranking.all_bad:
        return False
    if last == 1 or rank not in (1, last) or ranking.ranks.count(rank) > 1:
        return None
    return rank == 1


def _verdict(
    said: Sequence[_Statement], weights: Mapping[str, float], min_agreement: float
) -> _Verdict | None:
    """What annotators say of a text together; None if nothing that they say is worth anything."""
    most = max(statement.directness for statement in said)
    by_annotator: dict[str, list[bool]] = {}
    for statement in said:
        if statement.directness == most:
            by_annotator.setdefault(statement.annotator, []).append(statement.is_good)
    weight = {name: weights.get(name, 1.0) for name in sorted(by_annotator)}
    total = sum(weight.values())
    if not total:
        return None
    good = sum(worth * sum(by_annotator[name]) / len(by_annotator[name]) for name, worth in weight.items())
    is_good = 2 * good >= total
    agree = good if is_good else total - good
    if agree < (min_agreement - ROUNDING) * total:
        return _Verdict(None)
    return _Verdict(is_good, sum(worth > 0 for worth in weight.values()), agree, total)


def _labels(
    verdicts: Mapping[tuple[str, str], _Verdict],
    prompts: Mapping[str, Prompt],
    source: str,
    weights: Mapping[tuple[str, str], float],
) -> tuple[list[Label], Tally]:
    """A label for every text of a prompt with a verdict; it weighs 1 unless `weights` says otherwise."""
    labels = [
        Label(
            id=stable_id(prompt_id, text, source),
            prompt_id=prompt_id,
            prompt=prompts[prompt_id].messages,
            completion=text,
            audios=prompts[prompt_id].audios,
            label=verdict.is_good,
            weight=weights.get((prompt_id, text), 1.0),
            source=source,
            judges=verdict.judges,
            agreement=min(verdict.agree / verdict.total, 1.0),
        )
        for (prompt_id, text), verdict in verdicts.items()
        if verdict.is_good is not None and text
    ]
    good = sum(label.label for label in labels)
    undecided = sum(verdict.is_good is None for verdict in verdicts.values())
    return labels, Tally(good, len(labels) - good, undecided)

"""How much an annotator's votes are worth, by the model of Dawid and Skene.

Dawid & Skene, "Maximum Likelihood Estimation of Observer Error-Rates Using the EM Algorithm" (1979): every
annotator has a confusion matrix, what they say given what is true, which is learnt together with the truth
of each pair from the votes of all. crowd-kit fits it; gold is given to it as truth.

An annotator's weight is how much more often they prefer a completion where it is the better one than where
it is the worse one, averaged over both places, and not below 0. That is their balanced accuracy above chance
with a tie as half a vote. It looks at strict preferences alone, for only these make pairs. Somebody who
always takes the first place has 0, as has somebody who guesses, or who always ties; whoever guesses in 5 % of
judgements has 0.95.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from preference_data.preferences.votes import FIRST, PLACE_PAIRS, SECOND, VALUES, VoteTable, tabulate, vote
from preference_data.schema import Axis, Judgement

PRIOR_VOTES = 4.0
"""Every annotator is taken to have given as many votes more on each truth as all of them do on average, so
that of few votes none is certain."""
_ITERATIONS = 50
ENOUGH_ANNOTATORS = 3
"""Of two that disagree nobody can say who errs, unless something is known."""


class UnknownWeights(ValueError):
    """Too few votes in common, or known, to say whose are worth more."""


class _Votes(NamedTuple):
    """Votes on tasks, by number, as the model takes them."""

    task: npt.NDArray[np.intp]
    annotator: npt.NDArray[np.intp]
    value: npt.NDArray[np.intp]
    truth: dict[int, int]
    """Of tasks whose truth is known."""


def dawid_skene(votes: Sequence[Judgement], gold: Sequence[Judgement]) -> dict[Axis, dict[str, float]]:
    """Axis -> annotator -> weight from 0 to 1, for everybody who voted.

    Gold tells of factuality alone. Where behaviour has too few votes in common, the weights are those on
    factuality: whoever guesses or goes by the place does so on both.

    Args:
        votes: judgements that count, see `votes.counted`.
        gold: usable judgements whose truth on factuality is known.

    Raises:
        UnknownWeights: no comparison was judged by three annotators, and none is known.
    """
    factuality = _weights(votes, gold, "factuality")
    try:
        behaviour = _weights(votes, (), "behaviour")
    except UnknownWeights:
        behaviour = factuality
    return {"factuality": factuality, "behaviour": behaviour}


def _weights(votes: Sequence[Judgement], gold: Sequence[Judgement], axis: Axis) -> dict[str, float]:
    table = tabulate(votes, axis)
    if not table.annotators:
        return {}
    names = sorted({*table.annotators, *(item.annotator for item in gold)})
    shared = _in_common(table, names, gold)
    rates = _confusion(shared, len(names))
    informed = [
        rates[:, truth, truth] - rates[:, truth, other]
        for truth, other in ((FIRST, SECOND), (SECOND, FIRST))
        if not np.isnan(rates[:, truth]).any()
    ]
    weights = np.clip(np.mean(informed, axis=0), 0.0, 1.0) if informed else np.ones(len(names))
    voted = set(table.annotators)
    return {name: float(weight) for name, weight in zip(names, weights, strict=True) if name in voted}


def _in_common(table: VoteTable, names: Sequence[str], gold: Sequence[Judgement]) -> _Votes:
    """Votes on pairs that several annotators judged, or whose truth is known: the others tell of nobody."""
    number = {name: i for i, name in enumerate(names)}
    tasks = table.comparison * len(PLACE_PAIRS) + table.pair
    judged = np.bincount(tasks)
    known = list(_known(gold))
    if not known and judged.max(initial=0) < ENOUGH_ANNOTATORS:
        raise UnknownWeights(
            f"annotator_weights: dawid_skene needs comparisons that {ENOUGH_ANNOTATORS} annotators or more "
            f"have judged, or gold; the most judged has {judged.max(initial=0)}, and no gold counts. "
            "Raise overlap or gold of the annotate stage, or say annotator_weights: equal"
        )
    shared = judged[tasks] > 1
    of_gold = {pair: len(judged) + i for i, pair in enumerate(sorted({pair for pair, *_ in known}))}
    renumbered = np.array([number[name] for name in table.annotators], np.intp)[table.annotator]
    return _Votes(
        np.r_[tasks[shared], np.array([of_gold[pair] for pair, *_ in known], np.intp)],
        np.r_[renumbered[shared], np.array([number[who] for _, who, *_ in known], np.intp)],
        np.r_[table.value[shared], np.array([value for *_, value, _ in known], np.intp)],
        {of_gold[pair]: truth for pair, *_, truth in known},
    )


def _known(gold: Sequence[Judgement]) -> Iterator[tuple[tuple[str, int, int], str, int, int]]:
    """Pairs of gold of which it is known which is better: (pair, annotator, vote, truth)."""
    for item in gold:
        if item.expected is None or item.factuality is None:
            continue
        for i, j in PLACE_PAIRS:
            if j < len(item.texts) and (truth := vote(item.expected, i, j)) in (FIRST, SECOND):
                yield (item.comparison, i, j), item.annotator, vote(item.factuality, i, j), truth


def _confusion(votes: _Votes, annotators: int) -> npt.NDArray[np.float64]:
    """Each annotator's rates, shape (annotators, truths, values); NaN for truths that never occur."""
    # imported here, for it takes seconds and few recipes need it
    import pandas as pd
    from crowdkit.aggregation import DawidSkene

    data = pd.DataFrame({"task": votes.task, "worker": votes.annotator, "label": votes.value})
    given = set(data["label"].unique())  # a truth that nobody has named is unknown to the model
    truth = pd.Series({task: label for task, label in votes.truth.items() if label in given}, dtype=np.int64)
    # with known truth its bound falls at first, and it would take that for the end
    model = DawidSkene(n_iter=_ITERATIONS, tol=-np.inf) if len(truth) else DawidSkene()
    fitted = model.fit(data, truth if len(truth) else None)
    beliefs = fitted.probas_.reindex(columns=list(VALUES), fill_value=0.0).fillna(0.0)
    counts = np.zeros((annotators, len(VALUES), len(VALUES)))
    np.add.at(
        counts.transpose(0, 2, 1),
        (votes.annotator, votes.value),
        beliefs.loc[votes.task].to_numpy(np.float64),
    )
    of_all = counts.sum(axis=0)
    with np.errstate(invalid="ignore"):
        average = of_all / of_all.sum(axis=-1, keepdims=True)
    counts += PRIOR_VOTES * average
    return counts / counts.sum(axis=-1, keepdims=True)

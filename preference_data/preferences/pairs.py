"""Judgements -> preference pairs, one axis at a time, by stated rules.

1. Votes are those of `rules`: comparisons, and retests by somebody who did not judge the comparison itself,
   of annotators who count, heard, with usable audio; each weighs what its annotator's are worth.
2. Every two completions of a judgement get its vote. Votes on the same two texts of a prompt are counted
   together, in whatever order, retest or comparison they stood; an annotator has one vote, the average.
3. Two completions are a pair on an axis when at least `min_agreement` of the votes prefer the same one
   there. A tie and "both bad" are votes for neither.
4. An adjudication decides every two completions of its comparison, on both axes, whatever the votes; where
   there are several, the last. It replaces the adjudicator's own vote there, and weighs 1.
5. A completion that a counted annotator typed makes pairs when a second person approves it, see
   `corrections`; else it makes none, or pairs with the evidence `correction_weight`, unless rejected.
6. No completion is paired with its own text, and a typed one adds no pair of texts that is decided already.
7. Factuality and behaviour stay separate records, so that whoever trains decides what to teach (`weigh`).
8. Texts that hold a control token (`<|im_end|>`) teach nothing: see `without_control_tokens`.
9. Unless alpha is above `min_alpha` for certain (95 %), on each axis, nothing is built: annotators who do
   not agree teach noise.

Evidence, by which a pair counts in training: of votes `for` chosen and `against` it, by weight, a tie and
"both bad" half to each, Beta(1 + for, 1 + against) is what is known of the share of annotators who prefer
chosen. Its probability above one half, stretched to 0..1, is the evidence: 0.5 of a lone vote, 0.75 of two,
0.97 of five that agree. An adjudicated pair has 0.9: more than three votes that agree (0.875), for somebody
named listened with the disagreement in mind, but less than four (0.94).

Scores -> preference pairs (`of_scores`): of each prompt's completions with a reward the best is preferred to
the worst, or to one drawn from all that are worse, or every one to every worse one; the difference must be
more than `margin`, so that ties yield nothing.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import special

from preference_data.preferences import agreement, corrections
from preference_data.preferences.agreement import Alpha, wilson
from preference_data.preferences.corrections import Correction
from preference_data.preferences.rules import CountedJudgements, Removal
from preference_data.preferences.votes import FIRST, PLACE_PAIRS, SECOND, VoteTable, subject, tabulate, vote
from preference_data.prompts.prompts import control_token, texts_of
from preference_data.schema import (
    AXES,
    Axis,
    Completion,
    CompletionScore,
    Judgement,
    PairAxis,
    PreferencePair,
    Prompt,
    stable_id,
)

Opponents = Literal["worst", "random", "all"]
"""Which worse completion the best one of a prompt is paired with; `all`: every one with every worse one."""
ADJUDICATED = 0.9
"""Evidence of a pair that an adjudicator decided."""
ROUNDING = 1e-9
"""By how much of the votes a share may miss `min_agreement`: three of four are 0.75 whatever they weigh."""


class LowAgreement(ValueError):
    """Annotators agree less than the recipe demands, or their agreement is undefined."""


class Refused(NamedTuple):
    """A judgement, or what was typed in it, that is left out; a row of quarantine.jsonl."""

    id: str
    path: str
    code: str
    detail: str


class Tally(NamedTuple):
    """What became of every two completions that were compared on one axis."""

    pairs: int
    """Became a pair by vote."""
    ties: int
    """Most annotators, or the adjudicator, preferred neither."""
    disagreements: int
    """Some preferred one, too few the same."""
    weightless: int
    """Nobody whose votes are worth anything has compared them."""
    adjudicated: int
    """Became a pair by adjudication."""
    corrected: int
    """Pairs of a typed completion, on top of the others."""
    unapproved: int
    """Pairs of a typed completion that were left out, for nobody else approved it."""


class ScoreTally(NamedTuple):
    """What became of the prompts whose completions have rewards."""

    pairs: int
    ties: int
    """Prompts of which no two completions differ by more than the margin."""
    unscored: int
    """Completions without a reward; they are in no pair."""


class WeightedPair(NamedTuple):
    """A pair to train on and how much its loss counts; weights average 1 over a set."""

    pair: PreferencePair
    weight: float


class Texts(NamedTuple):
    """Two completions of a prompt, the text that sorts first being first."""

    prompt_id: str
    first: str
    second: str


class _Poll(NamedTuple):
    """Votes on every two texts, arrays by their number; and the voters, sorted by it, by their own number."""

    texts: Sequence[Texts]
    first: npt.NDArray[np.float64]
    """Votes that prefer the first text, by weight; `second` likewise."""
    second: npt.NDArray[np.float64]
    total: npt.NDArray[np.float64]
    judges: npt.NDArray[np.intp]
    effective: npt.NDArray[np.float64]
    """How many votes of equal weight tell as much (Kish)."""
    starts: Sequence[int]
    """Where the voters of each two texts start; one more, for the end of the last."""
    annotators: Sequence[str]
    """Of each voter."""
    leads: Sequence[float]
    """Of each voter: above 0 where they prefer the first text, below for the second."""

    def supporters(self, i: int, side: int) -> tuple[str, ...]:
        """Who prefers the first (1) or the second (-1) of two texts."""
        voters = range(self.starts[i], self.starts[i + 1])
        return tuple(self.annotators[voter] for voter in voters if self.leads[voter] * side > 0)


def evidence(preferring: npt.ArrayLike, against: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """How sure votes make it that most prefer one side, from 0 (not at all) to 1; negative for the other."""
    above_half = special.betainc(1 + np.asarray(against), 1 + np.asarray(preferring), 0.5)
    return np.asarray(2 * above_half - 1, np.float64)


def without_control_tokens(
    judgements: Sequence[Judgement], prompts: Mapping[str, Prompt]
) -> tuple[list[Judgement], list[Refused]]:
    """Judgements of texts that cannot steer the model, without typed completions that could; and what goes.

    A judgement whose typed completion goes still counts: people's work is not lost to one text. Texts of gold
    are not trained on.
    """
    kept: list[Judgement] = []
    refused: list[Refused] = []
    for item in judgements:
        if item.purpose == "gold":
            kept.append(item)
            continue
        prompt = prompts[item.prompt_id]
        texts = [*texts_of(prompt), *item.texts]
        typed = control_token(item.corrected or "")
        of_texts = control_token(*texts)
        if token := of_texts or typed:
            what = (
                f"the completion that {item.annotator} typed"
                if typed == token
                else f"prompt {prompt.id} or a completion"
            )
            detail = f"{what} holds {token}, which would steer the model"
            refused.append(Refused(item.id, "".join(prompt.audios[:1]), "control_token", detail))
        if not of_texts:
            kept.append(item.model_copy(update={"corrected": None}) if typed else item)
    return kept, refused


def build(
    counted: CountedJudgements,
    prompts: Mapping[str, Prompt],
    *,
    min_agreement: float,
    min_alpha: float | None = None,
    correction_weight: float = 0.0,
) -> tuple[list[PreferencePair], dict[Axis, Tally]]:
    """All pairs of all axes by the rules above, sorted, and per axis what happened.

    Raises:
        LowAgreement: the interval of an axis' alpha reaches below `min_alpha`, or alpha is undefined; says
            which, over how many comparisons, and what to do.
    """
    if min_alpha is not None:
        _check_agreement(counted.votes, min_alpha)
    typed = corrections.find(counted)
    pairs: list[PreferencePair] = []
    tallies: dict[Axis, Tally] = {}
    for axis in AXES:
        by_vote, tally = _decided(
            _poll(counted, axis), _adjudicated(counted, axis), axis, prompts, min_agreement
        )
        by_typing, unapproved = _corrected(
            typed,
            axis,
            prompts,
            by_vote,
            counted.weights[axis],
            min_agreement=min_agreement,
            correction_weight=correction_weight,
        )
        pairs += sorted(by_vote + by_typing, key=lambda pair: (pair.prompt_id, pair.chosen, pair.rejected))
        tallies[axis] = tally._replace(corrected=len(by_typing), unapproved=unapproved)
    return pairs, tallies


def removals(tallies: Mapping[Axis, Tally]) -> list[Removal]:
    """What the rules left out of every two completions that were compared, and of typed ones, by axis."""
    rows: list[Removal] = []
    for axis, tally in tallies.items():
        typed = tally.corrected + tally.unapproved
        compared = sum(tally) - typed
        settled = f"too few preferred the same; an adjudicator decided {tally.adjudicated} more"
        of_compared = (
            ("ties", tally.ties, "most, or an adjudicator, preferred neither"),
            ("min_agreement", tally.disagreements, settled),
            ("annotator_weights", tally.weightless, "nobody whose votes are worth anything compared them"),
        )
        rows += [
            Removal(rule, n, f"pairs of completions compared on {axis}", compared, why)
            for rule, n, why in of_compared
        ]
        why = "no second person approved what somebody typed"
        rows.append(
            Removal("approval", tally.unapproved, f"pairs of a typed completion on {axis}", typed, why)
        )
    return rows


def _check_agreement(given: Sequence[Judgement], min_alpha: float) -> None:
    alphas = {axis: agreement.alpha(tabulate(given, axis)) for axis in AXES}
    low = {axis: alpha for axis, alpha in alphas.items() if alpha.low is None or alpha.low < min_alpha}
    if low:
        is_undecided = all(alpha.high is not None and alpha.high >= min_alpha for alpha in low.values())
        raise LowAgreement(
            ("undecided whether annotators agree" if is_undecided else "annotators do not agree")
            + " enough to learn from: "
            + "; ".join(f"{axis}: {_in_words(alpha)}" for axis, alpha in low.items())
            + f". min_alpha asks that the whole interval lies at {min_alpha:g} or above on each axis (chance "
            "is 0, full agreement 1). "
            + ("Have more comparisons judged twice (overlap of the annotate stage). " if is_undecided else "")
            + "Read the quality report of the annotate stage for who disagrees, sharpen the guidelines and "
            "annotate again, leave annotators out (exclude, min_gold), or lower min_alpha of the pairs stage"
        )


def _in_words(alpha: Alpha) -> str:
    if not alpha.comparisons:
        return (
            "Krippendorff's alpha is undefined, for no comparison was judged by two annotators who listened"
        )
    if alpha.value is None:
        return (
            f"Krippendorff's alpha is undefined, for all answers to the {alpha.comparisons} comparisons "
            "judged by two or more are the same"
        )
    return (
        f"Krippendorff's alpha is {alpha.value:z.2f} (95 % interval {alpha.low:z.2f} to {alpha.high:z.2f}) "
        f"over {alpha.comparisons} comparisons judged by two or more"
    )


# ---------------------------------------------------------------- votes


def _texts(item: Judgement, i: int, j: int) -> tuple[Texts, int]:
    """The texts in two places, and 1 if the first of them stands in place `i`, else -1."""
    a, b = item.texts[i], item.texts[j]
    return (Texts(item.prompt_id, a, b), 1) if a <= b else (Texts(item.prompt_id, b, a), -1)


def _poll(counted: CountedJudgements, axis: Axis) -> _Poll:
    """Count the votes on every two texts; an adjudicator's judgement is one of them, see rule 4."""
    adjudicators = {(subject(item), item.annotator) for item in counted.adjudications}
    given = [item for item in counted.votes if (subject(item), item.annotator) not in adjudicators]
    table = tabulate([*given, *counted.adjudications], axis)
    weights = dict(counted.weights[axis]) | {name: 1.0 for _, name in adjudicators}
    texts, number, sign = _numbered(table)
    about = number[table.comparison, table.pair]
    leads = np.select([table.value == FIRST, table.value == SECOND], [1, -1], 0)
    leads = leads * sign[table.comparison, table.pair]
    # one vote of each annotator on two texts, however often they have compared them
    shape = (len(texts), max(len(table.annotators), 1))
    voters, row, times = np.unique(
        about * shape[1] + table.annotator, return_inverse=True, return_counts=True
    )
    of_voter, who = voters // shape[1], voters % shape[1]
    weight = np.array([weights.get(name, 1.0) for name in table.annotators], np.float64)[who]
    first, second = (np.bincount(row, leads == side, len(voters)) / times for side in (1, -1))

    def of_texts(each: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return np.bincount(of_voter, each, shape[0]).astype(np.float64)

    total, squares = of_texts(weight), of_texts(weight**2)
    return _Poll(
        texts,
        of_texts(weight * first),
        of_texts(weight * second),
        total,
        of_texts(1.0 * (weight > 0)).astype(np.intp),
        np.divide(total**2, squares, out=np.zeros(shape[0]), where=squares > 0),
        np.searchsorted(of_voter, np.arange(shape[0] + 1)).tolist(),
        [table.annotators[i] for i in who],
        np.where(weight > 0, first - second, 0.0).tolist(),
    )


def _numbered(
    table: VoteTable,
) -> tuple[list[Texts], npt.NDArray[np.intp], npt.NDArray[np.int8]]:
    """Every two texts once; and by comparison and pair of places their number, and whether they are turned.

    The sign is -1 where the first text stands in the second place, and 0 for twice the same text.
    """
    texts: dict[Texts, int] = {}
    number = np.zeros((len(table.subjects), len(PLACE_PAIRS)), np.intp)
    sign = np.zeros(number.shape, np.int8)
    for row, item in enumerate(table.subjects):
        for pair, (i, j) in enumerate(PLACE_PAIRS):
            if j < len(item.texts):
                key, turned = _texts(item, i, j)
                number[row, pair] = texts.setdefault(key, len(texts))
                sign[row, pair] = turned if key.first != key.second else 0
    return list(texts), number, sign


def _outcomes(poll: _Poll, min_agreement: float) -> npt.NDArray[np.str_]:
    """What the annotators decided about every two texts, as `Tally` names it."""
    most = np.maximum(poll.first, poll.second)
    neither = poll.total - poll.first - poll.second
    is_pair = most >= (min_agreement - ROUNDING) * poll.total
    is_tie = (2 * neither > poll.total * (1 + ROUNDING)) | (most <= 0)
    return np.select(
        [poll.total <= 0, is_pair & (most > 0), is_tie], ["weightless", "pairs", "ties"], "disagreements"
    )


def _adjudicated(counted: CountedJudgements, axis: Axis) -> dict[Texts, int]:
    """What adjudicators decided: 1 for the first text, -1 for the second, 0 for neither."""
    decided: dict[Texts, int] = {}
    for item in sorted(counted.adjudications, key=lambda item: (item.submitted_at or "", item.id)):
        ranking = item.ranking(axis)
        if ranking is None:
            continue
        for i, j in PLACE_PAIRS:
            if j < len(item.texts):
                key, turned = _texts(item, i, j)
                lead = {FIRST: 1, SECOND: -1}.get(vote(ranking, i, j), 0)
                decided[key] = lead * turned if key.first != key.second else 0
    return decided


def _decided(
    poll: _Poll,
    adjudicated: Mapping[Texts, int],
    axis: Axis,
    prompts: Mapping[str, Prompt],
    min_agreement: float,
) -> tuple[list[PreferencePair], Tally]:
    """Pairs that votes and adjudicators decided, and what became of all."""
    outcomes = _outcomes(poll, min_agreement).tolist()
    sides = np.where(poll.first > poll.second, 1, -1)
    for i, key in enumerate(poll.texts):
        if key in adjudicated:
            sides[i] = adjudicated[key]
            outcomes[i] = "adjudicated" if sides[i] else "ties"
    neither = poll.total - poll.first - poll.second
    preferring = np.where(sides > 0, poll.first, poll.second) + neither / 2
    share = np.divide(preferring, poll.total, out=np.zeros(len(neither)), where=poll.total > 0)
    low, high = wilson(share, np.maximum(poll.effective, ROUNDING))
    sure = evidence(preferring, poll.total - preferring)
    pairs: list[PreferencePair] = []
    for i, outcome in enumerate(outcomes):
        if outcome in ("pairs", "adjudicated"):
            prompt_id, first, second = poll.texts[i]
            chosen, rejected = (first, second) if sides[i] > 0 else (second, first)
            pairs.append(
                _pair(
                    prompts[prompt_id],
                    axis,
                    (chosen, rejected),
                    (chosen, rejected),
                    judges=int(poll.judges[i]),
                    agreement=min(float(share[i]), 1.0),
                    agreement_low=float(low[i]),
                    agreement_high=float(high[i]),
                    evidence=ADJUDICATED if outcome == "adjudicated" else float(sure[i]),
                    annotators=poll.supporters(i, int(sides[i])),
                )
            )
    happened = Counter(outcomes)
    return pairs, Tally(**{name: happened[name] for name in Tally._fields})


def _corrected(
    typed: Iterable[Correction],
    axis: Axis,
    prompts: Mapping[str, Prompt],
    decided: Iterable[PreferencePair],
    weights: Mapping[str, float],
    *,
    min_agreement: float,
    correction_weight: float,
) -> tuple[list[PreferencePair], int]:
    """Pairs of typed completions over those they were typed for, and how many are left out as unapproved.

    An approved one has the votes of its typists and of all who judged it beside the other text.
    """
    known = {frozenset((pair.prompt_id, pair.chosen, pair.rejected)) for pair in decided}
    pairs: list[PreferencePair] = []
    unapproved = 0
    for item in typed:
        for worse in item.worse:
            key = frozenset((item.prompt_id, item.text, worse))
            if key in known:
                continue
            known.add(key)
            grounds = _approval(item, worse, axis, weights, min_agreement)
            if grounds is None and correction_weight and not corrections.is_reviewed(item, axis):
                share = len(item.typists) / len(item.annotators)
                who = {"judges": len(item.annotators), "annotators": tuple(sorted(item.typists))}
                grounds = {"agreement": share, "evidence": correction_weight, **who}
            if grounds is None:
                unapproved += 1
                continue
            sides = ("corrected", item.text, worse)
            pairs.append(_pair(prompts[item.prompt_id], axis, sides, (item.text, worse), **grounds))
    return pairs, unapproved


def _approval(
    item: Correction, worse: str, axis: Axis, weights: Mapping[str, float], min_agreement: float
) -> dict[str, Any] | None:
    """On what a typed completion is better than a text; None where nobody approves it, or too few do."""
    leads = corrections.leads(item, worse, axis)
    weight = np.array([weights.get(name, 1.0) for name in leads])
    side = np.array(list(leads.values()))
    preferring, against, total = weight[side > 0].sum(), weight[side < 0].sum(), weight.sum()
    if not leads or not preferring or preferring < (min_agreement - ROUNDING) * total:
        return None
    half = (total - preferring - against) / 2
    low, high = wilson((preferring + half) / total, total**2 / (weight**2).sum())
    return {
        "judges": int((weight > 0).sum()),
        "agreement": min(float((preferring + half) / total), 1.0),
        "agreement_low": float(low),
        "agreement_high": float(high),
        "evidence": float(evidence(preferring + half, against + half)),
        "annotators": tuple(name for name, lead in leads.items() if lead > 0 and weights.get(name, 1.0) > 0),
    }


# ---------------------------------------------------------------- scores


def of_scores(
    scores: Iterable[CompletionScore],
    prompts: Mapping[str, Prompt],
    completions: Mapping[str, Completion],
    *,
    opponents: Opponents,
    margin: float,
    seed: int,
) -> tuple[list[PreferencePair], ScoreTally]:
    """Pairs by reward, in the prompts' order; what is drawn depends on seed and prompt alone."""
    pairs: list[PreferencePair] = []
    ties = unscored = 0
    for prompt_id, group in groupby(scores, key=lambda score: score.prompt_id):
        scored = [(score.reward, score.id) for score in group]
        known = [(reward, id_) for reward, id_ in scored if reward is not None]
        unscored += len(scored) - len(known)
        matches = list(_matches(known, opponents, margin, stable_id(seed, prompt_id)))
        ties += not matches
        for sides in matches:
            texts = completions[sides[0]].text, completions[sides[1]].text
            pairs.append(_pair(prompts[prompt_id], "reward", sides, texts, agreement=1.0))
    return pairs, ScoreTally(len(pairs), ties, unscored)


def _matches(
    scored: Sequence[tuple[float, str]], opponents: Opponents, margin: float, draw: str
) -> Iterator[tuple[str, str]]:
    """Ids of a better and a worse completion of a prompt. Of equals the earlier one stands for all."""
    ranked = sorted(scored, key=lambda item: -item[0])
    winners = ranked if opponents == "all" else ranked[:1]
    for place, (reward, winner) in enumerate(winners):
        worse = [loser for other, loser in ranked[place + 1 :] if reward - other > margin]
        if opponents == "worst":
            worse = worse[-1:]
        elif opponents == "random" and worse:
            worse = [worse[int(draw, 16) % len(worse)]]
        yield from ((winner, loser) for loser in worse)


def _pair(
    prompt: Prompt, axis: PairAxis, key: tuple[str, ...], texts: tuple[str, str], **grounds: Any
) -> PreferencePair:
    """A pair of `texts`, the chosen one first.

    Args:
        prompt: what they complete.
        axis: on what the chosen one is better.
        key: what tells it from the prompt's other pairs on the axis; its id is made of it.
        texts: chosen and rejected.
        grounds: the pair's evidence, as its record names it.
    """
    return PreferencePair(
        id=stable_id(prompt.id, *key, axis),
        prompt_id=prompt.id,
        system=prompt.system,
        audios=prompt.audios,
        history=prompt.history,
        question=prompt.question,
        chosen=texts[0],
        rejected=texts[1],
        axis=axis,
        **grounds,
    )


def weigh(pairs: Sequence[PreferencePair], objective: Mapping[Axis, float]) -> list[WeightedPair]:
    """Merge the axes of every two completions into one weighted pair.

    A side's support is the sum of the objective's weights of the axes preferring it, each times its evidence.
    The side with more support is chosen, with the difference as weight; equal support teaches nothing.
    Weights are scaled to average 1, so that a learning rate means the same under every objective.
    """
    support: dict[tuple[str, str, str], float] = defaultdict(float)
    example: dict[tuple[str, str, str], PreferencePair] = {}
    for pair in pairs:
        key = (pair.prompt_id, pair.chosen, pair.rejected)
        support[key] += pair.evidence * (1.0 if pair.axis == "reward" else objective[pair.axis])
        example.setdefault(key, pair)
    net = {key: weight - support.get((key[0], key[2], key[1]), 0.0) for key, weight in support.items()}
    kept = {key: weight for key, weight in net.items() if weight > 0}
    mean = sum(kept.values()) / len(kept) if kept else 1.0
    return [WeightedPair(example[key], weight / mean) for key, weight in kept.items()]

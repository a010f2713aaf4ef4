"""Judgements -> preference pairs, one axis at a time, by stated rules.

1. Votes are answers to comparisons. Retests and gold measure annotators and are not votes.
2. An answer is dropped if its annotator called the audio unusable, or had played less than `min_heard` of
   the clip when submitting; unknown is not heard.
3. A comparison yields a pair on an axis when at least `min_agreement` of its counted annotators prefer the
   same side there. A tie and "both bad" are votes for neither side.
4. An answer that a counted annotator typed is preferred to both answers, on both axes. Its agreement
   is the share of the comparison's counted annotators who typed it.
5. No answer is paired with its own text, and a typed answer adds no pair that is there already.
6. Factuality and behaviour stay separate records, so that whoever trains decides what to teach (`weigh`).
7. Texts that hold a control token (`<|im_end|>`) teach nothing: see `without_control_tokens`.
8. Unless alpha is above `min_alpha` for certain (95 %), on each axis, nothing is built: annotators who do
   not agree teach noise.

Scores -> preference pairs (`of_scores`): of each prompt's completions with a reward the best is preferred to
the worst, or to one drawn from all that are worse, or every one to every worse one; the difference must be
more than `margin`, so that ties yield nothing.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Literal, NamedTuple

from preference_data.preferences import agreement
from preference_data.preferences.agreement import Alpha
from preference_data.prompts.prompts import control_token, texts_of
from preference_data.schema import (
    AXES,
    Axis,
    Choice,
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


class LowAgreement(ValueError):
    """Annotators agree less than the recipe demands, or their agreement is undefined."""


class Refused(NamedTuple):
    """A judgement, or what was typed in it, that is left out; a row of quarantine.jsonl."""

    id: str
    path: str
    code: str
    detail: str


class Tally(NamedTuple):
    """What became of the comparisons on one axis, and of the answers to them."""

    pairs: int
    """Comparisons that became a pair by vote."""
    ties: int
    """Most annotators preferred neither side."""
    disagreements: int
    """Some preferred a side, too few the same one."""
    unheard: int
    """Answers dropped because the clip had not been played; the same on every axis."""
    unusable: int
    """Answers dropped because the audio was called unusable; the same on every axis."""
    corrected: int
    """Pairs of a typed answer with one of the two, on top of `pairs`."""


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


def without_control_tokens(
    judgements: Sequence[Judgement], prompts: Mapping[str, Prompt], completions: Mapping[str, Completion]
) -> tuple[list[Judgement], list[Refused]]:
    """Judgements of texts that cannot steer the model, without typed answers that could; and what goes.

    A judgement whose typed answer goes still counts: people's work is not lost to one text.
    """
    kept: list[Judgement] = []
    refused: list[Refused] = []
    for item in judgements:
        if item.purpose != "comparison":  # measures an annotator: no text of it is trained on
            kept.append(item)
            continue
        prompt, compared = prompts[item.prompt_id], (item.completion_a, item.completion_b)
        texts = [*texts_of(prompt), *(completions[key].text for key in compared)]
        typed = control_token(item.corrected or "")
        if token := control_token(*texts) or typed:
            what = (
                f"the answer that {item.annotator} typed"
                if typed == token
                else f"prompt {prompt.id} or an answer"
            )
            detail = f"{what} holds {token}, which would steer the model"
            refused.append(Refused(item.id, "".join(prompt.audios[:1]), "control_token", detail))
        if not control_token(*texts):
            kept.append(item.model_copy(update={"corrected": None}) if typed else item)
    return kept, refused


def build(
    judgements: Sequence[Judgement],
    prompts: Mapping[str, Prompt],
    completions: Mapping[str, Completion],
    *,
    min_agreement: float,
    min_heard: float,
    min_alpha: float | None = None,
) -> tuple[list[PreferencePair], dict[Axis, Tally]]:
    """All pairs of all axes by the rules above, and per axis what happened.

    Raises:
        LowAgreement: the interval of an axis' alpha reaches below `min_alpha`, or alpha is undefined; says
            which, over how many comparisons, and what to do.
    """
    of_comparisons = [item for item in judgements if item.purpose == "comparison"]
    votes = [item for item in of_comparisons if agreement.is_vote(item, min_heard)]
    if min_alpha is not None:
        _check_agreement(votes, min_alpha)
    unusable = sum(item.audio_unusable for item in of_comparisons)
    unheard = len(of_comparisons) - len(votes) - unusable
    by_comparison: dict[str, list[Judgement]] = defaultdict(list)
    for item in votes:
        by_comparison[item.comparison].append(item)
    pairs: list[PreferencePair] = []
    tallies: dict[Axis, Tally] = {}
    for axis in AXES:
        outcomes: Counter[str] = Counter()
        voted: list[PreferencePair] = []
        for given in by_comparison.values():
            outcome, pair = _vote(given, axis, prompts, completions, min_agreement)
            outcomes[outcome] += 1
            voted += [pair] if pair else []
        known = {(pair.prompt_id, pair.chosen, pair.rejected) for pair in voted}
        typed: dict[tuple[str, str, str], PreferencePair] = {}
        for given in by_comparison.values():
            for pair in _corrections(given, axis, prompts, completions):
                typed.setdefault((pair.prompt_id, pair.chosen, pair.rejected), pair)
        new = [pair for key, pair in typed.items() if key not in known]
        pairs += voted + new
        tallies[axis] = Tally(
            len(voted), outcomes["tie"], outcomes["disagreement"], unheard, unusable, len(new)
        )
    return pairs, tallies


def _vote(
    given: Sequence[Judgement],
    axis: Axis,
    prompts: Mapping[str, Prompt],
    completions: Mapping[str, Completion],
    min_agreement: float,
) -> tuple[str, PreferencePair | None]:
    """What the annotators of one comparison decided, and the pair if they preferred a side."""
    a, b = given[0].completion_a, given[0].completion_b
    if completions[a].text == completions[b].text:
        return "tie", None
    outcome, share = _decide([getattr(item, axis) for item in given], min_agreement)
    if outcome not in ("a", "b"):
        return outcome, None
    chosen, rejected = (a, b) if outcome == "a" else (b, a)
    texts = completions[chosen].text, completions[rejected].text
    return outcome, _pair(prompts[given[0].prompt_id], axis, (chosen, rejected), texts, share)


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
            pairs.append(_pair(prompts[prompt_id], "reward", sides, texts, 1.0))
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
    prompt: Prompt, axis: PairAxis, sides: tuple[str, ...], texts: tuple[str, str], agreement: float
) -> PreferencePair:
    """A pair of `texts`, the chosen one first; `sides` tells it from the prompt's other pairs."""
    return PreferencePair(
        id=stable_id(prompt.id, *sides, axis),
        prompt_id=prompt.id,
        system=prompt.system,
        audios=prompt.audios,
        history=prompt.history,
        question=prompt.question,
        chosen=texts[0],
        rejected=texts[1],
        axis=axis,
        agreement=agreement,
    )


def _corrections(
    given: Sequence[Judgement],
    axis: Axis,
    prompts: Mapping[str, Prompt],
    completions: Mapping[str, Completion],
) -> Iterator[PreferencePair]:
    """Every answer typed for a comparison over each of its answers that has another text."""
    prompt = prompts[given[0].prompt_id]
    typed = Counter(text for item in given if (text := (item.corrected or "").strip()))
    for text, times in typed.items():
        for rejected in (given[0].completion_a, given[0].completion_b):
            worse = completions[rejected].text
            if text != worse.strip():
                sides = ("corrected", text, rejected)
                yield _pair(prompt, axis, sides, (text, worse), times / len(given))


def _decide(choices: Sequence[Choice], min_agreement: float) -> tuple[str, float]:
    """("a" | "b" | "tie" | "disagreement", share of annotators behind a or b)."""
    for_a, for_b = choices.count("a"), choices.count("b")
    share = max(for_a, for_b) / len(choices)
    if share >= min_agreement:
        return ("a" if for_a > for_b else "b"), share
    neither = len(choices) - for_a - for_b
    return ("tie" if 2 * neither > len(choices) or not (for_a or for_b) else "disagreement"), share


def _check_agreement(votes: Sequence[Judgement], min_alpha: float) -> None:
    alphas = {axis: agreement.alpha(votes, axis) for axis in AXES}
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
            "annotate again, or lower min_alpha of the pairs stage"
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


def weigh(pairs: Sequence[PreferencePair], objective: Mapping[Axis, float]) -> list[WeightedPair]:
    """Merge the axes of each comparison into one weighted pair.

    A side's support is the sum of the objective's weights of the axes preferring it. The side with more
    support is chosen, with the difference as weight; equal support teaches nothing. Weights are scaled
    to average 1, so that a learning rate means the same under every objective.
    """
    support: dict[tuple[str, str, str], float] = defaultdict(float)
    example: dict[tuple[str, str, str], PreferencePair] = {}
    for pair in pairs:
        key = (pair.prompt_id, pair.chosen, pair.rejected)
        support[key] += 1.0 if pair.axis == "reward" else objective[pair.axis]
        example.setdefault(key, pair)
    net = {key: weight - support.get((key[0], key[2], key[1]), 0.0) for key, weight in support.items()}
    kept = {key: weight for key, weight in net.items() if weight > 0}
    mean = sum(kept.values()) / len(kept) if kept else 1.0
    return [WeightedPair(example[key], weight / mean) for key, weight in kept.items()]

"""Annotations -> preference pairs, one axis at a time.

The rule: a comparison yields a pair on an axis when at least `min_agreement` of its annotators prefer
the same side there. A tie and "both bad" are votes for neither side. Factuality and behaviour stay
separate records, so that whoever trains decides what to teach (`weigh`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from preference_data.schema import (
    AXES,
    Annotation,
    Axis,
    Choice,
    Completion,
    PreferencePair,
    Prompt,
    stable_id,
)


class Tally(NamedTuple):
    """What became of the comparisons on one axis."""

    pairs: int
    ties: int
    """Most annotators preferred neither side."""
    disagreements: int
    """Some preferred a side, too few the same one."""


class WeightedPair(NamedTuple):
    """A pair to train on and how much its loss counts; weights average 1 over a set."""

    pair: PreferencePair
    weight: float


def build(
    annotations: Sequence[Annotation],
    prompts: Mapping[str, Prompt],
    completions: Mapping[str, Completion],
    *,
    min_agreement: float,
) -> tuple[list[PreferencePair], dict[Axis, Tally]]:
    """All pairs of all axes, and per axis what happened to each comparison."""
    votes: dict[tuple[str, str, str], list[Annotation]] = defaultdict(list)
    for annotation in annotations:
        votes[annotation.prompt_id, annotation.completion_a, annotation.completion_b].append(annotation)
    pairs: list[PreferencePair] = []
    tallies: dict[Axis, Tally] = {}
    for axis in AXES:
        counts = {"pair": 0, "tie": 0, "disagreement": 0}
        for (prompt_id, a, b), given in votes.items():
            outcome, share = _decide([getattr(one, axis) for one in given], min_agreement)
            if outcome not in ("a", "b"):
                counts[outcome] += 1
                continue
            counts["pair"] += 1
            chosen, rejected = (a, b) if outcome == "a" else (b, a)
            pairs.append(
                PreferencePair(
                    id=stable_id(prompt_id, chosen, rejected, axis),
                    prompt_id=prompt_id,
                    audios=prompts[prompt_id].audios,
                    question=prompts[prompt_id].question,
                    chosen=completions[chosen].text,
                    rejected=completions[rejected].text,
                    axis=axis,
                    agreement=share,
                )
            )
        tallies[axis] = Tally(counts["pair"], counts["tie"], counts["disagreement"])
    return pairs, tallies


def _decide(choices: Sequence[Choice], min_agreement: float) -> tuple[str, float]:
    """("a" | "b" | "tie" | "disagreement", share of annotators behind a or b)."""
    for_a, for_b = choices.count("a"), choices.count("b")
    share = max(for_a, for_b) / len(choices)
    if share >= min_agreement:
        return ("a" if for_a > for_b else "b"), share
    neither = len(choices) - for_a - for_b
    return ("tie" if 2 * neither > len(choices) or not (for_a or for_b) else "disagreement"), share


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
        support[key] += objective[pair.axis]
        example.setdefault(key, pair)
    net = {key: weight - support.get((key[0], key[2], key[1]), 0.0) for key, weight in support.items()}
    kept = {key: weight for key, weight in net.items() if weight > 0}
    mean = sum(kept.values()) / len(kept) if kept else 1.0
    return [WeightedPair(example[key], weight / mean) for key, weight in kept.items()]

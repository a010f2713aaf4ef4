"""Annotators that know the facts: the demo's stand-in for people, with an error rate.

Completions in, annotations out: the same seam that the Argilla server has. They read answers through
the phrasebook that the demo's judge also uses; reports say so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np

from preference_data.phrasebook import Assessment, Phrasebook
from preference_data.schema import Annotation, Choice, Completion, Prompt, stable_id

_CHOICES: tuple[Choice, ...] = ("a", "b", "tie", "both_bad")


class Comparison(NamedTuple):
    """Two completions of one prompt, in the order they are shown."""

    prompt_id: str
    a: Completion
    b: Completion


def comparisons(completions: Sequence[Completion], *, per_prompt: int, seed: int) -> list[Comparison]:
    """Up to `per_prompt` pairs of different answers per prompt, sides drawn by lot."""
    rng = np.random.default_rng(seed)
    by_prompt: dict[str, dict[str, Completion]] = {}
    for completion in completions:
        by_prompt.setdefault(completion.prompt_id, {}).setdefault(completion.text, completion)
    drawn: list[Comparison] = []
    for prompt_id, answers in by_prompt.items():
        possible = list(combinations(answers.values(), 2))
        for i in rng.permutation(len(possible))[:per_prompt]:
            a, b = possible[i] if rng.random() < 0.5 else possible[i][::-1]
            drawn.append(Comparison(prompt_id, a, b))
    return drawn


def annotate(
    shown: Sequence[Comparison],
    prompts: Mapping[str, Prompt],
    phrasebook: Phrasebook,
    *,
    annotators: int,
    overlap: float,
    error_rate: float,
    seed: int,
) -> list[Annotation]:
    """Judge every comparison by one annotator, and a share `overlap` of them by all."""
    rng = np.random.default_rng(seed)
    made: list[Annotation] = []
    for number, comparison in enumerate(shown):
        everyone = rng.random() < overlap
        raters = range(annotators) if everyone else [number % annotators]
        a, b = (
            _assess(one, prompts[comparison.prompt_id], phrasebook) for one in (comparison.a, comparison.b)
        )
        for rater in raters:
            factuality, behaviour = (
                _CHOICES[int(rng.integers(len(_CHOICES)))] if rng.random() < error_rate else honest
                for honest in (_prefer(a.factual, b.factual), _prefer(a.behaves, b.behaves))
            )
            made.append(
                Annotation(
                    id=stable_id(comparison.a.id, comparison.b.id, rater),
                    prompt_id=comparison.prompt_id,
                    completion_a=comparison.a.id,
                    completion_b=comparison.b.id,
                    annotator=f"simulated-{rater + 1}",
                    factuality=factuality,
                    behaviour=behaviour,
                )
            )
    return made


def _assess(completion: Completion, prompt: Prompt, phrasebook: Phrasebook) -> Assessment:
    facts = json.loads(prompt.meta_info)
    return phrasebook.assess(completion.text, phrasebook.question(prompt.question, facts), facts)


def _prefer(a: bool, b: bool) -> Choice:
    if a == b:
        return "tie" if a else "both_bad"
    return "a" if a else "b"

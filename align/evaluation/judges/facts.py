"""What a judge is, and the demo's: one that knows the facts.

A judge reads a question, what is known of the clip, and an answer; it never hears the clip.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from align.evaluation.benchmarks.air_bench import Item
from preference_data.toy_world.phrasebook import Phrasebook


class Judgement(NamedTuple):
    """One answer's marks. `score` is 1..10; the others are yes or no."""

    factual: bool
    behaves: bool
    asked: bool
    """What was asked is right, whatever else the answer claims."""
    abstains: bool
    answerable: bool
    score: float


class Judge(Protocol):
    """Scores answers to questions, in order."""

    name: str
    shares_ground_truth: bool
    """Whether the judge reads answers with the annotators' own eyes; reports must say so."""

    def judge(self, items: Sequence[Item], responses: Sequence[str]) -> list[Judgement]:
        """One judgement per item."""
        ...


class FactJudge:
    """Reads answers through a phrasebook and compares their claims with the clip's facts.

    Deterministic and free, but knows only the phrasebook's wording, and shares it with the simulated
    annotators: a fixture for the loop, never a substitute for an LLM judge on real answers.
    """

    name = "facts"
    shares_ground_truth = True

    def __init__(self, phrasebook: Path) -> None:
        self.phrasebook = Phrasebook.load(phrasebook)

    def judge(self, items: Sequence[Item], responses: Sequence[str]) -> list[Judgement]:
        """One judgement per item."""
        return [self._one(item, response) for item, response in zip(items, responses, strict=True)]

    def _one(self, item: Item, response: str) -> Judgement:
        facts = json.loads(item.meta_info)
        question = self.phrasebook.question(item.question, facts)
        return Judgement(*self.phrasebook.assess(response, question, facts))

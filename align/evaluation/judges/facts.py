"""The demo's judge, which knows what is true of every clip and never hears it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from align.evaluation.benchmarks.air_bench import Item
from align.evaluation.judged_answers import JudgedAnswer
from preference_data.toy_world.phrasebook import Phrasebook


class FactJudge:
    """Reads answers through a phrasebook and compares their claims with the clip's facts.

    Deterministic and free, but knows only the phrasebook's wording, and shares it with the simulated
    annotators: a fixture for the loop, never a substitute for an LLM judge on real answers.
    """

    name = "facts"
    is_free = True

    def __init__(self, phrasebook: Path) -> None:
        self.phrasebook = Phrasebook.load(phrasebook)

    def judge(
        self, items: Sequence[Item], responses: Sequence[str], label: str = "judge"
    ) -> list[JudgedAnswer]:
        """One row per answer, with all marks; the score is 1 to 10."""
        return [self._judge(item, response) for item, response in zip(items, responses, strict=True)]

    def describe(self, items: Sequence[Item]) -> dict[str, Any]:
        """Its name, and that it shares the annotators' ground truth."""
        return {"name": self.name, "shares_ground_truth": True}

    def _judge(self, item: Item, response: str) -> JudgedAnswer:
        facts = json.loads(item.meta_info)
        question = self.phrasebook.question(item.question, facts)
        marks = self.phrasebook.assess(response, question, facts)._asdict()
        return JudgedAnswer.to(item, response, kind=question.kind, **marks)

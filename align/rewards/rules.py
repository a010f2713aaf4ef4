"""Rewards by rule: known facts, a transcript, multiple choice, the form of the text, its length."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from align.evaluation.benchmarks import wer
from align.evaluation.benchmarks.choices import LETTERS, chosen
from align.evaluation.judges.facts import FactJudge
from align.rewards.reward import BadReward, Parts
from align.run_folder.artifacts import sha256_file
from preference_data.schema import Prompt
from preference_data.toy_world.phrasebook import Assessment, Phrasebook

FORMS: Mapping[str, str] = MappingProxyType(
    {
        "one_word": r"\s*[\w'-]+[.!?]?\s*",
        "sentence": r"\s*[^\s.!?][^.!?\n]*[.!?]\s*",
        "think_answer": r"\s*<think>(?:(?!</?(?:think|answer)>).)*</think>\s*"
        r"<answer>(?:(?!</?(?:think|answer)>).)*</answer>\s*",
    }
)
"""Known forms of a completion, each as an expression that matches all of it.

`think_answer` is that of DeepSeek-R1 (arXiv:2501.12948, table 1).
"""


class FactReward:
    """Marks by a phrasebook and the clip's facts, as the judge `facts` gives them.

    `asked`: the fact that the prompt asks for is right, whatever else is claimed. `clean`: it is, and nothing
    false is claimed. `form`: the form is the one asked for.
    """

    def __init__(self, phrasebook: Path, weights: Mapping[str, float]) -> None:
        self.weights = {name: weights[name] for name in ("asked", "clean", "form") if weights.get(name)}
        self._phrasebook, self._sha256 = Phrasebook.load(phrasebook), sha256_file(phrasebook)
        self._assess = lru_cache(1 << 16)(self._assess_anew)

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Refuse a prompt that the phrasebook does not know, or facts that do not answer it."""
        for prompt in prompts:
            try:
                self._assess(prompt.question, prompt.meta_info, "")
            except ValueError as error:
                raise BadReward(f"reward.facts: prompt {prompt.id!r}: {error}; take reward.judge") from error

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> Parts:
        """0 or 1 each."""
        marks = [
            self._assess(prompt.question, prompt.meta_info, text)
            for prompt, text in zip(prompts, completions, strict=True)
        ]
        values: Parts = {
            "asked": [float(mark.fact_is_right) for mark in marks],
            "clean": [float(mark.factual) for mark in marks],
            "form": [float(mark.behaves) for mark in marks],
        }
        return {name: values[name] for name in self.weights}

    def identity(self) -> dict[str, Any]:
        """With the phrasebook's sha256."""
        return {
            "kind": "facts",
            "judge": FactJudge.name,
            "phrasebook_sha256": self._sha256,
            "weights": dict(self.weights),
        }

    def _assess_anew(self, question: str, meta_info: str, text: str) -> Assessment:
        try:
            facts = json.loads(meta_info)
        except ValueError:
            facts = None
        if not isinstance(facts, dict):
            raise ValueError(f"its meta_info {meta_info[:80]!r} holds no facts of the clip")
        return self._phrasebook.assess(text, self._phrasebook.question(question, facts), facts)


class TranscriptReward:
    """1 minus the error rate against the prompt's reference, at least 0; in Chinese of characters.

    Texts are normalised as in the evaluation (`benchmarks.wer`). Of a reference without words only an empty
    completion is right.
    """

    def __init__(self, language: wer.Language, weight: float = 1.0) -> None:
        self.language, self.weights = language, {"wer": weight}

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Refuse a prompt without a reference."""
        if missing := [prompt.id for prompt in prompts if not prompt.answer_gt.strip()]:
            raise BadReward(
                f"reward.wer: prompt {missing[0]!r} has no transcript in answer_gt ({len(missing)} of "
                f"{len(prompts)} prompts); take prompts: {{tasks: [...]}}, or another reward"
            )

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> Parts:
        """0 to 1."""
        return {"wer": [self._value(p.answer_gt, text) for p, text in zip(prompts, completions, strict=True)]}

    def _value(self, reference: str, text: str) -> float:
        reference_words, words = wer.tokens(reference, self.language), wer.tokens(text, self.language)
        if not reference_words:
            return float(not words)
        return max(0.0, 1 - wer.distance(reference_words, words) / len(reference_words))

    def identity(self) -> dict[str, Any]:
        """With the language, and what its normalisation leaves out here."""
        return {
            "kind": "wer",
            "language": self.language,
            "not_reproduced": wer.not_reproduced(self.language),
            "weights": dict(self.weights),
        }


class ChoiceReward:
    """1 for the right one of a prompt's choices, read as strictly as AIR-Bench foundation is scored here.

    A completion with `<answer>...</answer>` is read there alone.
    """

    def __init__(self, weight: float = 1.0) -> None:
        self.weights = {"choice": weight}

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Refuse prompts without two to four choices, of which one is the reference."""
        for prompt in prompts:
            if not 2 <= len(prompt.choices) <= len(LETTERS) or prompt.answer_gt not in prompt.choices:
                raise BadReward(
                    f"reward.choice: prompt {prompt.id!r} has choices {list(prompt.choices)} and answer_gt "
                    f"{prompt.answer_gt!r}; it needs 2 to {len(LETTERS)} choices, one of them answer_gt"
                )

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> Parts:
        """0 or 1."""
        pairs = zip(prompts, completions, strict=True)
        return {"choice": [float(chosen(p.choices, text) == p.answer_gt) for p, text in pairs]}

    def identity(self) -> dict[str, Any]:
        """Its kind."""
        return {"kind": "choice", "weights": dict(self.weights)}


class FormatReward:
    """1 where a regular expression matches the whole completion; `.` matches line ends too."""

    def __init__(self, pattern: str, weight: float = 1.0) -> None:
        self.weights = {"format": weight}
        try:
            self._pattern = re.compile(pattern, re.DOTALL)
        except re.error as error:
            raise BadReward(
                f"reward.format.pattern: {pattern!r} is not a regular expression: {error}"
            ) from None

    def check(self, prompts: Sequence[Prompt]) -> None:
        """All prompts can be scored."""

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> Parts:
        """0 or 1."""
        return {"format": [float(self._pattern.fullmatch(text) is not None) for text in completions]}

    def identity(self) -> dict[str, Any]:
        """With the expression."""
        return {"kind": "format", "pattern": self._pattern.pattern, "weights": dict(self.weights)}


class LengthReward:
    """0 up to `max_chars` characters, then falling to -1 at twice as many.

    DAPO's soft overlong punishment (arXiv:2503.14476, eq. 13), in characters, which all scripts have.
    """

    def __init__(self, max_chars: int, weight: float = 1.0) -> None:
        self.max_chars, self.weights = max_chars, {"length": weight}

    def check(self, prompts: Sequence[Prompt]) -> None:
        """All prompts can be scored."""

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> Parts:
        """-1 to 0."""
        excess = [(len(text) - self.max_chars) / self.max_chars for text in completions]
        return {"length": [-min(1.0, max(0.0, share)) for share in excess]}

    def identity(self) -> dict[str, Any]:
        """With the limit."""
        return {"kind": "length", "max_chars": self.max_chars, "weights": dict(self.weights)}

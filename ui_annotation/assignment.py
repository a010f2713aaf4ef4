"""Which answers are compared, on which side, by whom, and why: drawn from a seed, blind to the annotator.

`draw` makes the key (`Comparison`); only ids that tell nothing, texts and clips leave this machine. `unblind`
joins what an annotator said to the key again.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.random import Generator
from pydantic import ValidationError

from preference_data.schema import Comparison, Completion, Judgement, Prompt, Purpose, stable_id
from ui_annotation import AnnotationError


class BadAnswer(AnnotationError):
    """A judgement that came back and does not fit what was shown."""


def draw(
    completions: Sequence[Completion],
    prompts: Mapping[str, Prompt],
    *,
    per_prompt: int,
    overlap: float,
    retests: float,
    gold: float,
    seed: int,
) -> list[Comparison]:
    """Up to `per_prompt` pairs of different answers per prompt, and what measures their annotators.

    Args:
        completions: What policies answered; their order does not matter to the annotators.
        prompts: By id, at least those that the completions answer.
        per_prompt: Most comparisons of one prompt.
        overlap: Share of the comparisons that every annotator judges; the others get one.
        retests: As a share of the comparisons: shown once more with their sides swapped. Taken from those
            that everyone judges, where there are any: only then the same person sees both.
        gold: As a share of the comparisons: added, a prompt's reference answer against the one of another
            clip that was asked the same and has another answer. Fewer where there are no such prompts.
        seed: Decides what is drawn, the sides, the ids and the order.

    Returns:
        All of them in the order in which they are shown, so that a place in it tells nothing.
    """
    rng = np.random.default_rng(seed)
    compared = _comparisons(completions, per_prompt, rng)
    everyone = set(rng.permutation(len(compared))[: round(overlap * len(compared))].tolist())
    comparisons = [
        _show(seed, "comparison", a, b, everyone=number in everyone, rng=rng)
        for number, (a, b) in enumerate(compared)
    ]
    again = [one for one in comparisons if one.everyone] or comparisons
    chosen = rng.permutation(len(again))[: round(retests * len(comparisons))]
    known = _gold(
        sorted({one.prompt_id for one in comparisons}), prompts, round(gold * len(comparisons)), rng
    )
    extra = [_swapped(seed, again[i]) for i in chosen] + [
        _show(seed, "gold", right, wrong, everyone=bool(everyone), rng=rng) for right, wrong in known
    ]
    both = comparisons + extra
    return [both[i] for i in rng.permutation(len(both))]


def _comparisons(
    completions: Sequence[Completion], per_prompt: int, rng: Generator
) -> list[tuple[Completion, Completion]]:
    different: dict[str, dict[str, Completion]] = defaultdict(dict)
    for completion in completions:
        different[completion.prompt_id].setdefault(completion.text, completion)
    drawn = []
    for answers in different.values():
        possible = list(combinations(answers.values(), 2))
        drawn += [possible[i] for i in rng.permutation(len(possible))[:per_prompt]]
    return drawn


def _gold(
    asked: Sequence[str], prompts: Mapping[str, Prompt], wanted: int, rng: Generator
) -> list[tuple[Completion, Completion]]:
    """Reference answers of up to `wanted` prompts, each with one that is wrong for its clip."""
    same_question: dict[str, list[Prompt]] = defaultdict(list)
    for prompt in prompts.values():
        same_question[prompt.question].append(prompt)
    found: list[tuple[Completion, Completion]] = []
    for i in rng.permutation(len(asked)):
        if len(found) == wanted:
            break
        prompt = prompts[asked[i]]
        others = [
            other
            for other in same_question[prompt.question]
            if _said(other.answer_gt) != _said(prompt.answer_gt) and other.audios != prompt.audios
        ]
        if others:
            wrong = others[int(rng.integers(len(others)))]
            found.append((_reference(prompt, prompt), _reference(prompt, wrong)))
    return found


def _said(answer: str) -> str:
    """An answer without case and punctuation: "Seven." and "seven" say the same."""
    return " ".join(re.findall(r"\w+", answer.casefold()))


def _reference(prompt: Prompt, source: Prompt) -> Completion:
    """The reference answer of `source`, as if a policy had given it to `prompt`."""
    return Completion(
        id=stable_id("reference", source.id),
        prompt_id=prompt.id,
        index=0,
        text=source.answer_gt,
        policy="reference",
    )


def _show(
    seed: int, purpose: Purpose, first: Completion, second: Completion, *, everyone: bool, rng: Generator
) -> Comparison:
    """Show two answers with their sides drawn by lot. Of gold, `first` is the right one."""
    swapped = rng.random() < 0.5
    a, b = (second, first) if swapped else (first, second)
    return Comparison(
        id=_id(seed, purpose, a.prompt_id, a.id, a.text, b.id, b.text),
        prompt_id=a.prompt_id,
        completion_a=a.id,
        completion_b=b.id,
        text_a=a.text,
        text_b=b.text,
        everyone=everyone,
        purpose=purpose,
        expected=None if purpose != "gold" else "b" if swapped else "a",
    )


def _swapped(seed: int, one: Comparison) -> Comparison:
    return Comparison(
        id=_id(seed, "retest", one.prompt_id, one.completion_b, one.text_b, one.completion_a, one.text_a),
        prompt_id=one.prompt_id,
        completion_a=one.completion_b,
        completion_b=one.completion_a,
        text_a=one.text_b,
        text_b=one.text_a,
        everyone=one.everyone,
        purpose="retest",
        retest_of=one.id,
    )


def _id(seed: int, *parts: str) -> str:
    return stable_id(seed, json.dumps(parts))  # JSON: texts may hold any separator


def datasets(name: str, comparisons: Sequence[Comparison]) -> dict[str, list[Comparison]]:
    """The datasets that hold what is shown, by name: Argilla sets the overlap per dataset, not per record.

    The names carry a digest of all that is shown, so another set never lands among the answers to this one.
    """
    key = "\n".join(sorted(one.model_dump_json() for one in comparisons))
    digest = hashlib.sha256(key.encode()).hexdigest()[:8]
    parts = {
        f"{name}-{digest}-everyone": [one for one in comparisons if one.everyone],
        f"{name}-{digest}-one-each": [one for one in comparisons if not one.everyone],
    }
    return {dataset: records for dataset, records in parts.items() if records}


def unblind(
    comparison: Comparison,
    annotator: str,
    answers: Mapping[str, Any],
    *,
    submitted_at: str | None = None,
    seconds: float | None = None,
    heard: float | None = None,
) -> Judgement:
    """Say what an annotator's answers about "A" and "B" are about.

    Args:
        comparison: The key of the record.
        annotator: User name.
        answers: By question as in `settings`; optional ones may be missing.
        submitted_at: See `Judgement`, as `seconds` and `heard`.
        seconds: From the previous submission.
        heard: Share of the clip.

    Raises:
        BadAnswer: naming the record, the annotator, the question and the answer that do not fit.
    """
    who = f"record {comparison.id!r}, annotator {annotator!r}"
    try:
        return Judgement(
            id=stable_id(comparison.id, annotator),
            comparison=comparison.id,
            prompt_id=comparison.prompt_id,
            completion_a=comparison.completion_a,
            completion_b=comparison.completion_b,
            annotator=annotator,
            factuality=answers.get("factuality"),
            behaviour=answers.get("behaviour"),
            purpose=comparison.purpose,
            retest_of=comparison.retest_of,
            expected=comparison.expected,
            errors_a=tuple(answers.get("errors_a") or ()),
            errors_b=tuple(answers.get("errors_b") or ()),
            audio_unusable=_is_unusable(answers.get("clip"), who),
            corrected=_text(answers.get("corrected")),
            rationale=_text(answers.get("rationale")),
            submitted_at=submitted_at,
            seconds=seconds,
            heard=heard,
        )
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise BadAnswer(
            f"{who}: {where}: {str(first['input'])[:80]!r} is no answer to it ({first['msg']}); "
            "were the dataset's questions changed?"
        ) from error


def _is_unusable(value: Any, who: str) -> bool:
    if value not in (None, "usable", "unusable"):
        raise BadAnswer(f"{who}: clip: {str(value)[:80]!r} is neither 'usable' nor 'unusable'")
    return bool(value == "unusable")


def _text(value: str | None) -> str | None:
    return value if value and value.strip() else None

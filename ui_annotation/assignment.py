"""Which answers are compared, on which side, by whom, and why: drawn from a seed, blind to the annotator.

`draw` makes the key; only record ids, texts and clips leave this machine. `unblind` joins what an annotator
answered to the key again. Every draw is a function of the seed and of what is drawn, whatever else there is:
with more prompts, retests or gold, what was drawn before stays drawn.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from pydantic import ValidationError

from preference_data.schema import Comparison, Completion, Judgement, Prompt, Purpose, stable_id
from ui_annotation import AnnotationError


class BadAnswer(AnnotationError):
    """A judgement that came back and does not fit its comparison."""


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
    pairs = _pairs(completions, per_prompt, seed)
    pairs.sort(key=lambda pair: _lot(seed, "overlap", pair[0].prompt_id, pair[0].text, pair[1].text))
    n_everyone = round(overlap * len(pairs))
    comparisons = [
        _compare(seed, "comparison", first, second, everyone=number < n_everyone)
        for number, (first, second) in enumerate(pairs)
    ]
    candidates = comparisons[:n_everyone] or comparisons
    candidates = sorted(candidates, key=lambda item: _lot(seed, "retest", item.id))
    retested = [_retest(seed, item) for item in candidates[: round(retests * len(pairs))]]
    n_gold = round(gold * len(pairs))
    known = [
        _compare(seed, "gold", right, wrong, everyone=n_everyone > 0)
        for right, wrong in _gold({item.prompt_id for item in comparisons}, prompts, n_gold, seed)
    ]
    return sorted(comparisons + retested + known, key=lambda item: _lot(seed, "order", item.id))


def _lot(seed: int, purpose: str, *parts: str) -> int:
    """A random number that depends on nothing but its arguments."""
    return int(stable_id(seed, purpose, json.dumps(parts)), 16)  # JSON: texts may hold any separator


def _pairs(
    completions: Sequence[Completion], per_prompt: int, seed: int
) -> list[tuple[Completion, Completion]]:
    """Pairs of different answers to the same prompt, the answers of each in the order of their texts."""
    by_text: dict[str, dict[str, Completion]] = defaultdict(dict)
    for completion in completions:
        by_text[completion.prompt_id].setdefault(completion.text, completion)
    drawn: list[tuple[Completion, Completion]] = []
    for prompt_id, answers in by_text.items():
        texts = sorted(
            combinations(sorted(answers), 2), key=lambda pair: _lot(seed, "pair", prompt_id, *pair)
        )
        drawn += [(answers[first], answers[second]) for first, second in texts[:per_prompt]]
    return drawn


def _gold(
    prompt_ids: set[str], prompts: Mapping[str, Prompt], n: int, seed: int
) -> list[tuple[Completion, Completion]]:
    """Reference answers of up to `n` prompts, each with one that is wrong for its clip."""
    same_question: dict[str, list[Prompt]] = defaultdict(list)
    for prompt in prompts.values():
        same_question[prompt.question].append(prompt)
    pairs: list[tuple[Completion, Completion]] = []
    for prompt_id in sorted(prompt_ids, key=lambda name: _lot(seed, "gold", name)):
        if len(pairs) == n:
            break
        prompt = prompts[prompt_id]
        others = [
            other
            for other in same_question[prompt.question]
            if _words(other.answer_gt) != _words(prompt.answer_gt) and other.audios != prompt.audios
        ]
        if others:
            wrong = min(others, key=lambda other: _lot(seed, "wrong", prompt.id, other.id))
            pairs.append((_reference(prompt, prompt), _reference(prompt, wrong)))
    return pairs


def _words(answer: str) -> str:
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


def _compare(
    seed: int, purpose: Purpose, first: Completion, second: Completion, *, everyone: bool
) -> Comparison:
    """Compare two answers with their sides drawn by lot. Of gold, `first` is the right one."""
    swapped = _lot(seed, "side", purpose, first.prompt_id, first.text, second.text) % 2 == 1
    a, b = (second, first) if swapped else (first, second)
    return Comparison(
        id=_record_id(seed, purpose, a.prompt_id, a.text, b.text),
        prompt_id=a.prompt_id,
        completion_a=a.id,
        completion_b=b.id,
        text_a=a.text,
        text_b=b.text,
        everyone=everyone,
        purpose=purpose,
        expected=None if purpose != "gold" else "b" if swapped else "a",
    )


def _retest(seed: int, first: Comparison) -> Comparison:
    """The same comparison with its sides swapped."""
    return Comparison(
        id=_record_id(seed, "retest", first.prompt_id, first.text_b, first.text_a),
        prompt_id=first.prompt_id,
        completion_a=first.completion_b,
        completion_b=first.completion_a,
        text_a=first.text_b,
        text_b=first.text_a,
        everyone=first.everyone,
        purpose="retest",
        retest_of=first.id,
    )


def _record_id(seed: int, *parts: str) -> str:
    return stable_id(seed, json.dumps(parts))


def unblind(
    comparison: Comparison,
    annotator: str,
    answers: Mapping[str, Any],
    *,
    submitted_at: str | None = None,
    seconds: float | None = None,
    heard: float | None = None,
) -> Judgement:
    """Join an annotator's answers about "A" and "B" to the completions that they are about.

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
    where = f"record {comparison.id!r}, annotator {annotator!r}"
    copied = ("prompt_id", "completion_a", "completion_b", "purpose", "retest_of", "expected")
    try:
        return Judgement(
            id=stable_id(comparison.id, annotator),
            comparison=comparison.id,
            annotator=annotator,
            **{name: getattr(comparison, name) for name in copied},
            factuality=answers.get("factuality"),
            behaviour=answers.get("behaviour"),
            errors_a=tuple(answers.get("errors_a") or ()),
            errors_b=tuple(answers.get("errors_b") or ()),
            audio_unusable=_is_unusable(answers.get("clip"), where),
            corrected=_text(answers.get("corrected")),
            rationale=_text(answers.get("rationale")),
            submitted_at=submitted_at,
            seconds=seconds,
            heard=heard,
        )
    except ValidationError as error:
        first = error.errors()[0]
        question = ".".join(map(str, first["loc"]))
        raise BadAnswer(
            f"{where}: {question}: {str(first['input'])[:80]!r} is not an answer to it ({first['msg']}); "
            "were the dataset's questions changed?"
        ) from error


def _is_unusable(value: Any, where: str) -> bool:
    if value not in (None, "usable", "unusable"):
        raise BadAnswer(f"{where}: clip: {str(value)[:80]!r} is neither 'usable' nor 'unusable'")
    return bool(value == "unusable")


def _text(value: str | None) -> str | None:
    return value if value and value.strip() else None

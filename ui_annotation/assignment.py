"""Which completions are compared, in which order, by whom, and why: drawn from a seed, blind for annotators.

`draw` makes the key; only record ids, texts and clips leave this machine. `unblind` joins what an annotator
answered to the key again. Every draw is a function of the seed and of what is drawn, whatever else there is:
with more prompts, retests or gold, what was drawn before stays drawn.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from itertools import chain, combinations, islice, product
from typing import Any, NamedTuple

from pydantic import ValidationError

from preference_data.schema import (
    AXES,
    MOST_COMPARED,
    AnnotatorKind,
    Comparison,
    Completion,
    Judgement,
    Prompt,
    Purpose,
    Ranking,
    stable_id,
)
from ui_annotation import AnnotationError

PLACES = "abcd"
"""What annotators call the completions of a comparison, in order."""
CHOICES: dict[str, Ranking] = {
    "a": Ranking(ranks=(1, 2)),
    "b": Ranking(ranks=(2, 1)),
    "tie": Ranking(ranks=(1, 1)),
    "both_bad": Ranking(ranks=(1, 1), all_bad=True),
}
"""Answers to a question about two completions."""
Truth = Callable[[Prompt, str], bool | None]
"""Whether a text is true of the prompt's clips; None where that is not known."""


class BadAnswer(AnnotationError):
    """A judgement that came back and does not fit its comparison."""


class Rates(NamedTuple):
    """Shares of the comparisons, the same in every dataset, so that none of them tells what a record is for.

    `retests` are shown once more in reverse order; `gold` are added, their right order is known.
    """

    retests: float
    gold: float


def draw(
    completions: Sequence[Completion],
    prompts: Mapping[str, Prompt],
    *,
    size: int,
    per_prompt: int,
    overlap: float,
    rates: Rates,
    seed: int,
    is_true: Truth = lambda prompt, text: None,
    earlier: Iterable[Judgement] = (),
) -> list[Comparison]:
    """Up to `per_prompt` comparisons of different completions per prompt, and what measures their annotators.

    Args:
        completions: Of policies; their order does not matter to the annotators.
        prompts: By id, at least those of the completions.
        size: Completions in a comparison; fewer where a prompt has no more different ones.
        per_prompt: Most comparisons of a prompt.
        overlap: Share of the comparisons that every annotator judges; the others get one.
        rates: Of what measures annotators.
        seed: Decides what is drawn, the order within a comparison, and the order of all.
        is_true: Gold is made of completions of which this says that some are true and others false; where
            there are too few, the prompt's reference takes the place of a true one.
        earlier: Judgements that are there already: their comparisons are drawn first, as they were shown.
            Those that a person decided (adjudication) can be gold too.

    Returns:
        All of them in the order in which they are shown, so that a place in it tells nothing.
    """
    earlier = list(earlier)
    texts = _by_text(completions)
    sets = _sets(texts, size, per_prompt, seed, _orders(earlier))
    sets.sort(key=lambda item: _lot(seed, "overlap", item.prompt_id, *sorted(item.texts)))
    n_everyone = round(overlap * len(sets))
    groups: dict[tuple[int, bool], list[Comparison]] = defaultdict(list)
    for number, item in enumerate(sets):
        everyone = number < n_everyone
        groups[len(item.texts), everyone].append(_comparison(item, texts, everyone=everyone))
    drawn = {comparison.id: comparison for group in groups.values() for comparison in group}
    taken = {_key(item.prompt_id, item.texts) for item in drawn.values()}
    for (n, everyone), group in groups.items():
        candidates = sorted(group, key=lambda item: _lot(seed, "retest", item.id))
        retested = [_reversed(item, "retest") for item in candidates[: round(rates.retests * len(group))]]
        known = chain(_confirmed(group, earlier), _known(texts, prompts, n, seed, is_true, taken))
        gold = list(islice(known, round(rates.gold * len(group))))
        taken.update(_key(item.prompt_id, item.texts) for item in gold)
        drawn |= {item.id: item.model_copy(update={"everyone": everyone}) for item in retested + gold}
    return sorted(drawn.values(), key=lambda item: _lot(seed, "order", item.id))


class _Set(NamedTuple):
    """Texts of completions to compare, in the order in which they are shown."""

    prompt_id: str
    texts: tuple[str, ...]


def _lot(seed: int, purpose: str, *parts: str) -> int:
    """A random number that depends on nothing but its arguments."""
    return int(stable_id(seed, purpose, json.dumps(parts)), 16)  # JSON: texts may hold any separator


def _key(prompt_id: str, texts: Iterable[str]) -> tuple[str, frozenset[str]]:
    return prompt_id, frozenset(texts)


def _by_text(completions: Iterable[Completion]) -> dict[str, dict[str, Completion]]:
    by_text: dict[str, dict[str, Completion]] = defaultdict(dict)
    for completion in completions:
        by_text[completion.prompt_id].setdefault(completion.text, completion)
    return by_text


def _orders(earlier: Iterable[Judgement]) -> dict[str, dict[frozenset[str], tuple[str, ...]]]:
    """By prompt: what was compared, and the order in which it was shown."""
    orders: dict[str, dict[frozenset[str], tuple[str, ...]]] = defaultdict(dict)
    for judgement in earlier:
        if judgement.purpose == "comparison":
            orders[judgement.prompt_id].setdefault(frozenset(judgement.texts), judgement.texts)
    return orders


def _sets(
    texts: Mapping[str, Mapping[str, Completion]],
    size: int,
    per_prompt: int,
    seed: int,
    orders: Mapping[str, Mapping[frozenset[str], tuple[str, ...]]],
) -> list[_Set]:
    """Different completions of the same prompt; those first that were compared before."""
    drawn: list[_Set] = []
    for prompt_id, own in texts.items():
        n, known = min(size, len(own)), orders.get(prompt_id, {})
        if n < 2:
            continue
        options = sorted(
            combinations(sorted(own), n),
            key=lambda option: (frozenset(option) not in known, _lot(seed, "pair", prompt_id, *option)),
        )
        drawn += [
            _Set(prompt_id, known.get(frozenset(option)) or _shuffled(seed, prompt_id, option))
            for option in options[:per_prompt]
        ]
    return drawn


def _shuffled(seed: int, prompt_id: str, texts: Iterable[str]) -> tuple[str, ...]:
    """Texts in an order drawn by lot, the same whatever order they come in."""
    together = sorted(texts)
    return tuple(sorted(together, key=lambda text: _lot(seed, "place", prompt_id, *together, text)))


def _comparison(
    item: _Set,
    texts: Mapping[str, Mapping[str, Completion]],
    *,
    everyone: bool = False,
    purpose: Purpose = "comparison",
    about: str | None = None,
    expected: Ranking | None = None,
) -> Comparison:
    """A record of these texts; one that no policy gave is named by its words."""
    own = texts.get(item.prompt_id, {})
    return Comparison(
        id=record_id(item.prompt_id, item.texts),
        prompt_id=item.prompt_id,
        completions=tuple(
            own[text].id if text in own else stable_id("person", item.prompt_id, text) for text in item.texts
        ),
        texts=item.texts,
        everyone=everyone,
        purpose=purpose,
        about=about,
        expected=expected,
    )


def record_id(prompt_id: str, texts: Sequence[str]) -> str:
    """The id of a record: whoever knows the texts can make it, so it does not tell what the record is for."""
    return stable_id(json.dumps([prompt_id, *texts]))


def _reversed(item: Comparison, purpose: Purpose, expected: Ranking | None = None) -> Comparison:
    """The same completions in reverse order, so that each pair of them changes sides."""
    texts = item.texts[::-1]
    return item.model_copy(
        update={
            "id": record_id(item.prompt_id, texts),
            "completions": item.completions[::-1],
            "texts": texts,
            "purpose": purpose,
            "about": item.id,
            "expected": expected,
        }
    )


# -------------------------------------------------------------------- gold


def _confirmed(group: Iterable[Comparison], earlier: Iterable[Judgement]) -> Iterator[Comparison]:
    """Comparisons that a named person has decided, in reverse order."""
    decided = {
        _key(item.prompt_id, item.texts): dict(zip(item.texts, item.factuality.ranks, strict=True))
        for item in earlier
        if item.purpose == "adjudication" and item.factuality and len(set(item.factuality.ranks)) > 1
    }
    for item in group:
        if ranks := decided.get(_key(item.prompt_id, item.texts)):
            expected = Ranking(ranks=tuple(ranks[text] for text in item.texts[::-1]))
            yield _reversed(item, "gold", expected)


def _known(
    texts: Mapping[str, Mapping[str, Completion]],
    prompts: Mapping[str, Prompt],
    size: int,
    seed: int,
    is_true: Truth,
    taken: Container[tuple[str, frozenset[str]]],
) -> Iterator[Comparison]:
    """Comparisons of `size` completions of which some are true and others false, at most one a prompt.

    Those of completions of the policy alone come first: they look like all others. Where there are no more,
    the prompt's reference is put among them.
    """
    order = sorted(texts, key=lambda name: _lot(seed, "gold", name))
    done: set[str] = set()
    for extra, prompt_id in product((False, True), order):
        if prompt_id in done:
            continue
        prompt = prompts[prompt_id]
        own = {*texts[prompt_id], *([prompt.answer_gt] if extra and prompt.answer_gt.strip() else [])}
        truth = {text: known for text in sorted(own) if (known := is_true(prompt, text)) is not None}
        options = sorted(combinations(truth, size), key=lambda some: _lot(seed, "gold", prompt_id, *some))
        for option in options:
            if len({truth[text] for text in option}) == 2 and _key(prompt_id, option) not in taken:
                shown = _shuffled(seed, prompt_id, option)
                expected = Ranking(ranks=tuple(1 if truth[text] else 2 for text in shown))
                yield _comparison(_Set(prompt_id, shown), texts, purpose="gold", expected=expected)
                done.add(prompt_id)
                break


# -------------------------------------------------------------------- what a named person decides


def review(judgements: Sequence[Judgement], seed: int) -> list[Comparison]:
    """What a named person decides: comparisons whose annotators disagree, and completions that they typed.

    Annotators disagree where one prefers a completion to another, and somebody else the other way round, on
    either axis. A typed completion is shown among those it was typed for, without a mark; with
    `MOST_COMPARED` of these, the last one gives way to it.
    """
    of_comparison: dict[str, list[Judgement]] = defaultdict(list)
    for item in judgements:
        if item.purpose == "comparison":
            of_comparison[item.comparison].append(item)
    comparisons: dict[str, Comparison] = {}
    for name, given in of_comparison.items():
        first = given[0]
        ids = dict(zip(first.texts, first.completions, strict=True))
        texts = {
            first.prompt_id: {text: _completion(first.prompt_id, text, id_) for text, id_ in ids.items()}
        }
        if _disagree(given):
            order = _shuffled(seed, f"adjudication of {first.prompt_id}", first.texts)
            decides = _comparison(_Set(first.prompt_id, order), texts, purpose="adjudication", about=name)
            comparisons.setdefault(decides.id, decides)
        for typed in sorted({(item.corrected or "").strip() for item in given} - {""}):
            if typed not in {text.strip() for text in first.texts}:
                order = _shuffled(seed, first.prompt_id, [*first.texts[: MOST_COMPARED - 1], typed])
                approves = _comparison(_Set(first.prompt_id, order), texts, purpose="correction", about=name)
                comparisons.setdefault(approves.id, approves)
    return sorted(comparisons.values(), key=lambda item: _lot(seed, "order", item.id))


def _completion(prompt_id: str, text: str, id_: str) -> Completion:
    return Completion(id=id_, prompt_id=prompt_id, index=0, text=text, policy="compared")


def _disagree(given: Sequence[Judgement]) -> bool:
    for axis in AXES:
        rankings = [ranking for item in given if (ranking := getattr(item, axis)) is not None]
        for i, j in combinations(range(len(given[0].texts)), 2):
            if any(item.prefers(i, j) for item in rankings) and any(item.prefers(j, i) for item in rankings):
                return True
    return False


# -------------------------------------------------------------------- what came back


def unblind(
    comparison: Comparison,
    annotator: str,
    answers: Mapping[str, Any],
    *,
    kind: AnnotatorKind = "person",
    submitted_at: str | None = None,
    seconds: float | None = None,
    heard: float | None = None,
) -> Judgement:
    """Join an annotator's answers about "A", "B" ... to the completions that they are about.

    Args:
        comparison: The key of the record.
        annotator: User name.
        answers: By question as in `settings`; optional ones may be missing.
        kind: Of annotator.
        submitted_at: See `Judgement`, as `seconds` and `heard`.
        seconds: From the previous submission.
        heard: Share of the clip.

    Raises:
        BadAnswer: naming the record, the annotator, the question and the answer that do not fit.
    """
    where = f"record {comparison.id!r}, annotator {annotator!r}"
    n = len(comparison.texts)
    copied = ("prompt_id", "completions", "texts", "purpose", "about", "expected")
    all_bad = answers.get("all_bad") or ()
    thumbs = _thumbs(answers.get("thumbs") or (), n)
    errors = tuple(tuple(answers.get(f"errors_{place}") or ()) for place in PLACES[:n])
    try:
        return Judgement(
            id=stable_id(comparison.id, annotator),
            comparison=comparison.id,
            kind="choice" if n == 2 else "ranking",
            annotator=annotator,
            annotator_kind=kind,
            **{name: getattr(comparison, name) for name in copied},
            **{axis: _ranking(answers.get(axis), n, axis in all_bad, f"{where}: {axis}") for axis in AXES},
            thumbs=thumbs if any(thumb is not None for thumb in thumbs) else (),
            errors=errors if any(errors) else (),
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


def _ranking(answer: Any, n: int, all_bad: bool, where: str) -> Ranking:
    """A choice between two, or ranks of several; ranks without gaps, as annotators may leave some out."""
    if n == 2:
        if answer not in CHOICES:
            raise BadAnswer(f"{where}: {str(answer)[:80]!r} is not one of {', '.join(CHOICES)}")
        return CHOICES[answer]
    try:
        by_place = {item["value"]: int(item["rank"]) for item in answer}
        ranks = [by_place[place] for place in PLACES[:n]]
    except (TypeError, KeyError, ValueError):
        places = ", ".join(PLACES[:n])
        raise BadAnswer(f"{where}: {str(answer)[:80]!r} does not rank each of {places}") from None
    dense = {rank: number for number, rank in enumerate(sorted(set(ranks)), start=1)}
    return Ranking(ranks=tuple(dense[rank] for rank in ranks), all_bad=all_bad)


def _thumbs(answer: Iterable[str], n: int) -> tuple[bool | None, ...]:
    """Up, down or nothing for each completion; both at once say nothing."""
    given = set(answer)
    return tuple(
        None if (f"{place}_good" in given) == (f"{place}_bad" in given) else f"{place}_good" in given
        for place in PLACES[:n]
    )


def _is_unusable(value: Any, where: str) -> bool:
    if value not in (None, "usable", "unusable"):
        raise BadAnswer(f"{where}: clip: {str(value)[:80]!r} is neither 'usable' nor 'unusable'")
    return bool(value == "unusable")


def _text(value: str | None) -> str | None:
    return value if value and value.strip() else None

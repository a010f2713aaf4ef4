"""Which completions are compared, in which order, by whom, and why: drawn from a seed, blind for annotators.

`draw` makes the key; only record ids, texts and clips leave this machine. `unblind` joins what an annotator
answered to the key again. Every draw is a function of the seed and of what is drawn, whatever else there is:
with more prompts, retests or gold, what was drawn before stays drawn.
"""

from __future__ import annotations

import json
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from itertools import chain, combinations, islice, product
from typing import Any, NamedTuple

from pydantic import ValidationError

from preference_data.preferences import votes
from preference_data.schema import (
    AXES,
    CHOICES,
    LETTERS,
    MOST_COMPARED,
    AnnotatorKind,
    Comparison,
    Completion,
    Judgement,
    Prompt,
    Purpose,
    Ranking,
    SelectedBy,
    comparison_id,
    stable_id,
)
from ui_annotation import AnnotationError

PLACES = LETTERS.lower()
"""Completions of a comparison in order, in the names of fields and in answers."""
Truth = Callable[[Prompt, str], bool | None]
"""Whether a text is true of the prompt's clips; None where that is not known."""

Select = Callable[[Collection[tuple[str, ...]]], Mapping[tuple[str, ...], SelectedBy]]
"""Of comparisons, each the ids of its completions, those to ask about and why."""


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
    select: Select = lambda candidates: dict.fromkeys(candidates, "random"),
) -> list[Comparison]:
    """Up to `per_prompt` comparisons of different completions per prompt, and what measures their annotators.

    Args:
        completions: Of policies; their order does not matter to the annotators. Of two that look the same
            one is compared.
        prompts: By id, at least those of the completions.
        size: Completions in a comparison; fewer where a prompt has no more different ones.
        per_prompt: Most comparisons of a prompt.
        overlap: Share of the comparisons that every annotator judges; the others get one.
        rates: Of what measures annotators.
        seed: Decides what is drawn, the order within a comparison, and the order of all.
        is_true: Gold is made of completions of which this says that some are true and others false; where
            there are too few, the prompt's reference takes the place of a true one.
        earlier: Judgements that are there already: what they judge is drawn first, as it was shown and for
            what it was shown. Comparisons that a person decided (adjudication) can be gold too.
        select: Of all comparisons, those to ask about; what was judged earlier stays, selected or not.

    Returns:
        All of them in the order in which they are shown, so that a place in it tells nothing.
    """
    history = _history(earlier)
    texts = _by_text(completions)
    sets = _select(_sets(texts, size, per_prompt, seed, history), texts, history, select)
    sets.sort(
        key=lambda item: (
            history.judges[comparison_id(item.prompt_id, item.texts)] < 2,
            _lot(seed, "overlap", item.prompt_id, *sorted(item.texts)),
        )
    )
    n_everyone = round(overlap * len(sets))
    groups: dict[tuple[int, bool], list[Comparison]] = defaultdict(list)
    for number, item in enumerate(sets):
        everyone = number < n_everyone
        groups[len(item.texts), everyone].append(_comparison(item, texts, everyone=everyone))
    drawn = {comparison.id: comparison for group in groups.values() for comparison in group}
    taken = {_key(item.prompt_id, item.texts) for item in drawn.values()}
    for (n, everyone), group in groups.items():
        controls = _retests(group, round(rates.retests * len(group)), seed, history)
        retested = {control.about for control in controls}
        gold = chain(
            _earlier_gold(everyone, texts, prompts, n, seed, is_true, taken, history),
            _gold_of_adjudications((item for item in group if item.id not in retested), history),
            _gold(_gold_order(texts, everyone, overlap, seed), texts, prompts, n, seed, is_true, taken),
        )
        for right in islice(gold, round(rates.gold * len(group))):
            taken.add(_key(right.prompt_id, right.texts))
            controls.append(right)
        drawn |= {control.id: control.model_copy(update={"everyone": everyone}) for control in controls}
    return sorted(drawn.values(), key=lambda item: _lot(seed, "order", item.id))


_Key = tuple[str, frozenset[str]]
"""A prompt and the texts that are compared, in whatever order."""


class _History(NamedTuple):
    """What is judged already, and so is drawn again before anything else."""

    compared: Collection[_Key]
    gold: Collection[_Key]
    orders: Mapping[_Key, tuple[str, ...]]
    """In which both were shown."""
    judges: Counter[str]
    """By record id: how many judged it."""
    decided: Mapping[_Key, Mapping[str, int]]
    """Ranks of texts in factuality by a named person, where not all are equal."""


def _history(earlier: Iterable[Judgement]) -> _History:
    judgements = {item.id: item for item in earlier}.values()
    of: dict[Purpose, dict[_Key, Judgement]] = defaultdict(dict)
    for item in judgements:
        of[item.purpose].setdefault(_key(item.prompt_id, item.texts), item)
    return _History(
        compared=of["comparison"].keys(),
        gold=of["gold"].keys(),
        orders={key: item.texts for key, item in (of["gold"] | of["comparison"]).items()},
        judges=Counter(item.comparison for item in judgements),
        decided={
            key: dict(zip(item.texts, item.factuality.ranks, strict=True))
            for key, item in of["adjudication"].items()
            if item.factuality and len(set(item.factuality.ranks)) > 1
        },
    )


class _Set(NamedTuple):
    """Texts of completions to compare, in the order in which they are shown."""

    prompt_id: str
    texts: tuple[str, ...]
    selected: SelectedBy | None = None


def _lot(seed: int, purpose: str, *parts: str) -> int:
    """A random number that depends on nothing but its arguments."""
    return int(stable_id(seed, purpose, json.dumps(parts)), 16)  # JSON: texts may hold any separator


def _key(prompt_id: str, texts: Iterable[str]) -> _Key:
    return prompt_id, frozenset(texts)


def _by_text(completions: Iterable[Completion]) -> dict[str, dict[str, Completion]]:
    """By prompt and text; of texts that nobody can tell apart the shortest."""
    by_look: dict[str, dict[str, Completion]] = defaultdict(dict)
    for completion in completions:
        own, look = by_look[completion.prompt_id], _look(completion.text)
        own[look] = min(own.get(look, completion), completion, key=lambda item: (len(item.text), item.text))
    return {prompt_id: {item.text: item for item in own.values()} for prompt_id, own in by_look.items()}


def _look(text: str) -> str:
    """What annotators see of a text: no space around it, nor of how many code points a letter is made."""
    return unicodedata.normalize("NFC", text.strip())


def _sets(
    texts: Mapping[str, Mapping[str, Completion]],
    size: int,
    per_prompt: int,
    seed: int,
    history: _History,
) -> list[_Set]:
    """Different completions of the same prompt; those first that were compared before, gold last."""

    def priority(key: _Key) -> int:
        return 0 if key in history.compared else 2 if key in history.gold else 1

    drawn: list[_Set] = []
    for prompt_id, own in texts.items():
        n = min(size, len(own))
        if n < 2:
            continue
        options = sorted(
            combinations(sorted(own), n),
            key=lambda some: (priority(_key(prompt_id, some)), _lot(seed, "pair", prompt_id, *some)),
        )
        drawn += [
            _Set(prompt_id, history.orders.get(_key(prompt_id, some)) or _shuffled(seed, prompt_id, some))
            for some in options[:per_prompt]
        ]
    return drawn


def _select(
    sets: Sequence[_Set],
    texts: Mapping[str, Mapping[str, Completion]],
    history: _History,
    select: Select,
) -> list[_Set]:
    """What `select` takes, and what was compared before.

    It is given both, or what is drawn at random would be a sample only of what nobody has judged yet.
    """
    by_ids = {tuple(texts[item.prompt_id][text].id for text in item.texts): item for item in sets}
    chosen = select(by_ids.keys())
    return [
        item._replace(selected=chosen.get(ids))
        for ids, item in by_ids.items()
        if ids in chosen or _key(item.prompt_id, item.texts) in history.compared
    ]


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
        id=comparison_id(item.prompt_id, item.texts),
        prompt_id=item.prompt_id,
        completions=tuple(
            own[text].id if text in own else stable_id("person", item.prompt_id, text) for text in item.texts
        ),
        texts=item.texts,
        everyone=everyone,
        purpose=purpose,
        about=about,
        expected=expected,
        selected=item.selected,
    )


def _reversed(item: Comparison, purpose: Purpose, expected: Ranking | None = None) -> Comparison:
    """The same completions in reverse order, so that each pair of them changes sides."""
    texts = item.texts[::-1]
    return item.model_copy(
        update={
            "id": comparison_id(item.prompt_id, texts),
            "completions": item.completions[::-1],
            "texts": texts,
            "purpose": purpose,
            "about": item.id,
            "expected": expected,
        }
    )


# -------------------------------------------------------------------- what measures annotators


def _retests(group: Iterable[Comparison], n: int, seed: int, history: _History) -> list[Comparison]:
    """`n` comparisons of a group in reverse order."""
    reverse = [_reversed(item, "retest") for item in group]
    reverse.sort(key=lambda item: (item.id not in history.judges, _lot(seed, "retest", str(item.about))))
    return reverse[:n]


def _gold_of_adjudications(group: Iterable[Comparison], history: _History) -> Iterator[Comparison]:
    """Comparisons that a named person has decided, in reverse order: those first that were gold before."""
    decided = [(key, item) for item in group if (key := _key(item.prompt_id, item.texts)) in history.decided]
    for key, item in sorted(decided, key=lambda pair: pair[0] not in history.gold):
        ranks = history.decided[key]
        expected = Ranking(ranks=tuple(ranks[text] for text in item.texts[::-1]))
        yield _reversed(item, "gold", expected)


def _earlier_gold(
    everyone: bool,
    texts: Mapping[str, Mapping[str, Completion]],
    prompts: Mapping[str, Prompt],
    size: int,
    seed: int,
    is_true: Truth,
    taken: Container[_Key],
    history: _History,
) -> Iterator[Comparison]:
    """What was gold before, as it was shown, where its completions are still there.

    What several judged is for everyone.
    """
    for key in sorted(history.gold, key=lambda key: _lot(seed, "gold", key[0], *sorted(key[1]))):
        if (history.judges[comparison_id(key[0], history.orders[key])] > 1) != everyone:
            continue
        prompt_id, some = key
        if len(some) == size and prompt_id in texts and key not in taken:
            prompt = prompts[prompt_id]
            truth = {text: is_true(prompt, text) for text in some}
            if some <= {*texts[prompt_id], prompt.answer_gt} and set(truth.values()) == {True, False}:
                yield _gold_of(_Set(prompt_id, history.orders[key]), truth, texts)


def _gold_order(prompt_ids: Iterable[str], everyone: bool, overlap: float, seed: int) -> list[str]:
    """Prompts in the order in which they give gold to everyone, or to one each.

    Each has its own prompts first, so that more gold for the ones takes none from the others.
    """

    def priority(name: str) -> tuple[bool, int]:
        is_for_everyone = _lot(seed, "gold for everyone", name) < overlap * 16**16
        return is_for_everyone != everyone, _lot(seed, "gold", name)

    return sorted(prompt_ids, key=priority)


def _gold(
    order: Sequence[str],
    texts: Mapping[str, Mapping[str, Completion]],
    prompts: Mapping[str, Prompt],
    size: int,
    seed: int,
    is_true: Truth,
    taken: Container[_Key],
) -> Iterator[Comparison]:
    """Comparisons of `size` completions of which some are true and others false, at most one a prompt.

    Those of completions of the policy alone come first: they look like all others. Where there are no more,
    the prompt's reference is put among them.
    """
    done: set[str] = set()
    for extra, prompt_id in product((False, True), order):
        if prompt_id in done:
            continue
        prompt = prompts[prompt_id]
        own = {*texts[prompt_id], *([prompt.answer_gt] if extra and prompt.answer_gt.strip() else [])}
        truth = {text: known for text in sorted(own) if (known := is_true(prompt, text)) is not None}
        options = sorted(combinations(truth, size), key=lambda some: _lot(seed, "gold", prompt_id, *some))
        for some in options:
            if len({truth[text] for text in some}) == 2 and _key(prompt_id, some) not in taken:
                yield _gold_of(_Set(prompt_id, _shuffled(seed, prompt_id, some)), truth, texts)
                done.add(prompt_id)
                break


def _gold_of(
    item: _Set, truth: Mapping[str, bool | None], texts: Mapping[str, Mapping[str, Completion]]
) -> Comparison:
    expected = Ranking(ranks=tuple(1 if truth[text] else 2 for text in item.texts))
    return _comparison(item, texts, purpose="gold", expected=expected)


# -------------------------------------------------------------------- what a named person decides


def review(judgements: Sequence[Judgement], adjudicator: str | None = None) -> list[Comparison]:
    """What a named person decides: comparisons whose annotators disagree, and completions that they typed.

    It goes by the judgements that `5_pairs` takes for votes: comparisons, and retests by somebody who did not
    judge the comparison. Annotators disagree where one prefers a completion to another, and somebody else the
    other way round, on either axis. A typed completion is shown among those it was typed for, without a mark;
    with `MOST_COMPARED` of these, the last one gives way to it. It is not shown to an adjudicator who typed
    it, for nobody approves their own. No seed of a recipe changes what is drawn here, so that a person
    decides once.
    """
    of_comparison: dict[str, list[Judgement]] = defaultdict(list)
    typists: dict[tuple[str, str], set[str]] = defaultdict(set)
    for item in votes.opinions(judgements):
        of_comparison[votes.subject(item)].append(item)
        typists[item.prompt_id, (item.corrected or "").strip()].add(item.annotator)
    reviews: dict[str, Comparison] = {}
    for given in of_comparison.values():
        first = next((item for item in given if item.purpose == "comparison"), given[0])
        texts = first.texts if first.purpose == "comparison" else first.texts[::-1]  # as of the comparison
        if _disagree(given, texts):
            record = _review(first, texts, "adjudication")
            reviews.setdefault(record.id, record)
        for typed in sorted({(item.corrected or "").strip() for item in given} - {""}):
            is_own = adjudicator in typists[first.prompt_id, typed]
            if not is_own and typed not in {text.strip() for text in texts}:
                record = _review(first, [*texts[: MOST_COMPARED - 1], typed], "correction")
                reviews.setdefault(record.id, record)
    return sorted(reviews.values(), key=lambda item: item.id)


def _review(about: Judgement, texts: Sequence[str], purpose: Purpose) -> Comparison:
    """Its id is of no record that annotators get: who decides may be one of them."""
    own = {
        text: Completion(id=id_, prompt_id=about.prompt_id, index=0, text=text, policy="compared")
        for text, id_ in zip(about.texts, about.completions, strict=True)
    }
    order = _shuffled(0, f"{purpose} of {about.prompt_id}", texts)
    item = _comparison(
        _Set(about.prompt_id, order), {about.prompt_id: own}, purpose=purpose, about=votes.subject(about)
    )
    return item.model_copy(update={"id": stable_id("review", item.id)})


def _disagree(given: Sequence[Judgement], texts: Sequence[str]) -> bool:
    places = [votes.places_in(item, texts) for item in given]
    for axis in AXES:
        both = zip(given, places, strict=True)
        rankings = [(ranking, own) for item, own in both if (ranking := item.ranking(axis))]
        for i, j in combinations(range(len(texts)), 2):
            sides = {
                (ranking.prefers(own[i], own[j]), ranking.prefers(own[j], own[i]))
                for ranking, own in rankings
            }
            if {(True, False), (False, True)} <= sides:
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
    all_bad = _labels(answers, "all_bad", AXES, where)
    offered = [f"{place}_{value}" for place in PLACES[:n] for value in ("good", "bad")]
    thumbs = _thumbs(_labels(answers, "thumbs", offered, where), n)
    errors = tuple(tuple(answers.get(f"errors_{place}") or ()) for place in PLACES[:n])
    try:
        return Judgement.of(
            comparison,
            annotator,
            kind,
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
    return Ranking.dense(ranks, all_bad=all_bad)


def _labels(answers: Mapping[str, Any], question: str, offered: Sequence[str], where: str) -> set[str]:
    """What was chosen of the labels of an optional question."""
    given = set(answers.get(question) or ())
    if wrong := sorted(map(str, given - set(offered))):
        raise BadAnswer(f"{where}: {question}: {wrong[0][:80]!r} is not one of {', '.join(offered)}")
    return given


def _thumbs(given: Collection[str], n: int) -> tuple[bool | None, ...]:
    """Up, down or nothing for each completion; both at once say nothing."""
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

"""Whether multiple-choice answers need the clip: the same questions with silence, and with another clip.

What a policy gets right with silence in the clip's place it has from the texts: accuracy above silence is
what it heard. A policy that says the same whatever it hears has an accuracy above silence of 0. With another
clip it is wrong as soon as it hears that one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, NamedTuple, get_args

from align.evaluation.benchmarks.multiple_choice import ChoiceKind, answer_of, rule_of
from align.evaluation.benchmarks.rows import BadBenchmark, Utterance
from align.evaluation.statistics import Difference, macro_bootstrap
from preference_data.schema import stable_id

Control = Literal["silence", "other_clip"]
CONTROLS: tuple[Control, ...] = get_args(Control)
"""What a question is put with in place of its clip."""


def other_clips(clips: Sequence[str], seed: int) -> list[str]:
    """For each clip another of them, the same wherever it comes again; nothing of one clip alone."""
    ring = sorted(set(clips), key=lambda clip: stable_id(seed, clip))
    if len(ring) < 2:
        return []
    following = dict(pairwise([*ring, ring[0]]))
    return [following[clip] for clip in clips]


def in_order(
    rows: Sequence[Utterance], others: Sequence[Utterance], texts: Sequence[str], where: Path
) -> list[str]:
    """Answers from another file in the order of `rows`, by the ids of the questions.

    Raises:
        BadBenchmark: a question has none, or several.
    """
    of_id = {other.id: text for other, text in zip(others, texts, strict=True)}
    if len(of_id) < len(others):
        n = len(others) - len(of_id)
        raise BadBenchmark(f"{where}: {n} answers are to questions whose id came before; keep one of each")
    if missing := [row.id for row in rows if row.id not in of_id]:
        detail = f"no answer to {len(missing)} of {len(rows)} questions, the first {missing[0]!r}"
        raise BadBenchmark(f"{where}: {detail}; put the same questions")
    return [of_id[row.id] for row in rows]


class _Marks(NamedTuple):
    """Questions with what was right: 1, else 0."""

    rows: Sequence[Utterance]
    right: Sequence[float]
    controls: Mapping[Control, Sequence[float]]
    by_rule: Sequence[bool | None] | None

    def only(self, places: Sequence[int]) -> _Marks:
        return _Marks(
            [self.rows[i] for i in places],
            [self.right[i] for i in places],
            {name: [right[i] for i in places] for name, right in self.controls.items()},
            self.by_rule and [self.by_rule[i] for i in places],
        )


def report(
    kind: ChoiceKind,
    rows: Sequence[Utterance],
    texts: Sequence[str],
    controls: Mapping[Control, Sequence[str]],
    seed: int = 0,
) -> dict[str, Any]:
    """Accuracy on one file's questions, overall and by category, with 95 % intervals clustered by clip.

    Args:
        kind: of the benchmark.
        rows: its questions.
        texts: a policy's answers.
        controls: its answers to the same questions with something else in the clip's place.
        seed: of the intervals.

    Returns:
        kind; accuracy (0..1), ci_low and ci_high (None with one clip alone), n, n_clips, chance (what
        guessing among choices gets); `publishers_rule`, where there is one: accuracy by it, and the share of
        answers that it covers; `above_silence` and `above_other_clip`, where there are answers: `Difference`
        as plain values, before is the accuracy with the control; `categories`: {column: {value: the same}}.
    """
    rule = rule_of(kind)
    marks = _Marks(
        rows,
        _right(kind, rows, texts),
        {name: _right(kind, rows, own) for name, own in controls.items()},
        rule and [rule(row, text) for row, text in zip(rows, texts, strict=True)],
    )
    return {
        "kind": kind,
        **_numbers(marks, seed),
        "categories": {
            column: {value: _numbers(marks.only(places), seed) for value, places in values.items()}
            for column, values in _categories(rows).items()
        },
    }


def answered_without_clip(
    kind: ChoiceKind, rows: Sequence[Utterance], with_silence: Mapping[str, Sequence[str]]
) -> Iterator[str]:
    """Ids of the questions that more than half of the policies answer right with silence.

    Some of them by luck: the fewer the policies and the choices, the more.
    """
    right = [_right(kind, rows, texts) for texts in with_silence.values()]
    for row, marks in zip(rows, zip(*right, strict=True), strict=True):
        if fmean(marks) > 0.5:
            yield row.id


def _right(kind: ChoiceKind, rows: Sequence[Utterance], texts: Sequence[str]) -> list[float]:
    return [float(answer_of(kind, row, text) == row.gt) for row, text in zip(rows, texts, strict=True)]


def _categories(rows: Sequence[Utterance]) -> dict[str, dict[str, list[int]]]:
    """The places of the rows by column and value."""
    places: dict[str, dict[str, list[int]]] = {}
    for place, row in enumerate(rows):
        for column, value in row.categories:
            places.setdefault(column, {}).setdefault(value, []).append(place)
    return places


def _numbers(marks: _Marks, seed: int) -> dict[str, Any]:
    clips = [row.audio for row in marks.rows]
    level = _difference([0.0] * len(clips), marks.right, clips, seed)
    numbers: dict[str, Any] = {
        "accuracy": level["after"],
        "ci_low": level["ci_low"],
        "ci_high": level["ci_high"],
        "n": len(clips),
        "n_clips": len(set(clips)),
        "chance": fmean(1 / n if (n := len({*row.choices} - {""})) else 0.0 for row in marks.rows),
    }
    if marks.by_rule is not None:
        counted = [is_right for is_right in marks.by_rule if is_right is not None]
        numbers["publishers_rule"] = {
            "accuracy": fmean(counted) if counted else None,
            "answered": len(counted) / len(clips),
        }
    for name, right in marks.controls.items():
        numbers[f"above_{name}"] = _difference(right, marks.right, clips, seed)
    return numbers


def _difference(
    before: Sequence[float], after: Sequence[float], clips: Sequence[str], seed: int
) -> dict[str, Any]:
    """As plain values; one clip alone says nothing of its own variance."""
    everything = ["all"] * len(clips)
    difference: Difference = macro_bootstrap(
        before,
        after,
        cells=everything,
        strata=everything,
        clusters=clips,
        means={"all": {"all": 1.0}},
        seed=seed,
    )["all"]
    has_interval = len(set(clips)) > 1
    return {**difference._asdict(), **({} if has_interval else {"ci_low": None, "ci_high": None})}

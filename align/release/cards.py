"""Answers side by side: words that differ, the judge's replies, and people's judgements on the question."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from markupsafe import Markup, escape

from align.release.clips import Clip
from align.release.comparison import ComparedQuestion, PolicyComparison
from preference_data import store
from preference_data.schema import Judgement

_MOST_PAIRS = 250_000
"""Pairs of words up to which differences are marked: a policy that repeats itself takes minutes."""


class Card(NamedTuple):
    """Everything about one question."""

    question: ComparedQuestion
    texts: tuple[Markup, ...]
    """The policies' answers with their own words marked."""
    clip: Clip
    people: tuple[Judgement, ...]
    """People's judgements on answers to it. All of it is untrusted text."""


def make(c: PolicyComparison, clips: Mapping[str, Clip]) -> list[Card]:
    """A card for each question, in the order of the comparison."""
    people: dict[str, list[Judgement]] = {}
    for run in dict.fromkeys(policy.folder.parent for policy in c.policies):
        for judgement in _human_judgements(run):
            people.setdefault(judgement.prompt_id, []).append(judgement)
    return [
        Card(
            question,
            _texts(question),
            clips[question.answers[0].audio],
            tuple(people.get(str(question.answers[0].uniq_id), ())),
        )
        for question in c.questions
    ]


def _texts(question: ComparedQuestion) -> tuple[Markup, ...]:
    """Each answer against the baseline's, and the baseline's against all others."""
    baseline, *others = [answer.response for answer in question.answers]
    return (diff_words(baseline, others), *(diff_words(text, [baseline]) for text in others))


def _human_judgements(run: Path) -> Iterator[Judgement]:
    """People's judgements in a run's stages, without retests and gold, which measure the annotator.

    What people kept of their own chats is about other questions.
    """
    for file in sorted(run.glob("[0-9]*/judgements.jsonl")):
        for judgement in store.stream(file, Judgement):
            is_of_people = judgement.annotator_kind != "model" and not judgement.audio_unusable
            if is_of_people and judgement.purpose not in ("retest", "gold"):
                yield judgement


def diff_words(text: str, others: Sequence[str]) -> Markup:
    """The text, escaped, with the words marked that none of the other texts has in the same place.

    Texts of so many words that comparing them takes long are left unmarked.
    """
    words = re.findall(r"\S+\s*", text)  # each with the space behind it
    plain = [word.rstrip() for word in words]
    kept: set[int] = set()
    for other in others:
        theirs = other.split()
        if len(plain) * len(theirs) > _MOST_PAIRS:
            return escape(text)
        matcher = difflib.SequenceMatcher(a=plain, b=theirs, autojunk=False)
        for block in matcher.get_matching_blocks():
            kept.update(range(block.a, block.a + block.size))
    marked = Markup("")
    for is_kept, run in itertools.groupby(range(len(words)), key=kept.__contains__):
        part = "".join(words[i] for i in run)
        bare = part.rstrip()
        marked += escape(part) if is_kept else Markup("<mark>{}</mark>{}").format(bare, part[len(bare) :])
    return marked.rstrip()

"""Answers side by side: words that differ, what the judge said, and what people said of the same question."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from markupsafe import Markup, escape

from align.release.clips import Clip
from align.release.comparison import Comparison, Question
from align.release.evaluations import Item
from preference_data import schema, store

_MOST_PAIRS = 250_000
"""Of words in two texts whose differences are marked: a policy that repeats itself for ever takes minutes."""


class Answer(NamedTuple):
    """One policy's answer; `text` has its own words marked."""

    policy: str
    item: Item
    text: Markup


class JudgedAnswers(NamedTuple):
    """What a person said of two answers to a question. All of it is untrusted text."""

    judgement: schema.Judgement
    text_a: str
    text_b: str


class Card(NamedTuple):
    """Everything about one question."""

    question: Question
    answers: tuple[Answer, ...]
    clip: Clip
    people: tuple[JudgedAnswers, ...]


def make(c: Comparison, clips: Mapping[str, Clip]) -> list[Card]:
    """A card for each question, in the order of the comparison."""
    people: dict[str, list[JudgedAnswers]] = {}
    for run in dict.fromkeys(policy.folder.parent for policy in c.policies):
        for judged in _judgements(run):
            people.setdefault(judged.judgement.prompt_id, []).append(judged)
    return [
        Card(
            question,
            _answers([policy.label for policy in c.policies], question),
            clips[question.items[0].audio],
            tuple(people.get(str(question.items[0].uniq_id), ())),
        )
        for question in c.questions
    ]


def _answers(labels: Sequence[str], question: Question) -> tuple[Answer, ...]:
    texts = [item.response for item in question.items]
    return tuple(
        Answer(label, item, diff_words(item.response, texts[1:] if index == 0 else texts[:1]))
        for index, (label, item) in enumerate(zip(labels, question.items, strict=True))
    )


def _judgements(run: Path) -> list[JudgedAnswers]:
    """What people said in a run; retests and gold measure the annotator and are left out."""
    found = []
    for key in sorted(run.glob("[!.]*/comparisons.jsonl")):
        comparisons = {one.id: one for one in store.read(key, schema.Comparison)}
        found += [
            JudgedAnswers(one, comparisons[one.comparison].text_a, comparisons[one.comparison].text_b)
            for one in store.stream(key.with_name("judgements.jsonl"), schema.Judgement)
            if one.purpose == "comparison" and not one.audio_unusable and one.comparison in comparisons
        ]
    return found


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

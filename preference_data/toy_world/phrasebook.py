"""The wording of a corpus whose facts are known: questions, answers, and what an answer claims.

A phrasebook is data (YAML, see `phrasebooks/`). Every sentence is a template over *slots* ("The speaker
says {word}."). Filling templates makes questions and reference answers; reading templates backwards
turns an answer into claims that are true or false of the clip. Both the simulated annotator and the
demo's judge read answers through this file: they share the ground truth.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

import yaml
from numpy.random import Generator
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from preference_data.prompts.tasks import TASKS
from preference_data.schema import Facts
from preference_data.toy_world.wording import Kind, Slot, Target, TaskRule, slots_of


class Question(NamedTuple):
    """A question, what it is about, and a good answer."""

    text: str
    kind: Kind
    slot: str | None
    value: str | None
    reference: str


class Claim(NamedTuple):
    """One sentence of an answer, read. `slots` is empty for an abstention and for unreadable text."""

    form: Literal["sentence", "bare", "affirm", "deny", "absent", "unreadable"]
    slots: dict[str, str]
    true: bool
    text: str


class Assessment(NamedTuple):
    """How one answer does on one question.

    `factual`: what was asked is right and nothing false is claimed. `behaves`: the form is the one asked
    for. `fact_is_right`: the fact that the question is about is right, whatever else is claimed. `abstains`:
    says a thing is not there. `score`: 1..10 = 1 + 9 (0.75 F1 of right against false claims + 0.25 behaves).
    """

    factual: bool
    behaves: bool
    fact_is_right: bool
    abstains: bool
    answerable: bool
    score: float


def _sentences(text: str) -> list[str]:
    return [part.strip() for part in re.split(r"(?<=[.!?])\s+|\n+", text.strip()) if part.strip()]


def _capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


class BadPhrasebook(ValueError):
    """A phrasebook file that cannot be used."""


class Phrasebook(BaseModel):
    """All wording of one corpus. Load with `Phrasebook.load`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    slots: dict[str, Slot]
    descriptions: tuple[str, ...]
    """Templates that tell the whole clip; the first whose slots are all known is the description."""
    describe_questions: tuple[str, ...]
    one_word: str
    """Instruction appended to a question that wants one word."""
    kinds: dict[Kind, float]
    """How often each kind of question is asked; weights, need not sum to 1."""
    inventions: tuple[str, ...]
    """Slots that a defective answer invents claims about."""
    tasks: tuple[TaskRule, ...]
    targets: tuple[Target, ...]

    @classmethod
    def load(cls, path: Path) -> Phrasebook:
        """Read a phrasebook.

        Raises:
            BadPhrasebook: naming the file and every field that is wrong.
        """
        try:
            return cls.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
        except FileNotFoundError as error:
            raise BadPhrasebook(
                f"{path} does not exist: nothing is known of this corpus' clips to ask about or to judge by. "
                "Without it, use `judge: {model: ...}`, `by: people` and no `choose`"
            ) from error
        except yaml.YAMLError as error:
            raise BadPhrasebook(f"{path} is not YAML: {error}") from error
        except ValidationError as error:
            wrong = [f"{'.'.join(map(str, e['loc'])) or 'phrasebook'}: {e['msg']}" for e in error.errors()]
            raise BadPhrasebook(f"{path}: " + "; ".join(wrong)) from error

    @model_validator(mode="after")
    def _is_consistent(self) -> Phrasebook:
        """Every name is a slot, every question has one meaning, every sentence can be read back."""
        named = {slot for text in self.descriptions for slot in slots_of(text)}
        named |= {slot for target in self.targets for slot in slots_of(target.text)} - {"description"}
        named |= {slot for rule in self.tasks for slot in rule.when} | set(self.inventions)
        if unknown := sorted(named - set(self.slots)):
            raise ValueError(f"{', '.join(unknown)}: no such slot; slots: {', '.join(self.slots)}")
        if strange := [target.task for target in self.targets if target.task not in TASKS]:
            raise ValueError(f"targets: {strange[0]!r} is not a pre-training task; tasks: {', '.join(TASKS)}")
        if sum(self.kinds.values()) <= 0 or min(self.kinds.values()) < 0:
            raise ValueError("kinds: weights must be at least 0 and not all 0")
        if yes_no := [name for name in self.inventions if self.slots[name].denial]:
            raise ValueError(f"inventions: {', '.join(yes_no)} are yes/no slots, invent other ones")
        texts = [*self.describe_questions]
        for name, slot in self.slots.items():
            slot.check(name)
            texts += slot.questions
        if twice := sorted({text for text in texts if texts.count(text) > 1}):
            raise ValueError(f"the question {twice[0]!r} comes twice; a question must have one meaning")
        if doubled := [text for text in self.descriptions if len(slots_of(text)) > len(set(slots_of(text)))]:
            raise ValueError(f"descriptions: {doubled[0]!r} holds a slot twice")
        return self

    # ---------------------------------------------------------------- facts -> text

    def description(self, facts: Facts) -> str:
        """The whole clip in a sentence or two."""
        for template in self.descriptions:
            if all(isinstance(facts.get(slot), str) for slot in slots_of(template)):
                return _capitalised(template.format(**facts))
        raise ValueError(f"no description template fits the facts {facts}")

    def targets_of(self, facts: Facts) -> list[tuple[str, str]]:
        """(task, text) of every pre-training target this clip yields."""
        known = {**facts, "description": self.description(facts)}
        return [
            (target.task, target.text.format(**known))
            for target in self.targets
            if all(isinstance(known.get(slot), str) for slot in slots_of(target.text))
        ]

    def task_of(self, facts: Facts) -> str:
        """The AIR-Bench task of a clip."""
        for rule in self.tasks:
            if all(slot in facts and value in (None, facts[slot]) for slot, value in rule.when.items()):
                return rule.task
        raise ValueError(f"no task rule fits the facts {facts}")

    def is_absent(self, slot: str, facts: Facts) -> bool:
        """Whether the clip surely has no such thing: no slot with the same absent-sentence is known.

        Nothing is sure of a slot without that sentence: facts may leave it out.
        """
        absent = self.slots[slot].absent
        same = {name: s for name, s in self.slots.items() if s.absent == absent}
        implied = any(facts.get(k) == v for s in same.values() for k, v in s.present_if.items())
        return absent is not None and not implied and not any(name in facts for name in same)

    def askable(self, facts: Facts) -> dict[Kind, list[str]]:
        """Slots that can be asked about, by kind."""
        known = [name for name in self.slots if isinstance(facts.get(name), str)]
        return {
            "closed": known,
            "one_word": [name for name in known if not self.slots[name].sequence and " " not in facts[name]],
            "check": [name for name, slot in self.slots.items() if slot.denial and name in facts],
            "absent": [name for name in self.slots if self.is_absent(name, facts)],
        }

    def ask(self, facts: Facts, rng: Generator) -> Question:
        """Draw a question about a clip; a closed one where the kind that was drawn has nothing to ask."""
        options, weights = self.askable(facts), list(self.kinds.values())
        kind = list(self.kinds)[int(rng.choice(len(weights), p=[w / sum(weights) for w in weights]))]
        if kind == "describe":
            return self.question(str(rng.choice(self.describe_questions)), facts)
        if not options[kind]:
            kind = "closed"
        if not options[kind]:
            raise ValueError(f"nothing can be asked about the facts {facts}")
        name = str(rng.choice(options[kind]))
        slot, text = self.slots[name], str(rng.choice(self.slots[name].questions))
        if slot.denial:
            true = list(facts.get(name, []))
            false = [v for v in slot.values if v not in true]
            value = str(rng.choice(true if true and (rng.random() < 0.5 or not false) else false))
            text = text.format(**{name: value})
        elif kind == "one_word":
            text = f"{text} {self.one_word}"
        return self.question(text, facts)

    def spoil(self, question: Question, facts: Facts, rng: Generator) -> tuple[str, str]:
        """A defective answer to a question and the name of its defect.

        `ignored_format` (a sentence where one word was asked), `answered_absent` (a value for a thing
        that is not there), `invented` (the right answer plus a false sentence).
        """
        if question.kind == "one_word" and question.slot:
            return self._sentence(question.slot, question.value), "ignored_format"
        if question.kind == "absent" and question.slot:
            return self._sentence(
                question.slot, rng.choice(self.slots[question.slot].values)
            ), "answered_absent"
        known = [name for name in self.slots if isinstance(facts.get(name), str)]
        surely_checkable = [  # not music's instrument where music is only a background
            name
            for name in self.inventions
            if name != question.slot and (name in known or self.is_absent(name, facts))
        ]
        name = str(rng.choice(surely_checkable or known))
        values = [v for v in self.slots[name].values if v != facts.get(name)]
        return f"{question.reference} {self._sentence(name, rng.choice(values))}", "invented"

    def _sentence(self, name: str, value: str | None) -> str:
        return _capitalised(self.slots[name].sentence.format(**{name: value}))

    # ---------------------------------------------------------------- text -> claims

    @cached_property
    def _questions(self) -> dict[str, tuple[str | None, bool, str | None]]:
        """Question text -> (slot, wants one word, value asked about)."""
        meanings: dict[str, tuple[str | None, bool, str | None]] = {}
        for name, slot in self.slots.items():
            for text in slot.questions:
                if slot.denial:
                    meanings |= {text.format(**{name: v}): (name, False, v) for v in slot.values}
                else:
                    meanings[text] = (name, False, None)
                    meanings[f"{text} {self.one_word}"] = (name, True, None)
        return meanings | {text: (None, False, None) for text in self.describe_questions}

    def question(self, text: str, facts: Facts) -> Question:
        """Recognise a question this phrasebook can ask, and what answers it for these facts.

        Raises:
            ValueError: the question is not one of this phrasebook's, or these facts do not answer it.
        """
        if text not in self._questions:
            raise ValueError(f"question {text!r} is not in the phrasebook")
        name, one_word, value = self._questions[text]
        if name is None:
            return Question(text, "describe", None, None, self.description(facts))
        slot = self.slots[name]
        if value is not None and name in facts:
            answer = slot.sentence if value in facts[name] else str(slot.denial)
            return Question(text, "check", name, value, _capitalised(answer.format(**{name: value})))
        if self.is_absent(name, facts):
            return Question(text, "absent", name, None, str(slot.absent))
        if name not in facts:
            raise ValueError(f"question {text!r} has no answer for the facts {facts}")
        known = str(facts[name])
        if one_word:
            return Question(text, "one_word", name, known, _capitalised(known) + ".")
        return Question(text, "closed", name, known, self._sentence(name, known))

    @cached_property
    def _patterns(self) -> list[tuple[Literal["sentence", "affirm", "deny"], re.Pattern[str]]]:
        def pattern(template: str) -> re.Pattern[str]:
            parts = re.split(r"\{(\w+)\}", template.rstrip(".!?"))
            parts[0::2] = [re.escape(part.lower()) for part in parts[0::2]]
            parts[1::2] = [f"(?P<{name}>{self.slots[name].pattern})" for name in parts[1::2]]
            return re.compile("".join(parts))

        patterns: list[tuple[Literal["sentence", "affirm", "deny"], re.Pattern[str]]] = []
        for slot in self.slots.values():
            patterns.append(("affirm" if slot.denial else "sentence", pattern(slot.sentence)))
            if slot.denial:
                patterns.append(("deny", pattern(slot.denial)))
        for template in self.descriptions:
            patterns += [("sentence", pattern(part)) for part in _sentences(template)]
        return patterns

    def claims(self, answer: str, question: Question, facts: Facts) -> list[Claim]:
        """Read an answer sentence by sentence. What cannot be read counts as a false claim."""
        return [self._claim(sentence, question, facts) for sentence in _sentences(answer)]

    def _claim(self, sentence: str, question: Question, facts: Facts) -> Claim:
        text = sentence.rstrip(".!?").strip().lower()
        for name, slot in self.slots.items():
            if slot.absent and text == slot.absent.rstrip(".").lower():
                return Claim("absent", {}, self.is_absent(name, facts), sentence)
        for form, pattern in self._patterns:
            match = pattern.fullmatch(text)
            if match is None:
                continue
            slots = {name: self.slots[name].canonical(value) for name, value in match.groupdict().items()}
            if form == "sentence":
                return Claim(form, slots, all(facts.get(k) == v for k, v in slots.items()), sentence)
            name, value = next(iter(slots.items()))
            return Claim(form, slots, (value in facts.get(name, [])) == (form == "affirm"), sentence)
        if question.slot and re.fullmatch(self.slots[question.slot].pattern, text):
            value = self.slots[question.slot].canonical(text)
            return Claim("bare", {question.slot: value}, facts.get(question.slot) == value, sentence)
        return Claim("unreadable", {}, False, sentence)

    def assess(self, answer: str, question: Question, facts: Facts) -> Assessment:
        """Judge an answer against the facts. Deterministic; knows only this phrasebook's wording."""
        claims = self.claims(answer, question, facts)
        right, wanted = self._answered(claims, question)
        false = sum(not claim.true for claim in claims)
        recall = right / wanted
        precision = right / (right + false) if right + false else 0.0
        f1 = 2 * recall * precision / (recall + precision) if right else 0.0
        behaves = self._behaves(claims, question)
        return Assessment(
            factual=right == wanted and false == 0,
            behaves=behaves,
            fact_is_right=right == wanted,
            abstains=any(claim.form == "absent" for claim in claims),
            answerable=question.kind != "absent",
            score=1 + 9 * (0.75 * f1 + 0.25 * (behaves and f1 > 0)),
        )

    def _answered(self, claims: list[Claim], question: Question) -> tuple[int, int]:
        """(asked things that the answer gets right, asked things)."""
        if question.kind == "absent":
            absent = question.reference.lower().rstrip(".")
            hits = [c for c in claims if c.true and c.text.lower().rstrip(".!? ") == absent]
            return bool(hits), 1
        if question.kind == "describe":
            wanted = {
                pair
                for claim in self.claims(question.reference, question, {})
                for pair in claim.slots.items()
            }
            claimed = {pair for claim in claims for pair in claim.slots.items()}
            return len(wanted & claimed), len(wanted)
        hit = any(
            claim.true
            and question.slot in claim.slots
            and (question.kind != "check" or claim.slots[question.slot] == question.value)
            for claim in claims
        )
        return hit, 1

    @staticmethod
    def _behaves(claims: list[Claim], question: Question) -> bool:
        forms = [claim.form for claim in claims]
        if question.kind == "describe":
            return set(forms) == {"sentence"} and len(forms) <= 2
        fitting = {"one_word": ("bare",), "absent": ("absent",), "check": ("affirm", "deny")}
        of_a_sentence = ("sentence", "absent", "affirm", "deny")
        return len(forms) == 1 and forms[0] in fitting.get(question.kind, of_a_sentence)

    # ---------------------------------------------------------------- for a tokenizer

    def texts(self) -> Iterator[str]:
        """Every sentence and question with every value in turn: what a tokenizer should know."""
        for name, slot in self.slots.items():
            yield from (q if "{" not in q else "" for q in slot.questions)
            yield from (f"{q} {self.one_word}" for q in slot.questions if "{" not in q)
            templates = [slot.sentence, slot.denial or "", slot.absent or "", *slot.questions]
            for value in slot.values:
                yield f" {value} {_capitalised(value)}."
                yield from (_capitalised(t.format(**{name: value})) for t in templates)
        for template in self.descriptions:
            names = slots_of(template)
            for i in range(max(len(s.values) for s in self.slots.values())):
                values = {n: self.slots[n].values[i % len(self.slots[n].values)] for n in names}
                yield _capitalised(template.format(**values))
        yield from self.describe_questions

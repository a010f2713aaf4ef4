"""Multiple-choice questions about clips in their publishers' layouts, and right answers by their own rules.

    choice     what `align data import --format choice` reads (AVQA, AudioMCQ, MMAU and their like)
    mmau       MMAU test-mini, v05.15.25 (arXiv:2410.19168): mmau-test-mini.json
    mmar       MMAR (arXiv:2505.13032): MMAR-meta.jsonl
    mmsu       MMSU (arXiv:2506.04779): the rows that its mmsu_inference.py reads and writes
    mmau_pro   MMAU-Pro (arXiv:2508.13992): its test.parquet, or the rows as JSON lines

Questions that are in the clips, of VoiceBench and Big Bench Audio, are those of `spoken_questions`.
All are scored by one reading of answers (`choices.chosen`), so that their accuracies compare. Beside it
stands the publisher's rule, where it is a rule, restated: of MMAU and MMAR evaluation.py of Sakshi113/MMAU
and ddlBoJack/MMAR, of MMSU mmsu_evaluation.py of dingdongwang/MMSU. MMAU-Pro's own compares embeddings of a
model (NV-Embed-v2) and takes the nearest choice even for an answer that names none: it is not restated.

Where our reading differs on purpose:
    - A letter is an answer; MMAU's and MMAR's rule wants the words of the choice.
    - Words beside the choice do not matter, unless they name another choice. Their rule refuses every word
      that only another choice has ("no cat: the answer is dog"), and takes "not a dog" for a dog.
    - An answer that never ends its thought names nothing.
    - An answer that names no choice, or two, is wrong and counted as `unparsed`. MMSU's rule leaves answers
      without a letter in front or last but one out of the mean, and takes "Dogs bark" for D. Its script gives
      an empty answer the letter of the answer before: here it is left out.
    - "D" names two choices where the text of another one is "D" (notes): so in 3 questions of MMAU.
    - Blank choices are not offered; of two equal choices either is right, as in all publishers' rules.
Questions about several clips (456 of MMAU-Pro) or without choices (its open ones) are counted, not asked.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeGuard, get_args

from align.evaluation.benchmarks import rows, spoken_questions
from align.evaluation.benchmarks.choices import ALL_LETTERS, LETTERS, chosen
from align.evaluation.benchmarks.foundation import official_letter
from align.evaluation.benchmarks.rows import BadRow, Utterance, require_text
from align.evaluation.benchmarks.spoken_questions import SpokenKind
from preference_data.interchange import columns
from preference_data.interchange.conversation import path_of, without_tag
from preference_data.interchange.questions import QUESTION_FORM
from preference_data.prompts.prompts import BadExample, refuse_control
from preference_data.schema import stable_id

ChoiceKind = Literal["choice", "mmau", "mmar", "mmsu", "mmau_pro", SpokenKind]
Rule = Callable[[Utterance, str], bool | None]
"""Whether a publisher counts a response as right; None: it leaves it out of the mean."""

LETTERS_FORM = "{question}\n\n{lettered}\n\nAnswer with the letter of the right option alone."
"""MMSU's rule wants a letter."""


def is_choice(kind: str) -> TypeGuard[ChoiceKind]:
    """Whether a kind of benchmark is multiple choice."""
    return kind in get_args(ChoiceKind)


# -------------------------------------------------------------------------- publishers' rules


def has_its_words_alone(row: Utterance, response: str) -> bool:
    """MMAU's and MMAR's rule: all words of the right choice, and none that only another choice has."""
    said, right = _words(response), _words(row.gt)
    wrong = {word for choice in row.choices for word in _words(choice)} - right
    return bool(said) and right <= said and not said & wrong


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def has_its_letter(row: Utterance, response: str) -> bool | None:
    """MMSU's rule: the letter is the first character, else the last but one; None without."""
    letter = official_letter(response)
    if letter is None:
        return None
    return dict(zip(LETTERS, row.choices, strict=False)).get(letter) == row.gt


# -------------------------------------------------------------------------- layouts


class _Layout(NamedTuple):
    audio: str
    choices: tuple[str, ...]
    """The column of a list, or a column for each."""
    answer: str
    categories: tuple[str, ...]
    responses: tuple[str, ...]
    """Columns that the publisher's scripts and pages name."""
    rule: Rule | None
    form: str = QUESTION_FORM


_LAYOUTS: dict[ChoiceKind, _Layout] = {
    "mmau": _Layout(
        "audio_id",
        ("choices",),
        "answer",
        ("task", "difficulty", "category", "sub-category"),
        ("response", "model_output", "model_prediction"),
        has_its_words_alone,
    ),
    "mmar": _Layout(
        "audio_path",
        ("choices",),
        "answer",
        ("modality", "category", "sub-category"),
        ("response", "answer_prediction", "model_prediction"),
        has_its_words_alone,
    ),
    "mmsu": _Layout(
        "audio_path",
        ("choice_a", "choice_b", "choice_c", "choice_d"),
        "answer_gt",
        ("category", "sub-category", "task_name"),
        ("response",),
        has_its_letter,
        LETTERS_FORM,
    ),
    "mmau_pro": _Layout(
        "audio_path",
        ("choices",),
        "answer",
        ("category", "length_type"),
        ("response", "model_output"),
        None,
    ),
}


def rule_of(kind: ChoiceKind) -> Rule | None:
    """The publisher's rule; None where there is none."""
    return _LAYOUTS[kind].rule if kind in _LAYOUTS else None


def read_question(kind: ChoiceKind, row: Any, where: str, source: str) -> Utterance:
    """A row as a question about one clip, with a prompt that lists its choices.

    Raises:
        BadRow: a part is missing (not_an_object, missing_key), there are no choices (no_choices) or too many
            (too_many_choices), the answer is none of them (no_right_choice), it is about several clips
            (several_clips), or a text would steer the model (no_question).
    """
    if kind == "choice":
        return rows.read_question(row, where, source)
    if kind == "voicebench" or kind == "big_bench_audio":
        return spoken_questions.read_question(kind, row, where, source)
    layout = _LAYOUTS[kind]
    question = require_text(row, ("question",), where)["question"].strip()
    choices = _choices(row, layout, where)
    right = str(row.get(layout.answer) or "").strip()
    if right not in choices or not right:
        raise BadRow(where, "no_right_choice", f"answer {right[:80]!r} is none of its choices")
    try:
        for text in (question, *choices):
            without_tag(text, "a question or a choice")
        refuse_control(where, question, *choices)
    except (columns.BadRow, BadExample) as error:
        raise BadRow(where, "no_question", str(error)) from error
    audio = _audio(row.get(layout.audio), where)
    return Utterance(
        audio,
        _prompt(layout.form, question, choices),
        right,
        source,
        choices=choices,
        id=str(row["id"]) if row.get("id") is not None else stable_id(audio, question, *choices),
        categories=tuple((name, str(row[name])) for name in layout.categories if row.get(name)),
    )


def response_of(kind: str, row: dict[str, Any], where: str) -> str:
    """The policy's response, under `response` or its publisher's name for it; null is the empty answer."""
    columns_of = (layout.responses for name, layout in _LAYOUTS.items() if name == kind)
    return rows.response_of(row, where, next(columns_of, ("response",)))


def answer_of(kind: ChoiceKind, row: Utterance, response: str) -> str | None:
    """What a response answers, called as `row.gt` calls it; None where it names nothing, or two."""
    if spoken_questions.is_spoken(kind):
        return spoken_questions.answer_of(row, response)
    return chosen(row.choices, response)


def _choices(row: dict[str, Any], layout: _Layout, where: str) -> tuple[str, ...]:
    """The texts of the choices in their places; blank ones are not offered, equal ones are the same."""
    values = row.get(layout.choices[0]) if len(layout.choices) == 1 else [*map(row.get, layout.choices)]
    if not isinstance(values, list):
        raise BadRow(where, "no_choices", f"no list under {layout.choices[0]}")
    texts = tuple("" if value is None else str(value).strip() for value in values)
    n = len({*texts} - {""})
    if not 2 <= n <= len(texts) <= len(ALL_LETTERS):
        detail = f"{n} different choices in {len(texts)} places; it needs 2 to {len(ALL_LETTERS)}"
        raise BadRow(where, "no_choices" if n < 2 else "too_many_choices", detail)
    return texts


def _prompt(form: str, question: str, choices: Sequence[str]) -> str:
    lettered = [f"{letter}. {text}" for letter, text in zip(ALL_LETTERS, choices, strict=False) if text]
    listed = [text for text in dict.fromkeys(choices) if text]
    return form.format(question=question, choices=listed, lettered="\n".join(lettered))


def _audio(named: Any, where: str) -> str:
    paths = named if isinstance(named, list) else [named]
    if len(paths) != 1:
        raise BadRow(where, "several_clips", f"is about {len(paths)} clips, not one")
    try:
        return path_of(paths[0])
    except columns.BadRow as error:
        raise BadRow(where, "no_question", str(error)) from error

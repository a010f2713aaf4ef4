"""AIR-Bench foundation (arXiv:2402.07729): answers to single-choice questions, and their score.

`answer_gt` is the text of the right choice. The official script takes a letter where it finds one and
leaves the other answers out of the mean; here they are counted, and both readings are reported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from align.evaluation.benchmarks.choices import LETTERS, plain, read_choice
from align.evaluation.benchmarks.rows import BadRow, OddRows, readable, response_of, text_fields

CATEGORIES = {
    "Speech_Grounding": "speech",
    "Spoken_Language_Identification": "speech",
    "Speaker_Gender_Recognition": "speech",
    "Speaker_Emotion_Recontion": "speech",
    "Speaker_Age_Prediction": "speech",
    "Speech_Entity_Reconition": "speech",
    "Speaker_Intent_Classification": "speech",
    "Speaker_Number_Verification": "speech",
    "Synthesized_Voice_Detection": "speech",
    "Audio_Grounding": "sound",
    "vocal_sound_classification": "sound",
    "Acoustic_Scene_Classification": "sound",
    "Sound_AQA": "sound",
    "Music_Instruments_Classfication": "music",
    "Music_Genre_Recognition": "music",
    "Music_Midi_Pitch_Analysis": "music",
    "Music_Midi_Velocity_Analysis": "music",
    "Music_AQA": "music",
    "Music_Mood_Recognition": "music",
}
"""The 19 tasks, spelled (and misspelled) as in the official files."""

State = Literal["right", "wrong", "unparsed"]
_KEYS = ("choice_a", "choice_b", "answer_gt", "task_name", "dataset_name", "uniq_id")


class ChoiceQuestion(NamedTuple):
    """A question's two to four choices, of which one is `answer_gt`, word for word."""

    uniq_id: str
    choices: tuple[str, ...]
    """In the order A to D; a choice that the file does not have is the empty text."""
    answer_gt: str
    task_name: str
    dataset_name: str


class Answers(NamedTuple):
    """Questions with responses, and the rows that cannot be scored, by reason."""

    scored: list[tuple[ChoiceQuestion, str]]
    odd_rows: dict[str, OddRows]
    """not_an_object, missing_key, unknown_task, no_right_choice, response_not_text, duplicate (the first of a
    question counts)."""


def read_answers(path: Path) -> Answers:
    """Questions and responses of an answer file in the official jsonl; null is the empty answer.

    Raises:
        BadBenchmark: naming file and line: not JSON, or no row that can be scored.
    """
    known: set[tuple[str, str, str]] = set()

    def read(row: Any, where: str) -> tuple[ChoiceQuestion, str]:
        question, response = _question(row, where), response_of(row, where)
        key = (question.task_name, question.dataset_name, question.uniq_id)
        if key in known:
            raise BadRow(where, "duplicate", f"{'/'.join(key)} comes more than once")
        known.add(key)
        return question, response

    return Answers(*readable(path, read))


def official_letter(response: str) -> str | None:
    """The choice as the official script reads it: the first character, else the last but one.

    So "A dog barks" is read as choice A, and "the answer is B." as B.
    """
    text = response.strip().replace("\n", "")
    if not text or text == "None":
        return None
    if text[0] in LETTERS:
        return text[0]
    return text[-2] if len(text) > 1 and text[-2] in LETTERS else None


def score(answers: Sequence[tuple[ChoiceQuestion, str]]) -> dict[str, Any]:
    """Accuracies by the strict reading (see `read_choice`) and, under "official", by the official one.

    Returns:
        `categories` (macro over the tasks present), `average` (macro over the three categories), `tasks`
        (micro over the questions of its data sets), `n`, `states`, `tasks_missing`. Unparsed answers count
        as wrong; the official reading leaves them out, and its `answered` is the share that it covers.
        Shares are 0..1; None without answers.
    """
    strict = [_state(question, read_choice(text, question.choices)) for question, text in answers]
    official = [_state(question, official_letter(text)) for question, text in answers]
    answered = sum(state != "unparsed" for state in official)
    return {
        **_means(answers, strict, _share),
        "n": len(answers),
        "states": _counts(strict),
        "tasks_missing": sorted(set(CATEGORIES) - {question.task_name for question, _ in answers}),
        "official": {
            **_means(answers, official, lambda states: _share([s for s in states if s != "unparsed"])),
            "states": _counts(official),
            "answered": answered / len(answers) if answers else None,
        },
    }


def _state(question: ChoiceQuestion, letter: str | None) -> State:
    if letter is None:
        return "unparsed"
    return "right" if question.choices[LETTERS.index(letter)] == question.answer_gt else "wrong"


def _share(states: Sequence[State]) -> float | None:
    return states.count("right") / len(states) if states else None


def _means(
    answers: Sequence[tuple[ChoiceQuestion, str]],
    states: Sequence[State],
    accuracy: Callable[[Sequence[State]], float | None],
) -> dict[str, Any]:
    by_task: dict[str, list[State]] = {}
    for (question, _), state in zip(answers, states, strict=True):
        by_task.setdefault(question.task_name, []).append(state)
    tasks = {task: accuracy(by_task[task]) for task in CATEGORIES if task in by_task}
    categories = {
        category: _mean([value for task, value in tasks.items() if CATEGORIES[task] == category])
        for category in dict.fromkeys(CATEGORIES.values())
    }
    return {"categories": categories, "average": _mean(list(categories.values())), "tasks": tasks}


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean of the known values; `tasks_missing` and the counts show the others."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _counts(states: Sequence[State]) -> dict[str, int]:
    names: tuple[State, ...] = ("right", "wrong", "unparsed")
    return {name: states.count(name) for name in names}


def _question(row: Any, where: str) -> ChoiceQuestion:
    fields = {key: text.strip() for key, text in text_fields(row, _KEYS, where).items()}
    if fields["task_name"] not in CATEGORIES:
        raise BadRow(where, "unknown_task", f"unknown task_name {fields['task_name']!r}")
    later = ("" if row.get(key) is None else str(row[key]).strip() for key in ("choice_c", "choice_d"))
    choices = (fields.pop("choice_a"), fields.pop("choice_b"), *later)
    right = fields["answer_gt"]
    alike = [choice for choice in choices if choice and plain(choice) == plain(right)]
    if right not in choices and len(set(alike)) == 1:
        right = alike[0]  # but for case or punctuation
    if not right or right not in choices:
        raise BadRow(where, "no_right_choice", f"answer_gt {right[:80]!r} is none of its choices")
    return ChoiceQuestion(choices=choices, **{**fields, "answer_gt": right})

"""AIR-Bench foundation (arXiv:2402.07729): answers to single-choice questions, and their score.

`answer_gt` is the text of the right choice. The official script takes a letter where it finds one and
leaves the other answers out of the mean; here they are counted, and both readings are reported.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from align.evaluation.benchmarks.air_bench import response_of
from align.evaluation.benchmarks.rows import BadBenchmark, json_lines, text_fields

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
LETTERS = "ABCD"
_KEYS = ("choice_a", "choice_b", "answer_gt", "task_name", "dataset_name", "uniq_id")
_MARKED = re.compile(r"(?<!\w)([A-D])(?:[.):,]|$)")
_NAMED = re.compile(  # small letters only where they cannot be the article
    r"\b(?i:answer|option|choice)(?i:\s+(?:is|would be))?\s*:?\s*\(?([A-D]\b|[a-d](?=[.):,]|$))"
)


class ChoiceQuestion(NamedTuple):
    """A question's two to four choices, of which one is `answer_gt`, word for word."""

    uniq_id: str
    choices: tuple[str, ...]
    """In the order A to D; a choice that the file does not have is the empty text."""
    answer_gt: str
    task_name: str
    dataset_name: str

    @property
    def answer(self) -> str:
        """The letter of the right choice."""
        return LETTERS[self.choices.index(self.answer_gt)]


def read_answers(path: Path) -> list[tuple[ChoiceQuestion, str]]:
    """Questions and responses of an answer file in the official jsonl; null is the empty answer.

    Raises:
        BadBenchmark: naming file, line and key; a question that comes twice.
    """
    answers = [(_question(row, where), response_of(row, where)) for where, row in json_lines(path)]
    counts = Counter((question.task_name, question.dataset_name, question.uniq_id) for question, _ in answers)
    if duplicates := [key for key, n in counts.items() if n > 1]:
        raise BadBenchmark(f"{path}: {'/'.join(duplicates[0])} comes more than once; keep one row of it")
    return answers


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


def strict_letter(response: str, choices: Sequence[str]) -> str | None:
    """The choice, where the answer says one and only one.

    In this order: a letter marked as one at the start ("A", "B.", "(C) ..."), a letter named as the answer
    ("the answer is D"), the whole text of one choice and nothing else. What fits none is unparsed, as are
    letters that contradict each other and letters of choices that were not offered.
    """
    text = response.strip()
    letters = {letter.upper() for letter in _NAMED.findall(text)}
    if re.match(r"\(?[A-D](?:[.):,]|$)", text):
        letters |= set(_MARKED.findall(text))
    if not letters and (words := _plain(text)):
        letters = {letter for letter, choice in zip(LETTERS, choices, strict=True) if _plain(choice) == words}
    offered = [letter for letter in letters if choices[LETTERS.index(letter)]]
    return offered[0] if len(letters) == 1 and offered else None


def score(answers: Sequence[tuple[ChoiceQuestion, str]]) -> dict[str, Any]:
    """Accuracies by the strict reading and, under "official", by the official one.

    Returns:
        `categories` (macro over the tasks present), `average` (macro over the three categories), `tasks`
        (micro over the questions of its data sets), `n`, `states`, `tasks_missing`. Unparsed answers count
        as wrong; the official reading leaves them out, and its `answered` is the share that it covers.
        Shares are 0..1; None without answers.
    """
    strict = [_state(question, strict_letter(text, question.choices)) for question, text in answers]
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
    return "right" if letter == question.answer else "wrong"


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


def _plain(text: str) -> str:
    return " ".join(re.sub(r"[^\w\s]", " ", text.casefold()).split())


def _question(row: Any, where: str) -> ChoiceQuestion:
    fields = {key: text.strip() for key, text in text_fields(row, _KEYS, where).items()}
    if fields["task_name"] not in CATEGORIES:
        raise BadBenchmark(f"{where}: unknown task_name {fields['task_name']!r}")
    later = tuple("" if row.get(key) is None else str(row[key]).strip() for key in ("choice_c", "choice_d"))
    choices = (fields.pop("choice_a"), fields.pop("choice_b"), *later)
    if fields["answer_gt"] not in choices:
        raise BadBenchmark(f"{where}: answer_gt {fields['answer_gt'][:80]!r} is none of its choices")
    return ChoiceQuestion(choices=choices, **fields)

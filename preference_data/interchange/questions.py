"""Multiple-choice questions about clips, as their publishers lay them out -> prompts to be rewarded for.

    AVQA      question_text, multi_choice, answer (its place from 0), video_name; R1-AQA adds audio_path
    AudioMCQ  question, choices, answer, audio_path, question_type
    MMAU      question, choices, answer, audio_id, task

Layouts: README.md of xiaomi-research/r1-aqa (arXiv:2503.11197), of the data set inclusionAI/AudioMCQ
(arXiv:2509.21060) and of Sakshi113/MMAU (arXiv:2410.19168).
"""

from __future__ import annotations

from typing import Any

from preference_data.interchange.columns import BadRow, Columns, is_empty
from preference_data.interchange.conversation import path_of, without_tag
from preference_data.schema import Prompt

QUESTION_FORM = (
    "{question} Please choose the answer from the following options: {choices}. "
    "Output the final answer in <answer> </answer>."
)
"""How R1-AQA puts a question (its src/dataset/dataset.py), with the choices as Python lists them."""
_LETTERS = "ABCD"
"""Of the choices that a reward can read."""
_WITHOUT_EFFECT = frozenset(
    "video_id question_relation dataset_name sub-category difficulty audio-contribution".split()
)
"""Columns of these layouts that say nothing about what is asked or right."""


def read_question(columns: Columns, form: str = QUESTION_FORM) -> Prompt:
    """A row as a prompt that lists its choices; its `task_name` is the row's `question_type` or `task`.

    AVQA asks about videos: there "video" becomes "audio", as R1-AQA has it, and a clip that the row does not
    name is called as its video, with .wav.

    Args:
        columns: of the row.
        form: text with {question} and {choices}.

    Raises:
        BadRow: a part is missing, or the answer is none of two to four different choices.
    """
    question, video = columns.take("question", "question_text"), columns.take("video_name")
    if not isinstance(question, str) or not question.strip():
        raise BadRow(f"has no question; there are {columns.names()}")
    if video is not None:
        question = question.replace("video", "audio")
    choices = _choices(columns.take("choices", "multi_choice", "options"))
    right = _right(columns.take("answer"), choices)
    audios = _audios(columns, video)
    kind, task = columns.take("question_type"), columns.take("task")
    columns.take_each(*_WITHOUT_EFFECT)
    return Prompt(
        id=columns.take_id("id", *audios, question, *choices),
        audios=audios,
        question=form.format(question=without_tag(question.strip(), "a question"), choices=list(choices)),
        answer_gt=right,
        meta_info="",
        task_name=str(kind or task or "choice"),
        choices=choices,
    )


def check_form(form: str) -> str:
    """The form, which must hold {question} and {choices} and no other braces.

    Raises:
        ValueError: it does not.
    """
    try:
        whole = form.format(question="\0q", choices="\0c")
    except (LookupError, ValueError):
        whole = ""
    if not ("\0q" in whole and "\0c" in whole):
        raise ValueError(f"{form!r} must hold {{question}} and {{choices}}, and no other braces")
    return form


def _choices(value: Any) -> tuple[str, ...]:
    """The texts of the choices, which must be two to four different ones."""
    texts = [text.strip() for text in value if isinstance(text, str)] if isinstance(value, list) else []
    is_whole = isinstance(value, list) and len(texts) == len(value) and all(texts)
    if not is_whole or not 2 <= len(set(texts)) == len(texts) <= len(_LETTERS):
        raise BadRow(f"its choices are {str(value)[:120]}; they must be 2 to {len(_LETTERS)} different texts")
    return tuple(without_tag(text, "a choice") for text in texts)


def _right(answer: Any, choices: tuple[str, ...]) -> str:
    """The choice that an answer is: by its text, its place from 0, or its letter."""
    if type(answer) is int and 0 <= answer < len(choices):
        return choices[answer]
    text = answer.strip() if isinstance(answer, str) else ""
    if text in choices:
        return text
    if len(text) == 1 and text in _LETTERS[: len(choices)]:
        return choices[_LETTERS.index(text)]
    raise BadRow(f"its answer {str(answer)[:80]!r} is none of its choices, {list(choices)}")


def _audios(columns: Columns, video: Any) -> tuple[str, ...]:
    """The clips of a row."""
    named = columns.take("audio_path", "audio_id", "audios", "audio")
    if is_empty(named) and isinstance(video, str):
        named = f"{video}.wav"
    return tuple(map(path_of, named if isinstance(named, list) else [named]))

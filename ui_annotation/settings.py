"""The annotators' form: fields, questions, guidelines."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import argilla as rg

from preference_data.schema import Axis, ErrorType
from ui_annotation.assignment import PLACES

_CHOICES = {
    "a": "A is better",
    "b": "B is better",
    "tie": "Both equally good",
    "both_bad": "Both bad",
}


class _Axis(NamedTuple):
    """What is asked about an axis, of two answers and of more."""

    name: Axis
    of_two: str
    of_several: str
    description: str


_AXES = (
    _Axis(
        "factuality",
        "Which answer is truer to the audio?",
        "Rank: the truest to the audio first",
        "Only what can be heard counts.",
    ),
    _Axis(
        "behaviour",
        "Which answer follows the question better?",
        "Rank: what follows the question best first",
        "Form, length, language, and saying so when something cannot be heard.",
    ),
)
_ERRORS: dict[ErrorType, str] = {
    "omission": "Omission",
    "invented_event": "Invented event",
    "wrong_order": "Wrong order",
    "wrong_count": "Wrong count",
    "wrong_words": "Wrong words",
    "wrong_speaker": "Wrong speaker",
}
_ALL_BAD = {"factuality": "All say something false", "behaviour": "None does what the question wants"}


def guidelines() -> str:
    """The text that annotators read before and while they work."""
    return (Path(__file__).parent / "guidelines.md").read_text(encoding="utf-8")


def settings(client: rg.Argilla, *, size: int, min_submitted: int) -> rg.Settings:
    """Settings of a dataset whose records compare `size` completions, each for `min_submitted` judgements.

    Annotators learn the task of a record and nothing else about it. There are no suggestions: Argilla
    pre-selects them, and Enter would then submit a model's answer.
    """
    fields = {"audio": "Audio", "prompt": "Question"}
    fields |= {f"response_{place}": f"Answer {place.upper()}" for place in PLACES[:size]}
    return rg.Settings(
        guidelines=guidelines(),
        # Markdown fields, always: Argilla puts plain text fields into the page as they are (v-html), and a
        # custom field anywhere in a record lets the text of the others run. Markdown is sanitised.
        fields=[
            rg.TextField(name=name, title=title, use_markdown=True, client=client)
            for name, title in fields.items()
        ],
        questions=[
            *(_choices(client) if size == 2 else _rankings(client, size)),
            *_about_each(client, PLACES[:size]),
            *_about_the_record(client),
        ],
        metadata=[rg.TermsMetadataProperty(name="task", title="Task", client=client)],
        allow_extra_metadata=False,
        distribution=rg.TaskDistribution(min_submitted=min_submitted),
    )


def _choices(client: rg.Argilla) -> list[rg.LabelQuestion]:
    """Which of two is better, on each axis."""
    return [
        rg.LabelQuestion(
            name=axis.name, title=axis.of_two, description=axis.description, labels=_CHOICES, client=client
        )
        for axis in _AXES
    ]


def _rankings(client: rg.Argilla, size: int) -> list[rg.RankingQuestion | rg.MultiLabelQuestion]:
    """The order of several, on each axis; equal ranks are ties."""
    places = {place: f"Answer {place.upper()}" for place in PLACES[:size]}
    all_bad = rg.MultiLabelQuestion(
        name="all_bad",
        title="Are all answers bad?",
        description="Rank them nevertheless, the least bad first.",
        labels=_ALL_BAD,
        required=False,
        client=client,
    )
    return [
        *(
            rg.RankingQuestion(
                name=axis.name,
                title=axis.of_several,
                description=f"{axis.description} 1 is best; equal ones get the same rank.",
                values=places,
                client=client,
            )
            for axis in _AXES
        ),
        all_bad,
    ]


def _about_each(client: rg.Argilla, places: str) -> list[rg.MultiLabelQuestion]:
    """Whether an answer is good on its own, and what is wrong in it."""
    errors = {str(name): title for name, title in _ERRORS.items()}
    thumbs = {f"{place}_{value}": f"{place.upper()} {value}" for place in places for value in ("good", "bad")}
    return [
        rg.MultiLabelQuestion(
            name="thumbs",
            title="Is an answer good or bad on its own?",
            description="Whatever the others are: would you want the model to answer like that?",
            labels=thumbs,
            visible_labels=len(thumbs),
            required=False,
            client=client,
        ),
        *(
            rg.MultiLabelQuestion(
                name=f"errors_{place}",
                title=f"What is wrong in answer {place.upper()}?",
                labels=errors,
                visible_labels=len(errors),
                required=False,
                client=client,
            )
            for place in places
        ),
    ]


def _about_the_record(client: rg.Argilla) -> list[rg.LabelQuestion | rg.TextQuestion]:
    return [
        rg.LabelQuestion(
            name="clip",
            title="Is the audio usable?",
            description="Unusable: silent, broken, or not to be understood by anyone.",
            labels={"usable": "Usable", "unusable": "Unusable"},
            required=False,
            client=client,
        ),
        rg.TextQuestion(
            name="corrected",
            title="A better answer",
            description="If you know a better answer: once another person agrees, the model learns from it.",
            required=False,
            client=client,
        ),
        rg.TextQuestion(name="rationale", title="Why?", required=False, client=client),
    ]

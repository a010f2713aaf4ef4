"""The annotators' form: fields, questions, guidelines."""

from __future__ import annotations

from pathlib import Path

import argilla as rg

from preference_data.schema import Choice, ErrorType

_CHOICES: dict[Choice, str] = {
    "a": "A is better",
    "b": "B is better",
    "tie": "Both equally good",
    "both_bad": "Both bad",
}
_AXES = (
    ("factuality", "Which answer is truer to the audio?", "Only what can be heard counts."),
    (
        "behaviour",
        "Which answer follows the question better?",
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
_FIELDS = {"audio": "Audio", "prompt": "Question", "response_a": "Answer A", "response_b": "Answer B"}


def guidelines() -> str:
    """The text that annotators read before and while they work."""
    return (Path(__file__).parent / "guidelines.md").read_text(encoding="utf-8")


def settings(client: rg.Argilla, *, min_submitted: int) -> rg.Settings:
    """Settings of a dataset whose records each want `min_submitted` judgements.

    Annotators learn the task of a record and nothing else about it. There are no suggestions: Argilla
    pre-selects them, and Enter would then submit a model's answer.
    """
    return rg.Settings(
        guidelines=guidelines(),
        # Markdown fields, always: Argilla puts plain text fields into the page as they are (v-html), and a
        # custom field anywhere in a record lets the text of the others run. Markdown is sanitised.
        fields=[
            rg.TextField(name=name, title=title, use_markdown=True, client=client)
            for name, title in _FIELDS.items()
        ],
        questions=_questions(client),
        metadata=[rg.TermsMetadataProperty(name="task", title="Task", client=client)],
        allow_extra_metadata=False,
        distribution=rg.TaskDistribution(min_submitted=min_submitted),
    )


def _questions(client: rg.Argilla) -> list[rg.LabelQuestion | rg.MultiLabelQuestion | rg.TextQuestion]:
    choices, errors = {str(k): v for k, v in _CHOICES.items()}, {str(k): v for k, v in _ERRORS.items()}
    return [
        *(
            rg.LabelQuestion(name=name, title=title, description=text, labels=choices, client=client)
            for name, title, text in _AXES
        ),
        *(
            rg.MultiLabelQuestion(
                name=f"errors_{side}",
                title=f"What is wrong in answer {side.upper()}?",
                labels=errors,
                visible_labels=len(errors),
                required=False,
                client=client,
            )
            for side in "ab"
        ),
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
            description="If you know a better answer: the model learns from it as the best one.",
            required=False,
            client=client,
        ),
        rg.TextQuestion(name="rationale", title="Why?", required=False, client=client),
    ]

"""Krippendorff's alpha on worked cases."""

import pytest

from preference_data.agreement import alpha, share_of_a
from preference_data.schema import Annotation


def vote(unit, rater, choice):
    return Annotation(
        id=f"{unit}{rater}",
        prompt_id=unit,
        completion_a="a",
        completion_b="b",
        annotator=rater,
        factuality=choice,
        behaviour="tie",
    )


def votes(rows):
    return [vote(f"u{i}", f"r{j}", choice) for i, row in enumerate(rows) for j, choice in enumerate(row)]


def test_full_agreement_is_one():
    assert alpha(votes([("a", "a"), ("b", "b"), ("tie", "tie")]), "factuality") == pytest.approx(1)


def test_a_worked_disagreement():
    # Coincidences over 4 units of 2: a-a 2, b-b 2, and 2 mixed units give 4; n=8, n_a=n_b=4.
    # Observed disagreement 4/8, expected 2*4*4/(8*7) = 32/56; alpha = 1 - (4/8)/(32/56) = 0.125.
    given = votes([("a", "a"), ("b", "b"), ("a", "b"), ("b", "a")])
    assert alpha(given, "factuality") == pytest.approx(0.125)


def test_undefined_is_none_not_one():
    assert alpha(votes([("a",), ("b",)]), "factuality") is None
    assert alpha(votes([("a", "a"), ("a", "a")]), "factuality") is None


def test_lean_to_the_side_shown_first():
    given = votes([("a", "b"), ("a", "a"), ("tie", "b"), ("b", "both_bad")])
    assert share_of_a(given, "factuality") == pytest.approx({"r0": 2 / 3, "r1": 1 / 3})

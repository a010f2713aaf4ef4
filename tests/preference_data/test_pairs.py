"""From votes to pairs to weights, with the arithmetic in sight."""

import pytest

from preference_data.pairs import Tally, build, weigh
from preference_data.schema import Annotation, Completion, PreferencePair, Prompt

PROMPT = Prompt(
    id="p", audios=("a.wav",), question="What?", answer_gt="A.", meta_info="{}", task_name="speech_QA"
)
COMPLETIONS = {
    f"c{i}": Completion(id=f"c{i}", prompt_id="p", index=i, text=f"answer {i}", policy="x") for i in range(4)
}


def vote(a, b, factuality, behaviour="tie", annotator="r1"):
    return Annotation(
        id=f"{a}{b}{annotator}",
        prompt_id="p",
        completion_a=a,
        completion_b=b,
        annotator=annotator,
        factuality=factuality,
        behaviour=behaviour,
    )


def pairs_of(*votes, min_agreement=0.75):
    return build(votes, {"p": PROMPT}, COMPLETIONS, min_agreement=min_agreement)


def test_a_clear_preference_is_a_pair_on_its_axis_only():
    pairs, tallies = pairs_of(vote("c0", "c1", "b"))
    assert [(p.chosen, p.rejected, p.axis, p.agreement) for p in pairs] == [
        ("answer 1", "answer 0", "factuality", 1.0)
    ]
    assert tallies == {"factuality": Tally(1, 0, 0), "behaviour": Tally(0, 1, 0)}


@pytest.mark.parametrize(
    ("choices", "expected"),
    [
        (["a", "a", "a", "b"], Tally(1, 0, 0)),  # 3/4 reaches 0.75
        (["a", "a", "b"], Tally(0, 0, 1)),  # 2/3 does not
        (["a", "b"], Tally(0, 0, 1)),
        (["tie", "both_bad"], Tally(0, 1, 0)),
        (["a", "tie", "both_bad"], Tally(0, 1, 0)),  # most saw no difference
        (["a", "tie"], Tally(0, 0, 1)),
    ],
)
def test_the_stated_rule(choices, expected):
    votes = [vote("c0", "c1", choice, annotator=f"r{i}") for i, choice in enumerate(choices)]
    assert pairs_of(*votes)[1]["factuality"] == expected


def pair(chosen, rejected, axis):
    return PreferencePair(
        id=f"{chosen}{rejected}{axis}",
        prompt_id="p",
        audios=("a.wav",),
        question="What?",
        chosen=chosen,
        rejected=rejected,
        axis=axis,
        agreement=1,
    )


PAIRS = [
    pair("x", "y", "factuality"),  # both axes agree: 1 + 0.5 = 1.5
    pair("x", "y", "behaviour"),
    pair("u", "v", "factuality"),  # the axes disagree: 1 - 0.5 = 0.5
    pair("v", "u", "behaviour"),
    pair("s", "t", "behaviour"),  # behaviour alone: 0.5
]


def test_axes_add_up_and_conflicts_subtract():
    found = weigh(PAIRS, {"factuality": 1, "behaviour": 0.5})
    weighted = {(w.pair.chosen, w.pair.rejected): w.weight for w in found}
    mean = (1.5 + 0.5 + 0.5) / 3
    assert weighted == pytest.approx({("x", "y"): 1.5 / mean, ("u", "v"): 0.5 / mean, ("s", "t"): 0.5 / mean})
    assert sum(weighted.values()) / 3 == pytest.approx(1)


def test_either_axis_alone():
    factual = weigh(PAIRS, {"factuality": 1, "behaviour": 0})
    assert {w.pair.chosen for w in factual} == {"x", "u"}
    behaving = weigh(PAIRS, {"factuality": 0, "behaviour": 1})
    assert {w.pair.chosen for w in behaving} == {"x", "v", "s"}
    assert {w.weight for w in behaving} == {1.0}


def test_equal_and_opposite_support_teaches_nothing():
    assert weigh(PAIRS[2:4], {"factuality": 1, "behaviour": 1}) == []

"""Which judgements count, and what a vote weighs."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from preference_data.preferences import pairs
from preference_data.preferences.annotator_weights import UnknownWeights
from preference_data.preferences.rules import Rules, Tally, UnknownAnnotator, count, removals
from preference_data.schema import Ranking
from tests.preference_data.votes import PROMPT, counted, judged


def gold(right, wrong, who):
    return [
        judged((f"g{i}", f"h{i}"), "a" if i < right else "b", annotator=who, purpose="gold", expected="a")
        for i in range(right + wrong)
    ]


def test_who_is_excluded_counts_nowhere():
    given = [judged("ab", "a"), judged("ab", "b", annotator="r2"), judged("cd", "a", annotator="r2")]
    found = counted(given, exclude=("r2",))
    assert [item.annotator for item in found.votes] == ["r1"]
    assert found.tally == Tally(0, 2, 0, 0, 0, 1)


def test_a_name_that_nobody_has_is_an_error_that_lists_those_there_are():
    with pytest.raises(
        UnknownAnnotator, match="nobody called 'jon' has judged anything; those who have are r1"
    ):
        counted([judged("ab", "a")], exclude=("jon",))


@pytest.mark.parametrize(
    ("right", "wrong", "is_left_out"),
    [
        (0, 4, True),  # Wilson's upper end of 0 in 4: 1.96^2 / (4 + 1.96^2) = 0.490
        (1, 3, False),  # 0.699: may be better than 0.5
        (4, 12, True),  # 0.495
        (4, 10, False),  # 0.546
        (0, 0, False),
    ],
)
def test_only_who_is_below_for_certain_is_left_out(right, wrong, is_left_out):
    found = counted([judged("ab", "a"), *gold(right, wrong, "r1")], min_gold=0.5)
    assert (len(found.votes) == 0) == is_left_out
    assert found.tally.below_gold == is_left_out
    assert found.tally.controls == right + wrong
    if is_left_out:
        assert (found.below_gold["r1"].hits, found.below_gold["r1"].n) == (right, right + wrong)


def test_each_judgement_is_left_out_by_the_first_rule_that_applies():
    given = [
        judged("ab", "a", annotator="out", heard=0.0, audio_unusable=True),
        judged("ab", "a", annotator="bad", heard=0.0),
        *gold(0, 9, "bad"),
        judged("ab", "a", annotator="r1", audio_unusable=True, heard=None),
        judged("ab", "a", annotator="r2", heard=None),
        judged("ab", "a", annotator="r3"),
    ]
    rules = Rules(min_heard=0.8, exclude=("out",), min_gold=0.5)
    found = count(given, rules)
    assert found.tally == Tally(controls=9, excluded=1, below_gold=1, unusable=1, unheard=1, counted=1)
    rows = removals(found, rules, control_tokens=3)
    assert [row.left_out for row in rows] == [3, 9, 1, 1, 1, 1]
    assert {row.total for row in rows} == {len(given) + 3}
    assert rows[3].why == "bad: 0 of 9 right, at most 30%"
    assert found.tally.counted == len(given) + 3 - sum(row.left_out for row in rows)


def test_what_became_of_every_two_adds_up():
    given = [judged("abc", "123"), judged("abc", "213", annotator="r2"), judged("xy", "tie", corrected="z")]
    _, tallies = pairs.build(counted(given), {"p": PROMPT}, min_agreement=0.75)
    rows = {row.rule: row for row in pairs.removals({"factuality": tallies["factuality"]})}
    assert {rule: (row.left_out, row.total) for rule, row in rows.items()} == {
        "ties": (1, 4), "min_agreement": (1, 4), "annotator_weights": (0, 4), "approval": (2, 2),
    }  # fmt: skip


# ---------------------------------------------------------------- weights

MANNERS = {
    "careful": lambda rng, truth: truth if rng.random() < 0.95 else "ab"[rng.integers(2)],
    "guesses": lambda rng, truth: "ab"[rng.integers(2)],
    "first": lambda rng, truth: "a",
    "ties": lambda rng, truth: "tie",
    "contrary": lambda rng, truth: "ba"["ab".index(truth)],
}


def crowd(people, n=200, seed=0):
    """Choices of all people between the same two texts each, in truth a or b."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(n):
        truth = "ab"[rng.integers(2)]
        for who, manner in people.items():
            made.append(judged((f"x{i}", f"y{i}"), MANNERS[manner](rng, truth), annotator=who))
    return made


def weights(given, axis="factuality"):
    return counted(given, annotator_weights="dawid_skene").weights[axis]


@pytest.mark.parametrize("odd", ["guesses", "first", "ties", "contrary"])
def test_votes_that_tell_nothing_weigh_nothing(odd):
    found = weights(crowd({"r1": "careful", "r2": "careful", "r3": "careful", "odd": odd}))
    assert found["odd"] < 0.1
    assert all(found[who] > 0.85 for who in ("r1", "r2", "r3"))


def test_gold_tells_of_two_who_errs():
    two = crowd({"ann": "careful", "lisa": "first"})
    known = []
    for i in range(40):
        said = {"ann": "ab"[i % 2], "lisa": "a"}
        for who, choice in said.items():
            more = {"purpose": "gold", "expected": "ab"[i % 2], "annotator": who}
            known.append(judged((f"g{i}", f"h{i}"), choice, **more))
    found = counted([*two, *known], annotator_weights="dawid_skene").weights
    assert found["factuality"]["ann"] > 0.8
    assert found["factuality"]["lisa"] < 0.1
    assert found["behaviour"] == found["factuality"]  # of which nothing is known


def test_without_votes_in_common_and_gold_nothing_is_known():
    with pytest.raises(UnknownWeights, match="needs comparisons that 3 annotators or more"):
        weights(crowd({"ann": "careful", "lisa": "first"}))


def test_few_votes_are_taken_for_those_of_the_average():
    given = crowd({"r1": "careful", "r2": "careful", "r3": "careful"})
    new = judged(("x0", "y0"), "a", annotator="new")  # right or wrong: one vote
    found = weights([*given, new])
    assert 0.6 < found["new"] < 1


def test_the_weights_decide_the_pairs():
    """Two careful people against three who take what comes first: by number they lose, by weight they win."""
    given = crowd({"r1": "careful", "r2": "careful", "r3": "careful", "f1": "first", "f2": "first"})
    late = [judged(("last", "best"), "b", annotator="r1"), judged(("last", "best"), "b", annotator="r2")]
    late += [judged(("last", "best"), "a", annotator=who) for who in ("f1", "f2")]

    def of(weights):
        found = counted([*given, *late], annotator_weights=weights)
        built, _ = pairs.build(found, {"p": PROMPT}, min_agreement=0.75)
        return [pair for pair in built if {pair.chosen, pair.rejected} == {"last", "best"}]

    assert of("equal") == []
    (pair,) = of("dawid_skene")
    assert (pair.chosen, pair.rejected) == ("best", "last")
    assert pair.agreement > 0.9
    assert 0.65 < pair.evidence < 0.76  # of two votes that weigh a little less than 1: at most 0.75


def test_a_vote_that_weighs_nothing_makes_no_pair():
    given = crowd({"r1": "careful", "r2": "careful", "r3": "careful", "c": "contrary"})
    found = counted([*given, judged("pq", "a", annotator="c")], annotator_weights="dawid_skene")
    assert found.weights["factuality"]["c"] == 0
    built, tallies = pairs.build(found, {"p": PROMPT}, min_agreement=0.75)
    assert not [pair for pair in built if {pair.chosen, pair.rejected} == {"p", "q"}]
    assert tallies["factuality"].weightless == 1
    assert all("c" not in pair.annotators for pair in built)


@given(st.randoms(use_true_random=False))
def test_the_order_of_judgements_does_not_matter(random):
    crowded = crowd({"r1": "careful", "r2": "careful", "r3": "first"}, n=20)
    mixed = list(crowded)
    random.shuffle(mixed)
    assert counted(mixed) == counted(crowded)


def test_the_weights_do_not_depend_on_the_order_of_judgements():
    crowded = crowd({"r1": "careful", "r2": "careful", "r3": "first"}, n=60)
    assert weights(crowded[::-1]) == weights(crowded)


def test_rankings_of_four_have_weights_too():
    rng = np.random.default_rng(1)
    made = []
    for i in range(80):
        quality = rng.permutation(4)
        for who in ("r1", "r2", "r3", "first"):
            seen = [-place for place in range(4)] if who == "first" else quality + rng.normal(0, 0.3, 4)
            order = sorted(range(4), key=lambda place: -seen[place])
            ranks = Ranking(ranks=tuple(order.index(place) + 1 for place in range(4)))
            made.append(judged([f"{i} {place}" for place in range(4)], ranks, ranks, who))
    found = weights(made)
    assert found["first"] < 0.1
    assert all(found[who] > 0.85 for who in ("r1", "r2", "r3"))

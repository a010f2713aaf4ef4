"""From votes to pairs to weights, with the arithmetic in sight."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from preference_data.preferences import corrections
from preference_data.preferences.pairs import (
    LowAgreement,
    ScoreTally,
    Tally,
    build,
    evidence,
    of_scores,
    weigh,
    without_control_tokens,
)
from preference_data.schema import Completion, CompletionScore, PreferencePair, Ranking
from tests.preference_data.votes import PROMPT, counted, judged

COMPLETIONS = {
    f"c{i}": Completion(id=f"c{i}", prompt_id="p", index=i, text=f"answer {i}", policy="x") for i in range(4)
}


def vote(a, b, factuality, behaviour=None, annotator="r1", **more):
    """A choice between c0 to c3, whose texts are "answer 0" to "answer 3"."""
    texts = [name.replace("c", "answer ", 1) if name in COMPLETIONS else name for name in (a, b)]
    named = {"id": f"{a}{b}{annotator}", "comparison": f"{a}-{b}", "completions": (a, b)}
    return judged(texts, factuality, behaviour, annotator, **named | more)


def pairs_of(*votes, min_agreement=0.75, min_heard=0.8, min_alpha=None, correction_weight=0.0, **rules):
    return build(
        counted(votes, min_heard, **rules),
        {"p": PROMPT},
        min_agreement=min_agreement,
        min_alpha=min_alpha,
        correction_weight=correction_weight,
    )


def tally(pairs, ties, disagreements, adjudicated=0, corrected=0, unapproved=0, weightless=0):
    return Tally(pairs, ties, disagreements, weightless, adjudicated, corrected, unapproved)


def told(pairs, axis="factuality"):
    return [(p.chosen, p.rejected, p.agreement) for p in pairs if p.axis == axis]


def test_a_clear_preference_is_a_pair_on_its_axis_only():
    pairs, tallies = pairs_of(vote("c0", "c1", "b"))
    assert [(p.chosen, p.rejected, p.axis, p.agreement) for p in pairs] == [
        ("answer 1", "answer 0", "factuality", 1.0)
    ]
    assert tallies == {"factuality": tally(1, 0, 0), "behaviour": tally(0, 1, 0)}


@pytest.mark.parametrize(
    ("choices", "expected"),
    [
        (["a", "a", "a", "b"], tally(1, 0, 0)),  # 3/4 reaches 0.75
        (["a", "a", "b"], tally(0, 0, 1)),  # 2/3 does not
        (["a", "b"], tally(0, 0, 1)),
        (["tie", "both_bad"], tally(0, 1, 0)),
        (["a", "tie", "both_bad"], tally(0, 1, 0)),  # most saw no difference
        (["a", "tie"], tally(0, 0, 1)),
    ],
)
def test_the_stated_rule(choices, expected):
    votes = [vote("c0", "c1", choice, annotator=f"r{i}") for i, choice in enumerate(choices)]
    assert pairs_of(*votes)[1]["factuality"] == expected


def retest(a, b, choice, annotator="r1", **more):
    return vote(a, b, choice, annotator=annotator, purpose="retest", about=f"{b}-{a}", **more)


def review(texts, said, annotator="r9", purpose="correction", about="c0-c1", **more):
    """A judgement of a typed completion beside others, or of a disagreement; on both axes the same."""
    return judged(
        texts, said, said, annotator, purpose=purpose, about=about, comparison=f"{purpose} of {texts}", **more
    )


A0, A1, A2 = "answer 0", "answer 1", "answer 2"


def test_retests_by_the_same_annotator_and_gold_are_not_votes():
    given = [
        vote("c0", "c1", "a"),
        retest("c1", "c0", "a", corrected="better"),
        vote("g1", "g0", "a", purpose="gold", expected="a", corrected="better"),  # of no policy
    ]
    pairs, tallies = pairs_of(*given)
    assert told(pairs) == [("answer 0", "answer 1", 1.0)]
    assert tallies["factuality"] == tally(1, 0, 0)
    assert counted(given).tally.controls == 2


def test_a_retest_by_another_is_a_vote_whatever_side_the_texts_stand_on():
    (pair,) = [p for p in pairs_of(vote("c0", "c1", "a"), retest("c1", "c0", "b", "r2"))[0]]
    assert (pair.chosen, pair.judges, pair.annotators, pair.evidence) == (A0, 2, ("r1", "r2"), 0.75)
    assert pairs_of(vote("c0", "c1", "a"), retest("c1", "c0", "a", "r2"))[1]["factuality"] == tally(0, 0, 1)


def test_answers_without_listening_or_with_unusable_audio_are_dropped_and_counted():
    given = [
        vote("c0", "c1", "a", annotator="r1"),
        vote("c0", "c1", "b", annotator="r2", heard=0.79, corrected="unheard"),
        vote("c0", "c1", "b", annotator="r3", heard=None),
        vote("c0", "c1", "b", annotator="r4", audio_unusable=True, corrected="unusable"),
        vote("c2", "c3", "b", annotator="r5", audio_unusable=True, heard=None),  # counted once
    ]
    pairs, tallies = pairs_of(*given)
    assert told(pairs) == [("answer 0", "answer 1", 1.0)]
    assert tallies == {"factuality": tally(1, 0, 0), "behaviour": tally(0, 1, 0)}
    assert counted(given).tally._asdict() == {
        "controls": 0, "excluded": 0, "below_gold": 0, "unusable": 2, "unheard": 2, "counted": 1,
    }  # fmt: skip


def test_min_heard_of_zero_takes_everything():
    assert told(pairs_of(vote("c0", "c1", "b", heard=None), min_heard=0)[0]) == [
        ("answer 1", "answer 0", 1.0)
    ]


# ---------------------------------------------------------------- evidence


@pytest.mark.parametrize(
    ("votes", "expected"),
    [
        ((1, 0), 0.5),  # Beta(2, 1): 2 (1 - 1/4) - 1
        ((2, 0), 0.75),  # Beta(3, 1): 2 (1 - 1/8) - 1
        ((5, 0), 1 - 2 / 64),
        ((3, 1), 0.625),  # Beta(4, 2): P(4 or more of 5 coins) is 6/32, so 2 (1 - 6/32) - 1
        ((1, 1), 0.0),
        ((0, 2), -0.75),
    ],
)
def test_evidence_by_hand(votes, expected):
    assert evidence(*votes) == pytest.approx(expected)


def test_a_tie_lowers_the_evidence():
    assert evidence(1.5, 0.5) < evidence(1, 0)


def test_a_pair_says_who_prefers_it_and_how_sure_that_is():
    votes = [vote("c0", "c1", choice, annotator=f"r{i}") for i, choice in enumerate("aaab")]
    (pair,) = pairs_of(*votes)[0]
    assert (pair.judges, pair.agreement, pair.annotators) == (4, 0.75, ("r0", "r1", "r2"))
    assert pair.evidence == pytest.approx(0.625)
    # Wilson of 3 in 4: (0.75 + z2/8 -+ z sqrt(0.1875/4 + z2/64)) / (1 + z2/4), z2 = 3.8415
    assert (pair.agreement_low, pair.agreement_high) == pytest.approx((0.3006, 0.9544), abs=1e-4)
    ties = [vote("c0", "c1", choice, annotator=f"r{i}") for i, choice in enumerate(["a", "a", "a", "tie"])]
    (pair,) = pairs_of(*ties)[0]
    assert (pair.agreement, pair.judges, pair.annotators) == (3.5 / 4, 4, ("r0", "r1", "r2"))
    assert pair.evidence == pytest.approx(float(evidence(3.5, 0.5)))


def test_five_votes_outweigh_one_typed_idk():
    """What was wrong before: one person's "idk" weighed 1.5 on two axes, five votes 1 on their own."""
    votes = [vote("c0", "c1", "a", annotator=f"r{i}") for i in range(5)]
    given = [*votes[:4], votes[4].model_copy(update={"corrected": "idk"})]
    objective = {"factuality": 1.0, "behaviour": 0.5}
    assert [w.pair.chosen for w in weigh(pairs_of(*given)[0], objective)] == [A0]
    assert pairs_of(*given)[1]["factuality"] == tally(1, 0, 0, unapproved=2)
    low = weigh(pairs_of(*given, correction_weight=0.1)[0], objective)
    weights = {(w.pair.chosen, w.pair.rejected): w.weight for w in low}
    # 0.96875 of the votes; 0.1 * (1 + 0.5) of each typed pair
    mean = (0.96875 + 0.15 + 0.15) / 3
    assert weights == pytest.approx(
        {(A0, A1): 0.96875 / mean, ("idk", A0): 0.15 / mean, ("idk", A1): 0.15 / mean}
    )


# ---------------------------------------------------------------- rankings


def test_a_ranking_of_four_makes_a_pair_of_every_two_it_tells_apart():
    pairs, tallies = pairs_of(judged("dacb", "1332", "1111"))
    assert told(pairs) == [
        ("b", "a", 1.0),
        ("b", "c", 1.0),
        ("d", "a", 1.0),
        ("d", "b", 1.0),
        ("d", "c", 1.0),
    ]
    assert tallies == {"factuality": tally(5, 1, 0), "behaviour": tally(0, 6, 0)}
    assert pairs_of(judged("dacb", "1234!"))[1]["factuality"] == tally(0, 6, 0)


def test_comparisons_that_hold_the_same_two_texts_vote_together():
    given = [
        judged("abc", "123", annotator="r1"),
        judged("dba", "132", annotator="r2"),  # d, then a, then b
        judged("ba", "b", annotator="r3"),
    ]
    pair = next(p for p in pairs_of(*given)[0] if {p.chosen, p.rejected} == {"a", "b"})
    assert (pair.chosen, pair.judges, pair.annotators) == ("a", 3, ("r1", "r2", "r3"))


def test_an_annotator_has_one_vote_on_two_texts_however_often_they_compare_them():
    often = [judged("ab", "a", annotator="r1"), judged("abc", "123", annotator="r1")]
    pair = next(p for p in pairs_of(*often)[0] if (p.chosen, p.rejected) == ("a", "b"))
    assert (pair.judges, pair.evidence) == (1, 0.5)
    against = [judged("ab", "a", annotator="r1"), judged("abc", "213", annotator="r1")]
    assert pairs_of(*against)[1]["factuality"].disagreements == 1


def test_ratings_are_no_votes():
    pairs, tallies = pairs_of(judged("ab", None, thumbs=(True, False)))
    assert pairs == []
    assert tallies["factuality"] == tally(0, 0, 0)


# ---------------------------------------------------------------- typed completions


def test_a_typed_completion_that_a_second_person_approves_is_chosen_on_that_axis():
    given = [
        vote("c0", "c1", "a", annotator="r1"),
        vote("c0", "c1", "a", annotator="r2", corrected=" best \n"),
        judged(("best", A0, A1), "123", "112", "r9", purpose="correction", about="c0-c1"),
    ]
    pairs, tallies = pairs_of(*given)
    assert told(pairs) == [(A0, A1, 1.0), ("best", A0, 1.0), ("best", A1, 1.0)]
    assert told(pairs, "behaviour") == []  # a tie is not strictly above
    typed = next(p for p in pairs if p.chosen == "best")
    assert (typed.judges, typed.annotators, typed.evidence) == (2, ("r2", "r9"), 0.75)
    assert tallies == {
        "factuality": tally(1, 0, 0, corrected=2),
        "behaviour": tally(0, 1, 0, unapproved=2),
    }
    assert len({p.id for p in pairs}) == len(pairs) == 3


@pytest.mark.parametrize(
    "reviews",
    [
        [],
        [review(("best", A0, A1), "123", annotator="r2")],  # by the typist
        [review(("best", A0, A1), "112")],
        [review(("best", A0, A1), "213")],
        [review(("best", A0, A1), "123!")],
        [review(("best", A0, A1), "123", heard=0.1)],
        [review(("other", A0, A1), "123")],
        [review(("best", A0, A1), "123"), review(("best", A0, A1), "213", annotator="r8")],  # 2 of 3 over 0
    ],
)
def test_what_is_no_approval(reviews):
    typed = vote("c0", "c1", "tie", annotator="r2", corrected="best")
    pairs, tallies = pairs_of(typed, *reviews, min_agreement=0.8)
    assert (A0, "best") not in [(p.chosen, p.rejected) for p in pairs]
    assert ("best", A0, 1.0) not in told(pairs)
    assert tallies["factuality"].unapproved >= 1


def test_a_correction_that_somebody_rejects_has_no_weight():
    typed = vote("c0", "c1", "tie", annotator="r2", corrected="best")
    assert len(told(pairs_of(typed, correction_weight=0.2)[0])) == 2
    assert told(pairs_of(typed, review(("best", A0, A1), "312"), correction_weight=0.2)[0]) == []


@pytest.mark.parametrize("purpose", ["adjudication", "correction"])
def test_what_who_decides_types_needs_a_second_person_too(purpose):
    given = [
        vote("c0", "c1", "a", annotator="r1"),
        vote("c0", "c1", "b", annotator="r2"),
        review((A0, A1), "a", purpose=purpose, corrected="best"),
    ]
    pairs, tallies = pairs_of(*given)
    assert "best" not in {pair.chosen for pair in pairs}
    assert tallies["factuality"].unapproved == 2
    weighed = [pair for pair in pairs_of(*given, correction_weight=0.2)[0] if pair.chosen == "best"]
    assert {(pair.annotators, pair.judges, pair.evidence) for pair in weighed} == {(("r9",), 3, 0.2)}


def test_a_typed_completion_knows_who_typed_it_and_who_has_judged_it():
    typed = vote("c0", "c1", "tie", annotator="r2", corrected=" best")
    (alone,) = corrections.find(counted([typed]))
    assert (alone.text, alone.typists, alone.worse, alone.reviews) == ("best", {"r2"}, (A0, A1), ())
    (judged,) = corrections.find(counted([typed, review(("best", A0, A1), "312")]))
    assert len(judged.reviews) == 1


def test_the_declared_weight_of_what_nobody_else_has_judged():
    given = [vote("c0", "c1", "tie", annotator=f"r{i}", corrected="best" if i else None) for i in range(3)]
    pairs, _ = pairs_of(*given, correction_weight=0.2)
    assert told(pairs) == [("best", A0, 2 / 3), ("best", A1, 2 / 3)]
    assert {(p.evidence, p.judges, p.annotators) for p in pairs} == {(0.2, 3, ("r1", "r2"))}


@pytest.mark.parametrize("typed", ["answer 1", " answer 1", "", "  "])
def test_no_completion_is_paired_with_itself(typed):
    pairs, tallies = pairs_of(vote("c0", "c1", "tie", corrected=typed), correction_weight=0.5)
    assert told(pairs) == ([("answer 1", "answer 0", 1.0)] if typed.strip() else [])
    assert tallies["factuality"].ties == 1


def test_two_completions_with_the_same_text_are_a_tie():
    pairs, tallies = pairs_of(judged(("same", "same"), "a"))
    assert pairs == []
    assert tallies["factuality"] == tally(0, 1, 0)


def test_a_typed_completion_adds_no_pair_twice():
    pairs, tallies = pairs_of(
        vote("c0", "c1", "a", corrected="answer 0"),  # voted already
        vote("c0", "c2", "tie", corrected="best"),
        vote("c0", "c3", "tie", corrected="best"),  # over c0 known already
        correction_weight=0.5,
    )
    assert told(pairs) == [
        ("answer 0", "answer 1", 1.0),
        ("best", "answer 0", 1.0),
        ("best", "answer 2", 1.0),
        ("best", "answer 3", 1.0),
    ]
    assert tallies["factuality"].corrected == 3
    assert tallies["behaviour"].corrected == 4
    assert len({p.id for p in pairs}) == len(pairs)


# ---------------------------------------------------------------- adjudication


def test_an_adjudicator_decides_every_two_on_both_axes():
    split = [judged("abc", said, annotator=f"r{i}") for i, said in enumerate(["123", "213", "132"])]
    about = {"purpose": "adjudication", "about": "a-b-c"}
    decides = judged("cba", "321", "112", annotator="lead", comparison="again", **about)
    assert pairs_of(*split)[1]["factuality"].disagreements == 2
    pairs, tallies = pairs_of(*split, decides)
    assert told(pairs) == [("a", "b", 0.75), ("a", "c", 1.0), ("b", "c", 0.75)]
    assert told(pairs, "behaviour") == [("b", "a", 0.625), ("c", "a", 0.625)]  # three ties, and the decision
    assert {p.evidence for p in pairs} == {0.9}
    assert all("lead" in p.annotators for p in pairs)
    assert tallies["factuality"] == tally(0, 0, 0, adjudicated=3)
    assert tallies["behaviour"] == tally(0, 1, 0, adjudicated=2)


def test_an_adjudicator_who_had_voted_has_one_voice_and_may_decide_against_all():
    votes = [vote("c0", "c1", "a", annotator=f"r{i}") for i in range(4)]
    decides = review((A0, A1), "b", "r3", "adjudication")
    (pair, _) = pairs_of(*votes, decides)[0]
    assert (pair.chosen, pair.judges, pair.agreement, pair.annotators) == (A1, 4, 0.25, ("r3",))


def test_a_tie_by_an_adjudicator_makes_no_pair_and_the_last_word_counts():
    split = [vote("c0", "c1", "a"), vote("c0", "c1", "b", annotator="r2")]
    tie = review((A0, A1), "tie", "lead", "adjudication", submitted_at="2026-01-01T00:00:00Z")
    assert pairs_of(*split, tie)[1]["factuality"] == tally(0, 1, 0)
    last = review((A0, A1), "a", "boss", "adjudication", submitted_at="2026-01-02T00:00:00Z")
    assert told(pairs_of(*split, tie, last)[0]) == [(A0, A1, 2.5 / 4)]
    assert told(pairs_of(*split, tie, last, exclude=("boss",))[0]) == []


# ---------------------------------------------------------------- properties

LEFT_TO_RIGHT = st.permutations(range(4))


@st.composite
def rankings(draw):
    """A dozen judgements by four annotators of two to four of the same four texts."""
    made = []
    for i in range(draw(st.integers(1, 12))):
        texts = draw(LEFT_TO_RIGHT)[: draw(st.integers(2, 4))]
        marks = draw(st.lists(st.integers(0, 2), min_size=len(texts), max_size=len(texts)))
        ranks = tuple(sorted(set(marks)).index(mark) + 1 for mark in marks)
        said = Ranking(ranks=ranks, all_bad=draw(st.booleans()) and draw(st.booleans()))
        who = f"r{draw(st.integers(0, 3))}"
        made.append(judged("".join("abcd"[t] for t in texts), said, said, who, comparison=f"u{i}", id=f"{i}"))
    return made


def shown_otherwise(item, order):
    """The same judgement of the same texts, shown in another order."""
    order = [place for place in order if place < len(item.texts)]

    def turned(given):
        return given.model_copy(update={"ranks": tuple(given.ranks[place] for place in order)})

    return item.model_copy(
        update={
            "texts": tuple(item.texts[place] for place in order),
            "completions": tuple(item.completions[place] for place in order),
            "factuality": turned(item.factuality),
            "behaviour": turned(item.behaviour),
        }
    )


@given(rankings(), st.randoms(use_true_random=False), LEFT_TO_RIGHT)
def test_neither_the_order_of_judgements_nor_that_of_places_matters(given, random, order):
    mixed = [shown_otherwise(item, order) for item in given]
    random.shuffle(mixed)
    assert pairs_of(*mixed, min_agreement=0.6) == pairs_of(*given, min_agreement=0.6)


@given(rankings())
def test_a_ranking_is_all_the_choices_it_implies(given):
    """Votes, agreement and evidence of rankings of K are those of their K (K - 1) / 2 choices."""
    choices = []
    for item in given:
        for j in range(len(item.texts)):
            for i in range(j):
                said = item.factuality
                ranks = (1, 1) if said.ranks[i] == said.ranks[j] else (1, 2) if said.prefers(i, j) else (2, 1)
                choice = Ranking(ranks=ranks, all_bad=said.all_bad)
                texts = item.texts[i] + item.texts[j]
                name = f"{item.id} {texts}"
                choices.append(judged(texts, choice, choice, item.annotator, comparison=name, id=name))
    assert pairs_of(*choices) == pairs_of(*given)


# ---------------------------------------------------------------- agreement before anything


def crowd(answers, **more):
    """Two annotators per comparison; `answers` has shape (comparisons, 2)."""
    return [
        judged((f"x{i}", f"y{i}"), choice, choice, f"r{j}", **more)
        for i, row in enumerate(answers)
        for j, choice in enumerate(row)
    ]


def test_answers_by_lot_are_refused():
    by_lot = np.array(["a", "b", "tie", "both_bad"])[np.random.default_rng(0).integers(4, size=(300, 2))]
    with pytest.raises(LowAgreement) as refused:
        pairs_of(*crowd(by_lot.tolist()), min_alpha=0.2)
    message = str(refused.value)
    for said in (
        "factuality: ",
        "behaviour: ",
        "95 % interval",
        "over 300 comparisons",
        "0.2",
        "lower min_alpha",
    ):
        assert said in message
    assert pairs_of(*crowd(by_lot.tolist()))[0]  # without a threshold they pass


def test_agreeing_annotators_pass_and_only_votes_are_looked_at():
    good = crowd([("a", "a"), ("b", "b"), ("tie", "tie"), ("b", "b")] * 20)
    deaf = [judged(("x0", "y0"), "b", "b", "deaf", heard=0.0)]
    pairs, tallies = pairs_of(*good, *deaf, min_alpha=0.9)
    assert tallies["factuality"] == tally(3 * 20, 20, 0)
    assert len(told(pairs)) == 3 * 20


@pytest.mark.parametrize(
    ("comparisons", "choices"), [(2, "ab"), (3, "ab"), (5, "ab"), (10, "ab"), (10, "abtn")]
)
def test_chance_passes_no_limit_however_few_comparisons_there_are(comparisons, choices):
    names = {"a": "a", "b": "b", "t": "tie", "n": "both_bad"}
    said = Counter()
    for seed in range(40):
        drawn = np.random.default_rng(seed).choice(list(choices), size=(comparisons, 2))
        try:
            pairs_of(*crowd([[names[choice] for choice in row] for row in drawn]), min_alpha=0.3)
            said["passes"] += 1
        except LowAgreement as error:
            said["undecided" if str(error).startswith("undecided whether annotators agree") else "low"] += 1
    assert said["passes"] == 0
    assert said["undecided"] > 0


@pytest.mark.parametrize(
    ("answers", "why"),
    [
        ([("a",), ("b",)], "no comparison was judged by two annotators who listened"),
        ([("a", "a"), ("a", "a")], "all answers to the 2 comparisons judged by two or more are the same"),
    ],
)
def test_undefined_agreement_is_refused_and_explained(answers, why):
    with pytest.raises(LowAgreement, match=why):
        pairs_of(*crowd(answers), min_alpha=0.0)


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


BOTH = {"factuality": 1.0, "behaviour": 0.5}
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


def test_evidence_weighs_the_axes():
    sure = pair("x", "y", "factuality").model_copy(update={"evidence": 0.9})
    unsure = pair("y", "x", "behaviour").model_copy(update={"evidence": 0.4})
    other = pair("u", "v", "factuality").model_copy(update={"evidence": 0.5})
    found = {(w.pair.chosen, w.pair.rejected): w.weight for w in weigh([sure, unsure, other], BOTH)}
    mean = (0.9 - 0.4 * 0.5 + 0.5) / 2
    assert found == pytest.approx({("x", "y"): 0.7 / mean, ("u", "v"): 0.5 / mean})


def test_equal_and_opposite_support_teaches_nothing():
    assert weigh(PAIRS[2:4], {"factuality": 1, "behaviour": 1}) == []


def scored(rewards, opponents="worst", margin=0.0, seed=0, prompt="p"):
    scores = [
        CompletionScore(id=f"c{i}", prompt_id=prompt, reward=reward, parts={})
        for i, reward in enumerate(rewards)
    ]
    prompts = {prompt: PROMPT.model_copy(update={"id": prompt})}
    pairs, tally = of_scores(scores, prompts, COMPLETIONS, opponents=opponents, margin=margin, seed=seed)
    return [(pair.chosen[-1], pair.rejected[-1]) for pair in pairs], tally


@pytest.mark.parametrize(
    ("rewards", "opponents", "margin", "expected"),
    [
        ([0.2, 1.0, 0.5, 0.1], "worst", 0.0, [("1", "3")]),
        ([0.2, 1.0, 0.5, 0.1], "all", 0.0, [(a, b) for a, b in ("12", "10", "13", "20", "23", "03")]),
        ([0.2, 1.0, 0.5, 0.1], "all", 0.5, [("1", "0"), ("1", "3")]),
        ([1.0, 1.0, 0.0, 0.0], "worst", 0.0, [("0", "3")]),  # of equals the first wins, the last loses
        ([1.0, 1.0, 0.0], "all", 0.0, [("0", "2"), ("1", "2")]),
        ([0.5, 0.5, 0.5], "worst", 0.0, []),
        ([0.5, 0.4, 0.3], "worst", 0.2, []),  # exactly the margin is a tie
        ([None, 0.4, 0.3], "worst", 0.0, [("1", "2")]),
        ([None, None, 0.3], "worst", 0.0, []),
    ],
)
def test_pairs_of_scores(rewards, opponents, margin, expected):
    pairs, tally = scored(rewards, opponents, margin)
    assert pairs == expected
    assert tally == ScoreTally(len(expected), int(not expected), rewards.count(None))


def test_a_random_opponent_is_worse_and_depends_on_seed_and_prompt_alone():
    rewards = [0.0, 1.0, 0.5, 1.0]
    drawn = {(seed, p): scored(rewards, "random", seed=seed, prompt=p)[0] for seed in range(20) for p in "pq"}
    assert {pair for pairs in drawn.values() for pair in pairs} == {("1", "0"), ("1", "2")}
    assert drawn[(3, "p")] == scored(rewards, "random", seed=3, prompt="p")[0]
    assert any(drawn[(seed, "p")] != drawn[(seed, "q")] for seed in range(20))


def test_a_rewards_pairs_count_once_each_whatever_the_objective():
    pairs, _ = of_scores(
        [CompletionScore(id=f"c{i}", prompt_id="p", reward=float(i), parts={}) for i in range(3)],
        {"p": PROMPT},
        COMPLETIONS,
        opponents="all",
        margin=0.0,
        seed=0,
    )
    assert [weight for _, weight in weigh(pairs, {"factuality": 0.0, "behaviour": 0.5})] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("token", ["<|im_end|>", "<|AUDIO|>", "<|0.40|>"])
def test_a_text_that_would_steer_the_model_is_left_out_by_id_and_the_votes_count(token):
    votes = [
        vote("c0", "c1", "a", annotator="r1", corrected=f"A dog.{token}\n<|im_start|>user"),
        vote("c0", "c1", "a", annotator="r2", corrected="A dog <| and |> a cat."),
        vote("c2", token, "a", annotator="r3", id="c2badr3"),
        vote("c0", token, "a", annotator="r4", purpose="gold", id="made for it"),
        review((token, A0), "a", purpose="correction", id="typed"),
    ]
    kept, refused = without_control_tokens(votes, {"p": PROMPT})
    assert [(item.id, item.code) for item in refused] == [
        ("c0c1r1", "control_token"),
        ("c2badr3", "control_token"),
        ("typed", "control_token"),
    ]
    assert refused[0].detail.startswith(f"the completion that r1 typed holds {token}")
    assert refused[1].detail.startswith(f"prompt p or a completion holds {token}")
    assert [item.id for item in kept] == ["c0c1r1", "c0c1r2", "made for it"]
    pairs, tallies = pairs_of(*kept, correction_weight=0.5)
    assert tallies["factuality"] == tally(1, 0, 0, corrected=2)
    assert all(token not in text for pair in pairs for text in (pair.chosen, pair.rejected))
    asked = PROMPT.model_copy(update={"question": f"What?{token}"})
    assert without_control_tokens(votes[1:2], {"p": asked})[0] == []

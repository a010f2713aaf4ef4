"""How far a model agrees with people: figures worked by hand, and what is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from preference_data.preferences import model_agreement
from preference_data.preferences.model_agreement import ModelDisagrees
from preference_data.schema import Judgement, Ranking


def judgement(comparison, who, ranks, *, kind="person", texts=None, **more):
    texts = texts or tuple("abcd"[: len(ranks)])
    ranking = Ranking(ranks=tuple(ranks))
    return Judgement(
        id=f"{comparison} {who}",
        comparison=comparison,
        prompt_id=comparison,
        completions=tuple(f"{comparison}-{text}" for text in texts),
        texts=texts,
        kind="choice" if len(ranks) == 2 else "ranking",
        annotator=who,
        annotator_kind=kind,
        **{"factuality": ranking, "behaviour": ranking, "heard": 1.0, **more},
    )


def by_model(comparison, ranks, **more):
    return judgement(comparison, "ear", ranks, kind="model", **more)


def wilson(hits, n):
    interval = stats.binomtest(hits, n).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def measured(judgements):
    return model_agreement.measure(judgements, "ear", min_heard=0.8)


FIRST, SECOND, TIE = (1, 2), (2, 1), (1, 1)


def test_a_majority_decides_ties_are_left_out_and_a_tie_of_the_model_is_no_agreement():
    judgements = [
        *(judgement("c1", who, ranks) for who, ranks in [("ann", FIRST), ("bo", FIRST), ("cy", SECOND)]),
        by_model("c1", FIRST),  # agrees with two of three
        *(judgement("c2", who, FIRST) for who in ("ann", "bo")),
        by_model("c2", SECOND),  # does not
        judgement("c3", "ann", SECOND),
        by_model("c3", TIE),  # a tie is no agreement
        *(judgement("c4", who, ranks) for who, ranks in [("ann", FIRST), ("bo", SECOND)]),
        by_model("c4", FIRST),  # one against one: no side
        *(judgement("c5", who, ranks) for who, ranks in [("ann", FIRST), ("bo", TIE)]),
        by_model("c5", FIRST),  # half is no majority
        judgement("c6", "ann", FIRST, heard=0.5),
        by_model("c6", SECOND),  # who has not listened does not count
        judgement("c7", "ann", FIRST, audio_unusable=True),
        by_model("c7", SECOND),
        by_model("c8", FIRST),  # nobody else
    ]
    found = measured(judgements)
    for agreement in (*found.axes.values(), found.overall):
        assert agreement.share.value == pytest.approx(1 / 3)
        assert agreement.share.n == 3
        assert (agreement.ties, agreement.gold) == (1 if agreement is not found.overall else 2, 0)
    low, high = wilson(1, 3)
    assert (found.overall.share.low, found.overall.share.high) == pytest.approx((low, high))
    assert (found.axes["factuality"].pairs, found.overall.pairs) == (3, 6)


def test_a_comparison_of_four_counts_once_by_the_share_of_its_pairs():
    """Six pairs; the model turns the last two round: five of six. Then a comparison of two: agrees."""
    found = measured(
        [
            judgement("c1", "ann", (1, 2, 3, 4)),
            by_model("c1", (1, 2, 4, 3)),
            judgement("c2", "ann", FIRST),
            by_model("c2", FIRST),
        ]
    )
    assert found.axes["factuality"].share.value == pytest.approx((5 / 6 + 1) / 2)
    assert (found.axes["factuality"].share.n, found.axes["factuality"].pairs) == (2, 7)


def test_all_bad_is_a_preference_for_neither():
    bad = Ranking(ranks=FIRST, all_bad=True)
    people = judgement("c1", "ann", FIRST)
    assert measured([people, by_model("c1", FIRST, factuality=bad)]).axes["factuality"].share.value == 0
    assert measured([judgement("c1", "ann", FIRST, factuality=bad), by_model("c1", FIRST)]).overall.pairs == 1


def test_sides_do_not_matter_and_the_same_text_is_not_compared():
    swapped = judgement("c1", "ann", SECOND, texts=("b", "a"))
    assert measured([swapped, by_model("c1", FIRST)]).overall.share.value == 1
    same = judgement("c1", "ann", FIRST, texts=("a", "a"))
    assert measured([same, by_model("c1", FIRST, texts=("a", "a"))]).overall.share is None


def test_gold_tells_about_factuality_alone_whatever_people_say_of_it():
    gold = {"purpose": "gold", "expected": Ranking(ranks=SECOND)}
    found = measured([judgement("g", "ann", FIRST, **gold), by_model("g", SECOND, **gold)])
    assert found.axes["factuality"].share.value == 1
    assert (found.axes["factuality"].gold, found.axes["factuality"].pairs) == (1, 1)
    assert found.axes["behaviour"].share is None
    undecided = {"purpose": "gold", "expected": Ranking(ranks=(1, 2, 2))}
    assert measured([by_model("g", (1, 3, 2), **undecided)]).axes["factuality"].pairs == 2


def test_the_share_of_simulated_annotators_counts_and_other_models_do_not():
    simulated = judgement("c1", "s", FIRST, kind="simulated")
    assert measured([simulated, by_model("c1", FIRST)]).overall.share.value == 1
    other = judgement("c1", "other", FIRST, kind="model")
    assert measured([other, by_model("c1", FIRST)]).overall.share is None


@given(st.lists(st.tuples(st.sampled_from([FIRST, SECOND, TIE]), st.sampled_from([FIRST, SECOND, TIE]))))
def test_the_interval_is_wilsons(both):
    judgements = []
    for number, (people, model) in enumerate(both):
        judgements += [judgement(f"c{number}", "ann", people), by_model(f"c{number}", model)]
    decided = [(people, model) for people, model in both if people != TIE]
    share = measured(judgements).overall.share
    if not decided:
        assert share is None
        return
    hits = sum(people == model for people, model in decided)
    low, high = wilson(hits, len(decided))
    assert (share.value, share.n) == (pytest.approx(hits / len(decided)), len(decided))
    assert (share.low, share.high) == (pytest.approx(low, abs=1e-6), pytest.approx(high, abs=1e-6))


def overlap(n, hits_factuality, hits_behaviour):
    made = []
    for i in range(n):
        axes = {
            "factuality": Ranking(ranks=FIRST if i < hits_factuality else SECOND),
            "behaviour": Ranking(ranks=FIRST if i < hits_behaviour else SECOND),
        }
        made += [judgement(f"c{i}", "ann", FIRST), by_model(f"c{i}", FIRST, **axes)]
    return made


def test_a_model_at_chance_is_refused_with_the_figure():
    with pytest.raises(ModelDisagrees) as caught:
        model_agreement.usable(overlap(40, 21, 19), bound=0.6, min_heard=0.8)
    text = str(caught.value)
    low, high = wilson(21, 40)
    assert "the model 'ear'" in text
    assert "factuality: it agrees with 0.525 of people's preferences and gold" in text
    assert f"(95 % interval {low:.3f} to {high:.3f}, n 40)" in text
    assert "behaviour: it agrees with 0.475" in text
    assert "lies at 0.6 or above" in text
    for step in ("people_share", "mend the judge", "exclude", "lower min_model_agreement"):
        assert step in text


def test_a_model_is_used_on_the_axes_on_which_it_agrees():
    """38 of 40: 0.835 to 0.986. 20 of 40: 0.352 to 0.648."""
    given = overlap(40, 38, 20)
    kept, left_out, _ = model_agreement.usable(given, bound=0.6, min_heard=0.8)
    assert left_out == {"factuality": 0, "behaviour": 40}
    assert len(kept) == 80
    assert all(item.factuality for item in kept)
    assert {item.annotator for item in kept if item.behaviour} == {"ann"}
    kept, left_out, _ = model_agreement.usable(given, bound=0, min_heard=0.8)
    assert kept == given
    assert left_out == {"factuality": 0, "behaviour": 0}


def test_high_agreement_of_few_is_not_enough_and_none_is_refused_too():
    """Five of five: the interval begins at 0.566; six of six at 0.610."""
    assert model_agreement.require(measured(overlap(6, 6, 6)), 0.6) == ("factuality", "behaviour")
    with pytest.raises(ModelDisagrees, match=r"agrees with 1\.000 .*0\.566 to 1\.000, n 5"):
        model_agreement.require(measured(overlap(5, 5, 5)), 0.6)
    alone = [by_model("c1", FIRST)]
    with pytest.raises(ModelDisagrees, match="nothing to compare it with"):
        model_agreement.usable(alone, bound=0.6, min_heard=0.8)
    assert model_agreement.usable(alone, bound=0, min_heard=0.8).judgements == alone
    people = [judgement("c1", "ann", FIRST)]
    assert model_agreement.usable(people, bound=0.6, min_heard=0.8).judgements == people


def test_who_is_excluded_neither_measures_nor_is_measured():
    """Bo guesses: with him the model disagrees, for there is no majority."""
    given = overlap(20, 20, 20)
    guesses = [judgement(f"c{i}", "bo", SECOND) for i in range(20)]
    with pytest.raises(ModelDisagrees, match="nothing to compare it with"):
        model_agreement.usable([*given, *guesses], bound=0.6, min_heard=0.8)
    assert model_agreement.usable([*given, *guesses], bound=0.6, min_heard=0.8, exclude=("bo",)).judgements
    bad = overlap(20, 0, 0)
    kept, _, _ = model_agreement.usable(bad, bound=0.6, min_heard=0.8, exclude=("ear",))
    assert kept == bad  # who is excluded is left out elsewhere


def test_biases_of_people():
    """Ann prefers the first, short text of c1 on both axes; the second, long one of c2 on factuality."""
    long = ("a", "bbb")
    given = [
        judgement("c1", "ann", FIRST, texts=long),
        judgement("c2", "ann", SECOND, texts=long, behaviour=Ranking(ranks=TIE)),
        judgement("c3", "ann", TIE),
        judgement("c4", "ann", FIRST, heard=0.1),
        by_model("c5", FIRST),
    ]
    found = model_agreement.biases_of_people(given, min_heard=0.8)
    assert (found.first_place.value, found.first_place.n) == (0.5, 2)
    assert (found.longer.value, found.longer.n) == (0.5, 2)
    assert found.flips is None


def both(ranks_as_shown, ranks_turned):
    return tuple(
        dict.fromkeys(("factuality", "behaviour"), Ranking(ranks=r)) for r in (ranks_as_shown, ranks_turned)
    )


def test_biases_of_a_model():
    """c1 flips to the first place, c2 to the last, c3 stands; own completions win one of two."""
    replies = [both(FIRST, SECOND), both(FIRST, SECOND), both(SECOND, FIRST), both(FIRST, FIRST)]
    given = [
        by_model("c1", FIRST, texts=("a", "bbb")),
        by_model("c2", FIRST, texts=("ccc", "d")),
        by_model("c3", FIRST),
    ]
    policies = {"c1-a": "ear", "c1-bbb": "x", "c2-ccc": "x", "c2-d": "ear", "c3-a": "x"}
    found = model_agreement.biases_of_model(given, replies, policies=policies, own={"ear"})
    assert (found.flips.value, found.flips.n) == (0.75, 4)
    assert (found.first_place.value, found.first_place.n) == (pytest.approx(2 / 3), 3)
    assert (found.longer.value, found.longer.n) == (0.5, 2)
    assert (found.own.value, found.own.n) == (0.5, 2)
    assert model_agreement.biases_of_model([], [], policies={}, own=set()).own is None

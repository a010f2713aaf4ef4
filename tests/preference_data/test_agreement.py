"""Measures of agreement on worked cases and on answers whose truth is known."""

import krippendorff
import numpy as np
import pytest

from preference_data.preferences import agreement, votes
from preference_data.preferences.agreement import first_place, gold_accuracy, seconds, self_consistency
from preference_data.schema import Ranking
from tests.preference_data.votes import judged

CHOICES = ("a", "b", "tie", "both_bad")


def answer(comparison, annotator, factuality, behaviour=None, texts="xy", **more):
    named = {"id": f"{comparison} {annotator}", "comparison": comparison, "heard": None}
    return judged(texts, factuality, behaviour, annotator, **named | more)


def alpha(given, axis, seed=0):
    return agreement.alpha(votes.tabulate(given, axis), seed=seed)


def rise_without(given, axis, annotator):
    return agreement.rise_without(votes.tabulate(given, axis), annotator)


def table(rows):
    """One row per comparison, one column per annotator; None where one did not judge."""
    return [
        answer(f"u{i}", f"r{j}", choice)
        for i, row in enumerate(rows)
        for j, choice in enumerate(row)
        if choice is not None
    ]


def drawn(rng, n, raters, error):
    """Annotators that see the truth but guess in a share `error` of their answers."""
    truth = rng.integers(4, size=(n, 1))
    guesses = rng.random((n, raters)) < error
    return np.where(guesses, rng.integers(4, size=(n, raters)), truth)


def test_four_observers_with_missing_data_as_krippendorff_published_them():
    # "Computing Krippendorff's Alpha-Reliability" (2011), section C: twelve units, five values, alpha 0.743.
    # Five values are one more than annotators can choose from, so the counts are given directly.
    observers = (
        [1, 2, 3, 3, 2, 1, 4, 1, 2, 0, 0, 0],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, 0, 3],
        [0, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, 0],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, 0],
    )
    counts = np.array([[unit.count(v) for v in range(1, 6)] for unit in zip(*observers, strict=True)], float)
    matching, chosen = agreement._coincidences(counts)
    assert chosen.sum() == 40  # the unit judged once counts for nothing
    assert agreement._alpha(matching.sum(), chosen.sum(axis=0)) == pytest.approx(0.743, abs=5e-4)


def test_two_observers_as_krippendorff_published_them():
    # Same article, section A, binary data of two observers (Meg and Owen), ten units: alpha = 0.095.
    meg = [0, 1, 0, 0, 0, 0, 0, 0, 1, 0]
    owen = [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]
    found = alpha(table([("ab"[m], "ab"[o]) for m, o in zip(meg, owen, strict=True)]), "factuality")
    assert found.value == pytest.approx(0.095, abs=5e-4)
    assert found.low < found.value < found.high
    assert found.comparisons == 10


@pytest.mark.parametrize("seed", range(8))
def test_the_library_says_the_same_with_missing_answers(seed):
    rng = np.random.default_rng(seed)
    codes = drawn(rng, 60, 4, error=0.4).astype(float)
    codes[rng.random(codes.shape) < 0.5] = np.nan
    given = table([[None if np.isnan(c) else CHOICES[int(c)] for c in row] for row in codes])
    expected = krippendorff.alpha(reliability_data=codes.T, level_of_measurement="nominal")
    assert alpha(given, "factuality").value == pytest.approx(expected)


def test_a_worked_disagreement():
    # Coincidences over 4 units of 2: a-a 2, b-b 2, and 2 mixed units give 4; n=8, n_a=n_b=4.
    # Observed disagreement 4/8, expected 2*4*4/(8*7) = 32/56; alpha = 1 - (4/8)/(32/56) = 0.125.
    given = table([("a", "a"), ("b", "b"), ("a", "b"), ("b", "a")])
    assert alpha(given, "factuality").value == pytest.approx(0.125)


def test_full_agreement_is_one_and_certain_only_over_many_comparisons():
    rows = [("a", "a"), ("b", "b"), ("tie", "tie")]
    few, many = alpha(table(rows), "factuality"), alpha(table(rows * 100), "factuality")
    assert (few.value, few.high, many.value, many.high) == (1, 1, 1, 1)
    # Wilson of 3 in 3 is 1 / (1 + 1.96^2 / 3) = 0.438; by chance 6 answers, 2 of each, agree 6 times in 30.
    assert few.low == pytest.approx((1 / (1 + 1.96**2 / 3) - 0.2) / 0.8, abs=1e-4)
    assert 0.98 < many.low < 1


@pytest.mark.parametrize(
    ("rows", "comparisons"), [([], 0), ([("a",), ("b",)], 0), ([("a", "a"), ("a", "a")], 2)]
)
def test_undefined_is_none_not_one(rows, comparisons):
    assert alpha(table(rows), "factuality") == agreement.Alpha(None, None, None, comparisons)


def test_only_comparisons_tell_about_agreement():
    given = table([("a", "a"), ("b", "b"), ("a", "b"), ("b", "a")])
    gold = [answer("g", f"r{i}", "a", purpose="gold", expected="a") for i in range(2)]
    again = [answer("again", f"r{i}", "b", purpose="retest", about="u0") for i in range(2)]
    assert votes.counted(given + gold + again, 0) == given


def test_the_interval_covers_the_truth_nineteen_times_in_twenty():
    # Two annotators who guess in 40 % of answers agree for sure in 0.6 * 0.6 = 0.36 of comparisons beyond
    # chance, so alpha is 0.36. Of 200 intervals 190 should cover it; 180 is three standard errors below.
    covered = 0
    for seed in range(200):
        codes = drawn(np.random.default_rng(seed), 120, 2, error=0.4)
        found = alpha(table([[CHOICES[c] for c in row] for row in codes]), "factuality", seed=seed)
        covered += found.low <= 0.36 <= found.high
    assert 180 <= covered <= 199


def test_the_seed_fixes_the_interval():
    given = table([[CHOICES[c] for c in row] for row in drawn(np.random.default_rng(0), 50, 3, 0.5)])
    assert alpha(given, "factuality", seed=1) == alpha(given, "factuality", seed=1)
    assert alpha(given, "factuality", seed=1) != alpha(given, "factuality", seed=2)


def test_answers_by_lot_agree_by_chance():
    codes = np.random.default_rng(3).integers(4, size=(400, 2))
    found = alpha(table([[CHOICES[c] for c in row] for row in codes]), "factuality")
    assert found.low < 0 < found.high
    assert abs(found.value) < 0.1


def test_who_answers_by_lot_lowers_alpha_and_only_they_raise_it_by_leaving():
    rng = np.random.default_rng(4)
    codes = np.c_[drawn(rng, 150, 2, error=0.1), rng.integers(4, size=150)]
    given = table([[CHOICES[c] for c in row] for row in codes])
    odd, honest = (rise_without(given, "factuality", who) for who in ("r2", "r0"))
    assert odd.comparisons == honest.comparisons == 150
    assert odd.all < 0.5 < 0.7 < odd.without
    assert odd.p < 1e-6
    assert honest.without < honest.all
    assert honest.p > 0.9


def test_of_two_nobody_can_say_who_is_odd():
    assert rise_without(table([("a", "b"), ("b", "b")]), "factuality", "r0") is None


def test_retests_are_swapped_back_and_held_against_the_same_annotator():
    def retest(comparison, annotator, choice, **sides):
        of = f"again {comparison}"
        return answer(of, annotator, choice, purpose="retest", about=comparison, **sides)

    swapped = {"texts": "yx"}
    given = [
        *table([("a", "b"), ("tie", "a"), ("b", "a"), ("b", None)]),
        retest("u0", "r0", "b", **swapped),  # the same: A was on the other side
        retest("u1", "r0", "tie", **swapped),  # the same
        retest("u2", "r0", "b", **swapped),  # side B twice: another answer
        retest("u3", "r0", "b"),  # not swapped: the same
        retest("u3", "r1", "b"),  # never judged by them before: says nothing
    ]
    found = self_consistency(given, "factuality")
    assert (found.share.hits, found.share.n) == (3, 4)
    # Pairs a-a, tie-tie, b-a, b-b: n=8, a 3, b 3, tie 2; chance (3*2+3*2+2*1)/56 = 0.25;
    # (0.75 - 0.25) / 0.75 = 2/3.
    assert found.alpha == pytest.approx(2 / 3)
    assert self_consistency(table([("a", "b")]), "factuality") is None


def test_gold_is_about_factuality():
    def gold(i, choice, **more):
        return answer(f"g{i}", "r", choice, purpose="gold", expected="a", **more)

    found = gold_accuracy([gold(0, "a"), gold(1, "b"), gold(2, "tie"), gold(3, "a", behaviour="b")])
    assert (found.hits, found.n, found.value) == (2, 4, 0.5)
    # Wilson at 2 of 4: (0.5 + z²/8 ± z sqrt(1/16 + z²/64)) / (1 + z²/4) with z = 1.96: 0.150 to 0.850.
    assert (found.low, found.high) == pytest.approx((0.150, 0.850), abs=5e-4)
    assert gold_accuracy([gold(0, "b", audio_unusable=True)]) is None


def test_what_is_shown_first_among_clear_preferences():
    # 8 of 10 to the first: two-sided exact p = 2 * (45 + 10 + 1) / 1024.
    choices = ["a"] * 8 + ["b"] * 2 + ["tie", "both_bad"]
    found = first_place([answer(f"u{i}", "r", choice) for i, choice in enumerate(choices)], "factuality")
    assert (found.share.hits, found.share.n, found.expected) == (8, 10, 0.5)
    assert found.p == pytest.approx(112 / 1024)
    assert first_place([answer("u", "r", "tie")], "factuality") is None


def test_time_per_record():
    times = [None, *range(1, 12), 1000]  # 1 .. 11 s, and one very long
    found = seconds([answer(f"u{i}", "r", "a", seconds=s) for i, s in enumerate(times)])
    assert (found.n, found.median) == (12, 6.5)
    assert (found.p10, found.p90) == pytest.approx((2.1, 10.9))
    #   bins <2: 1 | <4: 2, 3 | <8: 4..7 | <16: 8..11 | ... | 256 and more: 1000
    assert found.histogram == (1, 2, 4, 4, 0, 0, 0, 0, 1)
    assert seconds([answer("u", "r", "a")]) is None


@pytest.mark.parametrize(
    ("heard", "min_heard", "counts"),
    [(0.8, 0.8, True), (0.79, 0.8, False), (None, 0.8, False), (None, 0, True)],
)
def test_unknown_is_not_heard(heard, min_heard, counts):
    assert bool(votes.counted([answer("u", "r", "a", heard=heard)], min_heard)) is counts


# ---------------------------------------------------------------- rankings


def test_a_ranking_is_a_vote_on_every_two_completions():
    table = votes.tabulate([answer("u", "r", "1322", texts="wxyz")], "factuality")
    said = dict(zip([votes.PLACE_PAIRS[pair] for pair in table.pair], table.value.tolist(), strict=True))
    assert said == {
        (0, 1): votes.FIRST, (0, 2): votes.FIRST, (0, 3): votes.FIRST,
        (1, 2): votes.SECOND, (1, 3): votes.SECOND, (2, 3): votes.TIE,
    }  # fmt: skip
    bad = votes.tabulate([answer("u", "r", "123!", texts="xyz")], "factuality")
    assert bad.value.tolist() == [votes.BOTH_BAD] * 3


def test_alpha_of_rankings_by_hand():
    # Two comparisons of three, two annotators. u0: 123 and 132: w-x, w-y first; x-y first and second.
    # u1: 312 and 312: second, second, first. Matching answers: 10 of 12; first 7, second 5.
    # Chance (7*6 + 5*4) / (12*11) = 62/132; alpha = (10/12 - 62/132) / (1 - 62/132) = 48/70.
    given = [
        answer("u0", "r0", "123", texts="wxy"),
        answer("u0", "r1", "132", texts="wxy"),
        answer("u1", "r0", "312", texts="stu"),
        answer("u1", "r1", "312", texts="stu"),
    ]
    found = alpha(given, "factuality")
    assert found.value == pytest.approx(48 / 70)
    assert found.comparisons == 2


def test_ten_rankings_of_four_are_ten_answers_and_not_sixty():
    """The pairs of a ranking depend on each other: the interval is as wide as that of ten."""
    rng = np.random.default_rng(0)
    given = []
    for i in range(10):
        right, turned = rng.permutation(4) + 1, rng.random() < 0.5
        other = 5 - right if turned else right  # all six pairs agree, or none
        given += [answer(f"u{i}", "r0", Ranking(ranks=tuple(right)), texts="wxyz")]
        given += [answer(f"u{i}", "r1", Ranking(ranks=tuple(other)), texts="wxyz")]
    found = alpha(given, "factuality")
    as_if = [
        answer(f"u{i} {pair}", who, "ab"[bool(item.factuality.prefers(pair[1], pair[0]))])
        for item in given
        for pair in votes.PLACE_PAIRS
        for who, i in [(item.annotator, item.comparison)]
    ]
    alone = alpha(as_if, "factuality")
    assert alone.value == pytest.approx(found.value)
    assert found.high - found.low > 1.8 * (alone.high - alone.low)


def test_a_retest_by_another_is_a_second_opinion_in_the_first_ones_order():
    first = [answer(f"u{i}", "r0", "ab"[i % 2], texts=(f"x{i}", f"y{i}")) for i in range(6)]
    again = [
        answer(f"again u{i}", "r1", "ba"[i % 2], texts=(f"y{i}", f"x{i}"), purpose="retest", about=f"u{i}")
        for i in range(6)
    ]
    assert alpha(votes.counted(first + again, 0), "factuality").value == 1
    own = [item.model_copy(update={"annotator": "r0"}) for item in again]
    assert alpha(votes.counted(first + own, 0), "factuality").comparisons == 0
    assert self_consistency(first + again, "factuality") is None
    found = self_consistency(first + own, "factuality")
    assert (found.share.hits, found.share.n, found.retests) == (6, 6, 6)


def test_a_retest_of_four_counts_every_two_and_is_as_certain_as_its_retests():
    first = answer("u", "r", "1234", texts="wxyz")
    again = answer("again", "r", "4231", texts="zyxw", purpose="retest", about="u")
    # again: z 4, y 2, x 3, w 1 -> w, y, x, z: of the order w, x, y, z only x and y have changed places
    found = self_consistency([first, again], "factuality")
    assert (found.share.hits, found.share.n, found.retests) == (5, 6, 1)
    assert (found.share.low, found.share.high) == tuple(map(float, agreement.wilson(5 / 6, 1)))


@pytest.mark.parametrize(
    ("said", "right"),
    [("1222", True), ("1342", True), ("1234", True), ("1123", False), ("2134", False), ("1234!", False)],
)
def test_gold_of_four_has_a_best_and_leaves_the_order_of_the_others_open(said, right):
    given = answer("g", "r", said, texts="wxyz", purpose="gold", expected="1222")
    assert gold_accuracy([given]).hits == right


def test_gold_where_all_are_bad():
    def hits(said):
        item = answer("g", "r", said, texts="wxy", purpose="gold", expected="111!")
        return gold_accuracy([item]).hits

    assert (hits("123!"), hits("111")) == (1, 0)


def test_the_first_of_four_wins_one_time_in_four_by_lot():
    # 4 judgements of four with one winner, the first each time: p = 1 / 256. Of two winners nothing is said.
    given = [answer(f"u{i}", "r", "1234", texts="wxyz") for i in range(4)]
    given += [answer("v", "r", "1123", texts="wxyz"), answer("w", "r", "1234!", texts="wxyz")]
    found = first_place(given, "factuality")
    assert (found.share.hits, found.share.n, found.expected) == (4, 4, 0.25)
    assert found.p == pytest.approx(1 / 256)
    # One more of two, the second wins: 4 hits in 5 by (1 + 12) / 512, and 5 hits, 1 / 512, are less likely.
    mixed = first_place([*given, answer("z", "r", "b")], "factuality")
    assert mixed.p == pytest.approx(14 / 512)
    assert mixed.expected == pytest.approx((4 / 4 + 1 / 2) / 5)


def test_ratings_say_nothing_about_an_order():
    given = [answer(f"u{i}", f"r{i}", None, None, thumbs=(True, None)) for i in range(3)]
    assert alpha(given, "factuality") == agreement.Alpha(None, None, None, 0)
    assert first_place(given, "factuality") is None
    assert gold_accuracy([answer("g", "r", None, None, purpose="gold", expected="a")]) is None


def test_texts_of_another_data_set_are_refused_by_name():
    mixed = [answer("u", "r0", "a"), answer("v", "r1", "a", texts="pq", purpose="retest", about="u")]
    with pytest.raises(ValueError, match="judgement v r1 of r1 repeats comparison u, but has other texts"):
        alpha(mixed, "factuality")

"""Who is named by the quality report, and who is not."""

import json

import numpy as np
import pytest

from preference_data.preferences.quality import Quality, assess, metrics
from tests.preference_data.votes import judged as judgement

CHOICES = ("a", "b", "tie", "both_bad")
SWAPPED = {"a": "b", "b": "a", "tie": "tie", "both_bad": "both_bad"}


def honest(rng, truth):
    """Right, but for a tenth of the answers, which are guesses."""
    return CHOICES[rng.integers(4)] if rng.random() < 0.1 else truth


def always_a(rng, truth):
    return "a" if rng.random() < 0.97 else "b"


def guessing(rng, truth):
    return CHOICES[rng.integers(4)]


def judged(people, *, seed=0, n=240, **more):
    """Comparisons (half of them judged by all), a retest of each tenth, gold for all."""
    rng = np.random.default_rng(seed)
    made = []

    def ask(comparison, who, truth, **fields):
        manner = people[who]
        made.append(
            judgement(
                fields.pop("texts", (f"x{comparison}", f"y{comparison}")),
                manner(rng, truth[0]),
                manner(rng, truth[1]),
                who,
                **{"id": f"{comparison} {who}", "comparison": comparison, **more, **fields},
            )
        )

    for i in range(n):
        truth = [CHOICES[rng.choice(4, p=[0.35, 0.35, 0.2, 0.1])] for _ in range(2)]
        for who in people if i % 2 else [list(people)[i // 2 % len(people)]]:
            ask(f"u{i}", who, truth)
            if i % 10 < 2:
                back = [SWAPPED[choice] for choice in truth]
                texts = (f"yu{i}", f"xu{i}")
                ask(f"r{i}", who, back, purpose="retest", about=f"u{i}", texts=texts)
        if i % 12 == 0:
            gold = CHOICES[rng.integers(2)]
            for who in people:
                ask(f"g{i}", who, [gold, truth[1]], purpose="gold", expected=gold)
    return made


def report(people, **more):
    return assess(judged(people, **more), min_heard=0.8, seed=0)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("others", [1, 3])
def test_who_always_picks_a_is_named_and_the_honest_are_not(seed, others):
    people = {"lisa": always_a} | {f"honest-{i}": honest for i in range(others)}
    found = report(people, seed=seed)
    said = [remark for remark in found.remarks if remark.startswith("lisa prefers what is shown first in 9")]
    lean = found.annotators["lisa"].first_place["factuality"].share
    assert said[0] == (
        f"lisa prefers what is shown first in {100 * lean.value:.0f} % of {lean.n} clear answers about "
        "factuality (50 % expected)."
    )
    assert not any(remark.startswith("honest") for remark in found.remarks)


def test_who_always_picks_b_is_named_with_their_place():
    found = report({"bob": lambda rng, truth: SWAPPED[always_a(rng, truth)], "ann": honest})
    assert any(remark.startswith("bob prefers what is shown later in 9") for remark in found.remarks)


def test_honest_annotators_are_rarely_named():
    # One error level of 5 % is shared by all tests: of 30 reports on four honest annotators each (24 to 28
    # tests) 1 or 2 may name anybody; tested one by one it would be most. More than 5 has p < 0.01.
    reports = [report({f"r{i}": honest for i in range(4)}, seed=seed, n=80) for seed in range(30)]
    assert reports[0].tests >= 24
    assert sum(bool(found.remarks) for found in reports) <= 5


def test_who_guesses_fails_gold_and_contradicts_themselves_and_everybody():
    found = report({"gus": guessing, "ann": honest, "joe": honest}, n=480)
    said = " ".join(remark for remark in found.remarks if remark.startswith("gus"))
    for words in (
        "comparisons right whose answer is known",
        "contradicts their own judgement of factuality when the order is another",
        "judges behaviour unlike everybody else: alpha rises from 0.",
    ):
        assert words in said
    assert all(remark.startswith("gus") for remark in found.remarks)


def test_answers_by_lot_agree_no_better_than_chance():
    found = report({"r1": guessing, "r2": guessing})
    assert abs(found.alpha["factuality"].value) < 0.15
    assert found.remarks[0].startswith("Annotators agree on factuality no better than chance would: alpha ")


def test_without_overlap_agreement_is_unknown():
    found = report({"solo": honest})
    assert found.alpha["factuality"].value is None
    assert found.remarks == [
        f"Whether annotators agree on {axis} is unknown: no comparison has two answers that count."
        for axis in ("factuality", "behaviour")
    ]


def test_who_does_not_listen_is_named_and_does_not_count():
    given = judged({"ann": honest, "joe": honest, "deaf": honest}, n=60)
    mine = [one.id for one in given if one.annotator == "deaf"]
    heard = dict.fromkeys(mine[::2], 0.5) | dict.fromkeys(mine[1::4])
    given = [one.model_copy(update={"heard": heard.get(one.id, 1.0)}) for one in given]
    found = assess(given, min_heard=0.8, seed=0)
    not_heard, unknown = len(mine[::2]) + len(mine[1::4]), len(mine[1::4])
    assert found.remarks == [
        f"deaf submitted {100 * not_heard / len(mine):.0f} % of {len(mine)} answers without having played "
        f"80 % of the clip (of {unknown} it is not known): these do not count."
    ]
    counted = [one for one in given if one.annotator != "deaf"]
    only_heard = [one for one in given if one.heard == 1.0 and one.purpose != "retest"]
    assert found.alpha == assess(only_heard, min_heard=0.8, seed=0).alpha
    assert found.alpha != assess(counted, min_heard=0.8, seed=0).alpha


def test_who_is_faster_than_the_clip_is_named():
    given = judged({"ann": honest, "joe": honest}, n=60, seconds=9.0)
    assert assess(given, min_heard=0.8, seed=0, clip_seconds={"p": 11.0}).remarks == []  # 8.8 s to hear
    slow = [one.annotator == "ann" for one in given]
    given = [one.model_copy(update={"seconds": 30.0}) if is_slow else one
             for one, is_slow in zip(given, slow, strict=True)]  # fmt: skip
    found = assess(given, min_heard=0.8, seed=0, clip_seconds={"p": 12.0})  # 9.6 s to hear
    n = found.annotators["joe"].n
    assert found.remarks == [
        f"joe gave 100 % of {n} timed answers faster than 80 % of the clip can be played."
    ]
    assert assess(given, min_heard=0.8, seed=0).remarks == []  # clips of unknown length


def test_the_report_is_json_and_comes_back():
    found = report({"ann": honest, "joe": always_a}, n=60)
    assert Quality.model_validate_json(found.model_dump_json()) == found
    told = json.loads(found.model_dump_json())
    assert set(told["alpha"]["factuality"]) == {"value", "low", "high", "comparisons"}


def test_metrics_are_flat_numbers_with_names_that_mlflow_takes():
    found = report({"ann": honest, "günter o'neil": honest}, n=60, seconds=12.0)
    flat = metrics(found)
    assert {
        "alpha_factuality", "alpha_factuality_low", "alpha_factuality_high", "alpha_behaviour",
        "gold_accuracy", "self_consistency_factuality", "first_place_factuality", "first_place_behaviour",
        "unheard", "seconds_median",
    } <= flat.keys()  # fmt: skip
    assert flat["seconds_median"] == 12.0
    assert flat["unheard"] == 0
    assert flat["alpha_behaviour"] == found.alpha["behaviour"].value
    assert flat["answers"] == found.overall.n
    assert all(isinstance(value, float) and name.isascii() for name, value in flat.items())


def test_who_annotates_decides_no_name_of_a_metric():
    """Names are personal, and no two runs could be compared by them."""
    assert (
        metrics(report({"ann": honest, "joe": honest}, n=60)).keys()
        == metrics(report({"günter o'neil": honest, "joe": honest}, n=60)).keys()
    )


def test_what_was_not_measured_is_left_out():
    empty = assess([], min_heard=0.8, seed=0)
    assert metrics(empty) == {
        "annotators": 0, "answers": 0, "unusable": 0, "corrected": 0,
        "alpha_factuality_comparisons": 0, "alpha_behaviour_comparisons": 0,
    }  # fmt: skip


def test_rankings_of_four_are_measured_and_the_order_they_are_shown_in_is_found_out():
    """Ann and Joe rank by quality; Lisa by place. Retests and gold are of four too."""
    rng = np.random.default_rng(0)
    made = []
    for i in range(60):
        quality = rng.permutation(4)
        for who in ("ann", "joe", "lisa"):
            orders = {"comparison": range(4), "retest": rng.permutation(4), "gold": range(4)}
            for purpose, order in orders.items():
                best = sorted(range(4), key=lambda place: place if who == "lisa" else -quality[order[place]])
                ranks = tuple(best.index(place) + 1 for place in range(4))
                texts = tuple(f"{i} {place}" for place in order)
                said = "".join(map(str, ranks))
                more = {"about": f"u{i}"} if purpose == "retest" else {}
                if purpose == "gold":
                    more["expected"] = "".join("1" if level == 3 else "2" for level in quality)
                name = f"{purpose[0]}{i}" if purpose != "comparison" else f"u{i}"
                named = {"comparison": name, "id": f"{name} {who}", "purpose": purpose}
                made.append(judgement(texts, said, said, who, **named, **more))
    found = assess(made, min_heard=0.8, seed=0)
    assert found.annotators["ann"].gold.value == 1
    same = {who: measured.same["factuality"] for who, measured in found.annotators.items()}
    assert (same["ann"].share.hits, same["ann"].share.n, same["ann"].retests) == (360, 360, 60)
    assert 0.4 < same["lisa"].share.value < 0.6  # two orders by lot agree on half of the pairs
    assert found.annotators["lisa"].first_place["factuality"].expected == 0.25
    assert found.alpha["factuality"].comparisons == 60
    said = [remark for remark in found.remarks if "factuality" in remark or "known" in remark]
    assert all(remark.startswith("lisa") for remark in said)
    assert said[0] == (
        "lisa prefers what is shown first in 100 % of 60 clear answers about factuality (25 % expected)."
    )
    assert any("judges factuality unlike everybody else" in remark for remark in said)

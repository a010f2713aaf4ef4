"""Two policies' ratings side by side: differences, wins, lengths, order effects, people, leagues."""

import json
import time

import numpy as np
import pytest

from align.evaluation import comparison
from align.evaluation.benchmarks.air_bench import CATEGORIES, Item
from align.evaluation.judges.agreement import judge_agreement, measure, scores_of
from align.evaluation.judges.ratings import OrderReply, Rating
from preference_data.schema import Comparison, Judgement, Prompt


def items_of(*tasks, questions_per_clip=1):
    return [
        Item(str(i), f"{i // questions_per_clip}.wav", "q", "a", "m", task, "made")
        for i, task in enumerate(tasks)
    ]


def rated(scores, state="scored"):
    return [
        Rating(str(i), state if score is not None else "invalid", score, 8.0, ())
        for i, score in enumerate(scores)
    ]


FOUR = items_of(
    "speech_QA", "speech_QA", "sound_QA", "sound_QA", "speech_and_music_QA", "speech_and_music_QA"
)


def test_differences_are_weighted_like_the_table():
    # speech +1, sound -1, mixed +3: overall (1 - 1 + 3) / 3 = 1.
    found = comparison.differences(
        comparison.pair(FOUR, rated([5.0, 5, 6, 6, 1, 1]), rated([6.0, 6, 5, 5, 4, 4]))
    )
    assert {name: one.delta for name, one in found.items()} == pytest.approx(
        {"speech": 1, "sound": -1, "mixed": 3, "overall": 1}
    )
    assert (found["overall"].n, found["mixed"].n) == (6, 2)


def test_only_items_scored_for_both_are_paired_and_the_worst_case_has_all():
    before, after = rated([5.0, None, 6, 6, 1, 1]), rated([6.0, 6, None, 5, 4, 4])[:5]
    complete = comparison.pair(FOUR, before, after)
    assert [item.uniq_id for item in complete.items] == ["0", "3", "4"]
    assert complete.left_out == 3
    worst = comparison.worst_case(FOUR, before, after)
    assert worst.before.tolist() == [5, 1, 6, 6, 1, 1]
    assert worst.after.tolist() == [6, 6, 1, 5, 4, 1]


def test_wins_ties_and_losses_with_a_margin():
    before = rated([5.0, 5, 5, 5, 5, 5])
    found = comparison.win_rates(comparison.pair(FOUR, before, rated([5.5, 4.5, 6, 6, 3, 5])))
    assert found["speech"][:4] == (0, 2, 0, 0.5)
    assert found["sound"][:4] == (2, 0, 0, 1)
    assert found["overall"][:4] == (2, 3, 1, pytest.approx(3.5 / 6))
    strict = comparison.win_rates(
        comparison.pair(FOUR, before, rated([5.5, 4.5, 6, 6, 3, 5])), tie_margin=0.0
    )
    assert strict["overall"][:3] == (3, 1, 2)


def simulated(n, gain, seed, per_clip=2):
    """Scores 1..10 of two policies; clips are hard or easy for both, and gain more or less."""
    rng = np.random.default_rng(seed)
    tasks = sorted(list(CATEGORIES) * (n // len(CATEGORIES)))
    items = items_of(*tasks, questions_per_clip=per_clip)
    clip = np.arange(len(items)) // per_clip
    level = rng.normal(6, 1.5, len(items))[clip] + rng.normal(0, 1, len(items))
    shift = gain + rng.normal(0, 0.7, len(items))[clip]
    sides = [level + rng.normal(0, 1, len(items)), level + shift + rng.normal(0, 1, len(items))]
    first, second = (rated(np.clip(np.round(side * 2) / 2, 1, 10).tolist()) for side in sides)
    return items, first, second


def test_a_full_benchmark_is_compared_in_seconds_and_the_win_is_found():
    items, before, after = simulated(2200, 0.4, seed=1)
    texts = {item.uniq_id: "word " * (int(item.uniq_id) % 7) for item in items}
    started = time.monotonic()
    found = comparison.compare(items, before, after, texts, texts)
    assert time.monotonic() - started < 5
    overall = found["differences"]["overall"]
    assert overall["ci_low"] > 0.2
    assert overall["ci_high"] - overall["ci_low"] < 0.35
    assert found["wins"]["overall"]["ci_low"] > 0.5
    # Texts of equal length: nothing to control, so the rate is the plain one but for its one added tie.
    assert found["length_controlled"]["share"] == pytest.approx(found["wins"]["overall"]["rate"], abs=1e-3)
    json.dumps(found, allow_nan=False)


def test_a_policy_against_itself_wins_nothing_and_is_not_inferior():
    items, before, _ = simulated(200, 0.0, seed=2)
    texts = {item.uniq_id: "x" for item in items}
    found = comparison.compare(items, before, before, texts, texts)
    for one in found["differences"].values():
        assert (one["delta"], one["ci_low"], one["ci_high"], one["p"]) == (0, 0, 0, 1)
    assert found["wins"]["overall"]["rate"] == 0.5
    assert found["length_controlled"]["share"] == 0.5


def test_equal_policies_of_different_seeds_claim_no_win():
    """A/A: two noisy judgings of one policy. At 95 %, few of 200 may seem a win."""
    wins = safe = 0
    for seed in range(200):
        items, before, after = simulated(320, 0.0, seed)
        found = comparison.differences(comparison.pair(items, before, after), resamples=500, seed=seed)
        wins += found["overall"].is_better
        safe += found["overall"].is_non_inferior(0.5)
    assert wins <= 10  # 2.5 % of 200 is 5
    assert safe == 200


def test_longer_answers_do_not_win_by_length():
    # The judge prefers the longer answer nine times in ten; the second policy's is longer eight times in ten.
    rng = np.random.default_rng(3)
    items = items_of(*["sound_QA"] * 1000)
    longer = rng.random(1000) < 0.8
    wins = rng.random(1000) < np.where(longer, 0.9, 0.1)
    before, after = rated([5.0] * 1000), rated(np.where(wins, 7.0, 3.0).tolist())
    sides = [
        {
            item.uniq_id: "x" * (20 if long == of_before else 40)
            for item, long in zip(items, longer, strict=True)
        }
        for of_before in (True, False)
    ]
    paired = comparison.pair(items, before, after)
    assert comparison.win_rates(paired)["overall"].rate == pytest.approx(0.74, abs=0.03)
    controlled = comparison.length_controlled_win_rate(paired, *sides)
    assert controlled.ci_low < 0.5 < controlled.ci_high


def both(uniq_id, reference_first, response_first):
    """Each order as (reference, response)."""
    replies = tuple(
        OrderReply(order, *scores, "scored", "", "stop", 1, 1)
        for order, scores in (("reference_first", reference_first), ("response_first", response_first))
    )
    return Rating(uniq_id, "scored", 0.0, 0.0, replies)


def test_order_consistency_by_hand():
    found = comparison.order_consistency(
        [
            both(
                "0", (8, 6), (7, 6)
            ),  # reference better twice; reference gains 1 by standing first, response 0
            both("1", (8, 6), (6, 8)),  # whoever stands first is better: gains 2 and 2
            both("2", (7, 7), (7, 7)),
            Rating("3", "invalid", None, None, ()),
        ]
    )
    assert found.same_preference.n == 3
    assert found.same_preference.share == pytest.approx(2 / 3)
    assert found.first_place_gain == pytest.approx((0.5 + 2 + 0) / 3)
    assert comparison.order_consistency([]) == ((None, None, None, 0), None)


def annotation(a, b, factuality, annotator="x", **more):
    return Judgement(
        id=f"{a}{b}{annotator}{more}",
        comparison=more.pop("comparison", "s"),
        prompt_id="p",
        completion_a=a,
        completion_b=b,
        annotator=annotator,
        factuality=factuality,
        behaviour="tie",
        **more,
    )


def compared(a, text_a, b, text_b):
    return Comparison(
        id=a + b, prompt_id="p", completion_a=a, completion_b=b, text_a=text_a, text_b=text_b, everyone=True
    )


def test_the_judge_is_held_against_the_majority_of_people():
    annotations = [
        annotation("c1", "c2", "a", "x"),
        annotation("c2", "c1", "b", "y"),  # the same answers, sides swapped: both prefer c1
        annotation("c3", "c4", "b", "x"),  # people c4, judge c3
        annotation("c5", "c6", "tie", "x"),
        annotation("c7", "c8", "a", "x"),
        annotation("c7", "c8", "b", "y"),  # split
        annotation("c1", "c3", "a", "x"),  # the judge ties
        annotation("c1", "c9", "a", "x"),  # not scored
        annotation("c2", "c3", "a", "x", purpose="gold", expected="a"),
        annotation("c2", "c4", "a", "x", audio_unusable=True),
    ]
    scores = {"c1": 8.0, "c2": 5.0, "c3": 8.0, "c4": 3.0, "c7": 1.0, "c8": 2.0}
    found = judge_agreement(annotations, scores, "factuality")
    assert found.agreement.share == pytest.approx(1 / 3)
    assert found.agreement.n == 3
    assert (found.judge_ties, found.undecided, found.unscored) == (1, 2, 1)
    assert judge_agreement(annotations, scores, "behaviour").agreement == (None, None, None, 0)


def test_scores_join_completions_by_what_they_say():
    comparisons = [compared("c0", "a dog", "c1", "a cat"), compared("c2", "a dog", "c1", "a cat")]
    assert scores_of(comparisons, {("p", "a dog"): 7.0, ("q", "a cat"): 1.0}) == {"c0": 7.0, "c2": 7.0}


def test_a_judge_that_knows_how_sure_it_is_agrees_more_where_its_scores_differ_more():
    # Nine pairs that people decided for the first: margins +-1 (1 of 3 agrees), +-2 (2 of 3), 4 (3 of 3).
    margins = [1.0, -1.0, -1.0, 2.0, 2.0, -2.0, 4.0, 4.0, 4.0]
    annotations = [annotation(f"a{i}", f"b{i}", "a") for i in range(9)]
    scores = {f"a{i}": 5.0 + margin for i, margin in enumerate(margins)} | {f"b{i}": 5.0 for i in range(9)}
    parts = judge_agreement(annotations, scores, "factuality").calibration
    assert [(part.low, part.high) for part in parts] == [(1, 1), (2, 2), (4, 4)]
    assert [part.agreement.share for part in parts] == pytest.approx([1 / 3, 2 / 3, 1])
    assert judge_agreement(annotations, {}, "factuality").calibration == ()


def test_annotated_answers_are_scored_once_each_and_joined_to_their_judgements():
    comparisons = [compared("c0", "a dog", "c1", "a cat"), compared("c2", "a cow", "c1", "a cat")]
    prompt = Prompt(
        id="p",
        audios=("audio/x.wav",),
        question="What?",
        answer_gt="a dog",
        meta_info="{}",
        task_name="sound_QA",
    )
    asked = []

    def points(items, responses):
        asked.extend(zip([item.question for item in items], responses, strict=True))
        length = [float(len(text)) if text != "a cow" else None for text in responses]
        likes_dogs = [float("dog" in text) for text in responses]
        return {"factuality": likes_dogs, "behaviour": length}

    judged = [
        annotation("c0", "c1", "a", comparison="c0c1"),
        annotation("c2", "c1", "a", comparison="c2c1"),
        annotation("c9", "c1", "b", comparison="of another draw"),
    ]
    found = measure(points, comparisons, judged, {"p": prompt})
    assert asked == [("What?", "a cat"), ("What?", "a cow"), ("What?", "a dog")]
    assert found["factuality"]["agreement"]["n"] == 2
    assert found["factuality"]["agreement"]["share"] == 0.5  # the cow is no dog, nor is the cat
    assert (found["factuality"]["judge_ties"], found["behaviour"]["undecided"]) == (1, 2)


def test_a_league_by_hand_and_its_order():
    # One beats the other in 30 of 40: with the prior of half a win each, ln(30.5 / 10.5) logits apart.
    items = items_of(*["sound_QA"] * 40)
    weak, strong = rated([5.0] * 40), rated([7.0] * 30 + [3.0] * 10)
    first, second = comparison.league(items, {"weak": weak, "strong": strong})
    assert (first.policy, second.policy) == ("strong", "weak")
    assert first.elo - second.elo == pytest.approx(400 / np.log(10) * np.log(30.5 / 10.5))
    assert first.elo + second.elo == pytest.approx(2000)
    assert first.ci_low < first.elo < first.ci_high
    assert first.ci_low > second.ci_high
    with pytest.raises(ValueError, match="a league needs two policies"):
        comparison.league(items, {"weak": weak})


def test_nothing_in_common_is_an_error():
    with pytest.raises(ValueError, match="none of the 6 items was scored for both"):
        comparison.compare(FOUR, rated([5.0]), [], {}, {})

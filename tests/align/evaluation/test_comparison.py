"""Two policies' answers side by side: differences, wins, lengths, order effects, people, leagues."""

import time

import numpy as np
import pytest

from align.evaluation import comparison
from align.evaluation.benchmarks.air_bench import CATEGORIES, Item
from align.evaluation.judged_answers import JudgedAnswer, OrderReply
from align.evaluation.judges.agreement import judge_agreement, measure
from preference_data.schema import Comparison, Judgement, Prompt, Ranking


def items_of(*tasks, questions_per_clip=1):
    return [
        Item(str(i), f"{i // questions_per_clip}.wav", "q", "a", "m", task, "made")
        for i, task in enumerate(tasks)
    ]


def judged(items, scores, texts=None):
    return [
        JudgedAnswer.to(
            item,
            texts[item.uniq_id] if texts else "x",
            state="invalid" if score is None else "scored",
            score=score,
        )
        for item, score in zip(items, scores, strict=True)
    ]


FOUR = items_of(
    "speech_QA", "speech_QA", "sound_QA", "sound_QA", "speech_and_music_QA", "speech_and_music_QA"
)


def test_differences_are_weighted_like_the_table():
    # speech +1, sound -1, mixed +3: overall (1 - 1 + 3) / 3 = 1.
    before, after = judged(FOUR, [5.0, 5, 6, 6, 1, 1]), judged(FOUR, [6.0, 6, 5, 5, 4, 4])
    found = comparison.score_differences(comparison.pair_scores(before, after))
    assert {name: one.delta for name, one in found.items()} == pytest.approx(
        {"speech": 1, "sound": -1, "mixed": 3, "overall": 1}
    )
    assert (found["overall"].n, found["mixed"].n) == (6, 2)


def test_only_items_scored_for_both_are_paired_and_the_worst_case_has_all():
    before, after = judged(FOUR, [5.0, None, 6, 6, 1, 1]), judged(FOUR, [6.0, 6, None, 5, 4, None])
    complete = comparison.pair_scores(before, after)
    assert [answer.uniq_id for answer in complete.before_answers] == ["0", "3", "4"]
    assert complete.left_out == 3
    worst = comparison.worst_case(before, after)
    assert worst.before.tolist() == [5, 1, 6, 6, 1, 1]
    assert worst.after.tolist() == [6, 6, 1, 5, 4, 1]


def test_wins_ties_and_losses_with_a_margin():
    before, after = judged(FOUR, [5.0] * 6), judged(FOUR, [5.5, 4.5, 6, 6, 3, 5])
    pairs = comparison.pair_scores(before, after)
    found = comparison.win_rates(pairs)
    assert found["speech"][:4] == (0, 2, 0, 0.5)
    assert found["sound"][:4] == (2, 0, 0, 1)
    assert found["overall"][:4] == (2, 3, 1, pytest.approx(3.5 / 6))
    strict = comparison.win_rates(pairs, tie_margin=0.0)
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
    texts = {item.uniq_id: "word " * (int(item.uniq_id) % 7) for item in items}
    return [judged(items, np.clip(np.round(side * 2) / 2, 1, 10).tolist(), texts) for side in sides]


def test_a_full_benchmark_is_compared_in_seconds_and_the_win_is_found():
    before, after = simulated(2200, 0.4, seed=1)
    started = time.monotonic()
    found = comparison.compare(before, after)
    assert time.monotonic() - started < 5
    overall = found.scores["overall"]
    assert overall.ci_low > 0.2
    assert overall.ci_high - overall.ci_low < 0.35
    assert found.wins["overall"].ci_low > 0.5
    # Texts of equal length: nothing to control, so the rate is the plain one but for its one added tie.
    assert found.length_controlled.share == pytest.approx(found.wins["overall"].rate, abs=1e-3)
    assert list(found.scores) == list(found.wins) == ["overall", "speech", "sound", "music", "mixed"]


def test_a_policy_against_itself_wins_nothing_and_is_not_inferior():
    before, _ = simulated(200, 0.0, seed=2)
    found = comparison.compare(before, before)
    for row in found.scores.values():
        assert (row.delta, row.ci_low, row.ci_high, row.p) == (0, 0, 0, 1)
    assert found.wins["overall"].rate == 0.5
    assert found.length_controlled.share == 0.5


def test_equal_policies_of_different_seeds_claim_no_win():
    """A/A: two noisy judgings of one policy. At 95 %, few of 100 may seem a win."""
    wins = safe = 0
    for seed in range(100):
        pairs = comparison.pair_scores(*simulated(320, 0.0, seed))
        overall = comparison.score_differences(pairs, resamples=500, seed=seed)["overall"]
        wins += overall.ci_low > 0
        safe += overall.ci_low > -0.5
    assert wins <= 7  # 2.5 % of 100 is 2.5
    assert safe == 100


def test_answers_to_different_questions_are_never_set_side_by_side():
    before = judged(FOUR, [5.0] * 6)
    with pytest.raises(ValueError, match="answer 0: question '0' beside '5'"):
        comparison.pair_scores(before, before[::-1])


def test_the_stage_and_the_page_have_the_same_differences():
    before, after = simulated(320, 0.4, seed=4)
    page, stage = comparison.compare(before, after), comparison.differences(before, after)
    assert {name: row["score"] for name, row in stage.items()} == {
        name: (row.before, row.after, row.delta, row.ci_low, row.ci_high, row.n)
        for name, row in page.scores.items()
    }


def test_longer_answers_do_not_win_by_length():
    # The judge prefers the longer answer nine times in ten; the second policy's is longer eight times in ten.
    rng = np.random.default_rng(3)
    items = items_of(*["sound_QA"] * 1000)
    longer = rng.random(1000) < 0.8
    wins = rng.random(1000) < np.where(longer, 0.9, 0.1)
    sides = [
        {
            item.uniq_id: "x" * (20 if long == of_before else 40)
            for item, long in zip(items, longer, strict=True)
        }
        for of_before in (True, False)
    ]
    before = judged(items, [5.0] * 1000, sides[0])
    after = judged(items, np.where(wins, 7.0, 3.0).tolist(), sides[1])
    pairs = comparison.pair_scores(before, after)
    assert comparison.win_rates(pairs)["overall"].rate == pytest.approx(0.74, abs=0.03)
    controlled = comparison.length_controlled_win_rate(pairs)
    assert controlled.ci_low < 0.5 < controlled.ci_high


def both(uniq_id, reference_first, response_first):
    """Each order as (reference, response)."""
    replies = tuple(
        OrderReply(order, *scores, "scored", "", "stop", 1, 1)
        for order, scores in (("reference_first", reference_first), ("response_first", response_first))
    )
    return JudgedAnswer.to(FOUR[int(uniq_id)], "", score=0.0, reference_score=0.0, replies=replies)


def test_order_consistency_by_hand():
    found = comparison.order_consistency(
        [
            both(
                "0", (8, 6), (7, 6)
            ),  # reference better twice; reference gains 1 by standing first, response 0
            both("1", (8, 6), (6, 8)),  # whoever stands first is better: gains 2 and 2
            both("2", (7, 7), (7, 7)),
            JudgedAnswer.to(FOUR[3], "", state="invalid", score=None),
        ]
    )
    assert found.same_preference.n == 3
    assert found.same_preference.share == pytest.approx(2 / 3)
    assert found.first_place_gain == pytest.approx((0.5 + 2 + 0) / 3)
    assert comparison.order_consistency([]) is None


RANKS = {"a": (1, 2), "b": (2, 1), "tie": (1, 1)}


def annotation(a, b, factuality, annotator="x", **more):
    return Judgement(
        id=f"{a}{b}{annotator}{more}",
        comparison=more.pop("comparison", "s"),
        prompt_id="p",
        completions=(a, b),
        texts=(a, b),
        kind="choice",
        annotator=annotator,
        annotator_kind="person",
        factuality=Ranking(ranks=RANKS[factuality]),
        behaviour=Ranking(ranks=(1, 1)),
        **more,
    )


def scored(**scores):
    return {("p", text): score for text, score in scores.items()}


def compared(a, b):
    return Comparison(id=a + b, prompt_id="p", completions=(a, b), texts=(a, b), everyone=True)


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
        annotation("c2", "c3", "a", "x", purpose="gold", expected=Ranking(ranks=(1, 2))),
        annotation("c2", "c4", "a", "x", audio_unusable=True),
    ]
    scores = scored(c1=8.0, c2=5.0, c3=8.0, c4=3.0, c7=1.0, c8=2.0)
    found = judge_agreement(annotations, scores, "factuality")
    assert found.agreement.share == pytest.approx(1 / 3)
    assert found.agreement.n == 3
    assert (found.judge_ties, found.undecided, found.unscored) == (1, 2, 1)
    assert judge_agreement(annotations, scores, "behaviour").agreement == (None, None, None, 0)


def test_a_ranking_of_four_is_a_majority_on_each_of_its_pairs():
    ranking = annotation("c1", "c2", "a").model_copy(
        update={
            "completions": tuple("wxyz"),
            "texts": tuple("wxyz"),
            "factuality": Ranking(ranks=(1, 2, 2, 3)),
        }
    )
    # the judge agrees on w > x, w > z, x > z, y > z; not on w > y; x = y is no majority
    found = judge_agreement([ranking], scored(w=7, x=6, y=8, z=1), "factuality")
    assert (found.agreement.share, found.agreement.n, found.undecided) == (4 / 5, 5, 1)
    bad = ranking.model_copy(update={"factuality": Ranking(ranks=(1, 2, 2, 3), all_bad=True)})
    assert judge_agreement([bad], scored(w=7, x=6, y=8, z=1), "factuality").undecided == 6
    model = ranking.model_copy(update={"annotator_kind": "model"})
    assert judge_agreement([model], scored(w=7, x=6, y=8, z=1), "factuality").agreement.n == 0


def test_a_judge_that_knows_how_sure_it_is_agrees_more_where_its_scores_differ_more():
    # Nine pairs that people decided for the first: margins +-1 (1 of 3 agrees), +-2 (2 of 3), 4 (3 of 3).
    margins = [1.0, -1.0, -1.0, 2.0, 2.0, -2.0, 4.0, 4.0, 4.0]
    annotations = [annotation(f"a{i}", f"b{i}", "a") for i in range(9)]
    first = {f"a{i}": 5.0 + margin for i, margin in enumerate(margins)}
    scores = scored(**first, **{f"b{i}": 5.0 for i in range(9)})
    parts = judge_agreement(annotations, scores, "factuality").calibration
    assert [(part.low, part.high) for part in parts] == [(1, 1), (2, 2), (4, 4)]
    assert [part.agreement.share for part in parts] == pytest.approx([1 / 3, 2 / 3, 1])
    assert judge_agreement(annotations, {}, "factuality").calibration == ()


def test_annotated_answers_are_scored_once_each_and_joined_to_their_judgements():
    comparisons = [compared("a dog", "a cat"), compared("a cow", "a cat")]
    prompt = Prompt(
        id="p",
        audios=("audio/x.wav",),
        question="What?",
        answer_gt="a dog",
        meta_info="{}",
        task_name="sound_QA",
    )
    requests = []

    class LikesDogs:
        is_free = True

        def judge(self, items, responses, label="judge"):
            requests.extend(zip([item.question for item in items], responses, strict=True))
            return [
                JudgedAnswer.to(item, text, score=5.0, factual="dog" in text, behaves=None)
                if text != "a cow"
                else JudgedAnswer.to(item, text, state="invalid", score=None, factual=False)
                for item, text in zip(items, responses, strict=True)
            ]

    judgements = [
        annotation("a dog", "a cat", "a", comparison="a doga cat"),
        annotation("a cow", "a cat", "a", comparison="a cowa cat"),
        annotation("a hen", "a cat", "b", comparison="of another draw"),
    ]
    found = measure(LikesDogs(), comparisons, judgements, {"p": prompt}, "judged")
    assert requests == [("What?", "a cat"), ("What?", "a cow"), ("What?", "a dog")]
    assert found["factuality"]["agreement"]["n"] == 2
    assert found["factuality"]["agreement"]["share"] == 0.5  # the cow is no dog, nor is the cat
    assert (found["factuality"]["judge_ties"], found["behaviour"]["undecided"]) == (1, 2)


def test_a_league_by_hand_and_its_order():
    # One beats the other in 30 of 40: with the prior of half a win each, ln(30.5 / 10.5) logits apart.
    items = items_of(*["sound_QA"] * 40)
    weak, strong = judged(items, [5.0] * 40), judged(items, [7.0] * 30 + [3.0] * 10)
    first, second = comparison.league({"weak": weak, "strong": strong})
    assert (first.policy, second.policy) == ("strong", "weak")
    assert first.elo - second.elo == pytest.approx(400 / np.log(10) * np.log(30.5 / 10.5))
    assert first.elo + second.elo == pytest.approx(2000)
    assert first.ci_low < first.elo < first.ci_high
    assert first.ci_low > second.ci_high
    with pytest.raises(ValueError, match="a league needs two policies"):
        comparison.league({"weak": weak})
    assert comparison.league({"weak": weak, "mute": judged(items, [None] * 40)}) == []


def test_nothing_in_common_leaves_the_tables_empty_and_says_so():
    found = comparison.compare(judged(FOUR, [5.0] * 6), judged(FOUR, [None] * 6))
    assert (found.scores, found.wins, found.left_out) == ({}, {}, 6)
    assert found.worst_case["overall"].after == 1

"""From votes to pairs to weights, with the arithmetic in sight."""

from collections import Counter

import numpy as np
import pytest

from preference_data.preferences.pairs import (
    LowAgreement,
    ScoreTally,
    Tally,
    build,
    of_scores,
    weigh,
    without_control_tokens,
)
from preference_data.schema import Completion, CompletionScore, Judgement, PreferencePair, Prompt

PROMPT = Prompt(
    id="p", audios=("a.wav",), question="What?", answer_gt="A.", meta_info="{}", task_name="speech_QA"
)
COMPLETIONS = {
    f"c{i}": Completion(id=f"c{i}", prompt_id="p", index=i, text=f"answer {i}", policy="x") for i in range(4)
}


def vote(a, b, factuality, behaviour="tie", annotator="r1", **more):
    return Judgement(
        id=f"{a}{b}{annotator}",
        comparison=f"{a}-{b}",
        prompt_id="p",
        completion_a=a,
        completion_b=b,
        annotator=annotator,
        factuality=factuality,
        behaviour=behaviour,
        **{"heard": 1.0, **more},
    )


def pairs_of(*votes, min_agreement=0.75, min_heard=0.8, min_alpha=None):
    return build(
        votes,
        {"p": PROMPT},
        COMPLETIONS,
        min_agreement=min_agreement,
        min_heard=min_heard,
        min_alpha=min_alpha,
    )


def tally(pairs, ties, disagreements, unheard=0, unusable=0, corrected=0):
    return Tally(pairs, ties, disagreements, unheard, unusable, corrected)


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


def test_repeats_and_gold_are_not_votes():
    pairs, tallies = pairs_of(
        vote("c0", "c1", "a"),
        vote("c1", "c0", "a", purpose="retest", retest_of="c0-c1", corrected="better"),
        vote("g1", "g0", "a", purpose="gold", expected="a", corrected="better"),  # of no policy
    )
    assert told(pairs) == [("answer 0", "answer 1", 1.0)]
    assert tallies["factuality"] == tally(1, 0, 0)


def test_answers_without_listening_or_with_unusable_audio_are_dropped_and_counted():
    pairs, tallies = pairs_of(
        vote("c0", "c1", "a", annotator="r1"),
        vote("c0", "c1", "b", annotator="r2", heard=0.79, corrected="unheard"),
        vote("c0", "c1", "b", annotator="r3", heard=None),
        vote("c0", "c1", "b", annotator="r4", audio_unusable=True, corrected="unusable"),
        vote("c2", "c3", "b", annotator="r5", audio_unusable=True, heard=None),  # counted once
    )
    assert told(pairs) == [("answer 0", "answer 1", 1.0)]
    assert tallies["factuality"] == tally(1, 0, 0, unheard=2, unusable=2)
    assert tallies["behaviour"] == tally(0, 1, 0, unheard=2, unusable=2)


def test_min_heard_of_zero_takes_everything():
    assert told(pairs_of(vote("c0", "c1", "b", heard=None), min_heard=0)[0]) == [
        ("answer 1", "answer 0", 1.0)
    ]


def test_a_typed_answer_beats_both_on_both_axes():
    pairs, tallies = pairs_of(
        vote("c0", "c1", "a", annotator="r1"),
        vote("c0", "c1", "a", annotator="r2", corrected=" best \n"),
        vote("c0", "c1", "a", annotator="r3"),
        vote("c0", "c1", "a", annotator="r4", heard=0.1),
    )
    third = 1 / 3
    typed = [("best", "answer 0", third), ("best", "answer 1", third)]
    assert told(pairs) == [("answer 0", "answer 1", 1.0), *typed]
    assert told(pairs, "behaviour") == typed
    assert tallies == {
        "factuality": tally(1, 0, 0, unheard=1, corrected=2),
        "behaviour": tally(0, 1, 0, unheard=1, corrected=2),
    }
    assert len({p.id for p in pairs}) == len(pairs) == 5


def test_typed_twice_agrees_twice():
    votes = [vote("c0", "c1", "tie", annotator=f"r{i}", corrected="best" if i else None) for i in range(3)]
    assert told(pairs_of(*votes)[0]) == [("best", "answer 0", 2 / 3), ("best", "answer 1", 2 / 3)]


@pytest.mark.parametrize("typed", ["answer 1", " answer 1", "", "  "])
def test_no_answer_is_paired_with_itself(typed):
    pairs, tallies = pairs_of(vote("c0", "c1", "tie", corrected=typed))
    assert told(pairs) == ([("answer 1", "answer 0", 1.0)] if typed.strip() else [])
    assert tallies["factuality"].ties == 1


def test_two_completions_with_the_same_text_are_a_tie():
    same = {**COMPLETIONS, "c9": COMPLETIONS["c0"].model_copy(update={"id": "c9"})}
    pairs, tallies = build([vote("c0", "c9", "a")], {"p": PROMPT}, same, min_agreement=0.75, min_heard=0)
    assert pairs == []
    assert tallies["factuality"] == tally(0, 1, 0)


def test_a_typed_answer_adds_no_pair_twice():
    pairs, tallies = pairs_of(
        vote("c0", "c1", "a", corrected="answer 0"),  # voted already
        vote("c0", "c2", "tie", corrected="best"),
        vote("c0", "c3", "tie", corrected="best"),  # over c0 known already
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


def test_typed_answers_weigh_as_much_as_a_preference_on_all_axes():
    pairs, _ = pairs_of(vote("c0", "c1", "a", corrected="best"))
    found = weigh(pairs, {"factuality": 1, "behaviour": 0.5})
    weights = {(w.pair.chosen, w.pair.rejected): w.weight for w in found}
    mean = (1 + 1.5 + 1.5) / 3
    assert weights == pytest.approx(
        {
            ("answer 0", "answer 1"): 1 / mean,
            ("best", "answer 0"): 1.5 / mean,
            ("best", "answer 1"): 1.5 / mean,
        }
    )


def crowd(answers, **more):
    """Two annotators per comparison; `answers` has shape (comparisons, 2)."""
    return [
        vote("c0", "c1", choice, choice, annotator=f"r{j}", **more).model_copy(
            update={"comparison": f"u{i}", "id": f"u{i}{j}"}
        )
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
    deaf = [vote("c0", "c1", "b", "b", annotator="deaf", heard=0.0).model_copy(update={"comparison": "u0"})]
    pairs, _ = pairs_of(*good, *deaf, min_alpha=0.9)
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
        vote("c2", "bad", "a", annotator="r3"),
        vote("c0", "made for it", "a", annotator="r4", purpose="gold"),
    ]
    completions = {**COMPLETIONS, "bad": COMPLETIONS["c3"].model_copy(update={"id": "bad", "text": token})}
    kept, refused = without_control_tokens(votes, {"p": PROMPT}, completions)
    assert [(item.id, item.code) for item in refused] == [
        ("c0c1r1", "control_token"),
        ("c2badr3", "control_token"),
    ]
    assert refused[0].detail.startswith(f"the answer that r1 typed holds {token}")
    assert refused[1].detail.startswith(f"prompt p or an answer holds {token}")
    assert [item.id for item in kept] == ["c0c1r1", "c0c1r2", "c0made for itr4"]
    pairs, tallies = pairs_of(*kept)
    assert tallies["factuality"] == tally(1, 0, 0, corrected=2)
    assert all(token not in text for pair in pairs for text in (pair.chosen, pair.rejected))
    asked = PROMPT.model_copy(update={"question": f"What?{token}"})
    assert without_control_tokens(votes[1:2], {"p": asked}, completions)[0] == []

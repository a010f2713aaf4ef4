"""Which comparisons are selected: by hand, whatever the order, and without bias in the random share."""

from itertools import combinations
from math import sqrt

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preference_data.preferences.selection import NothingToRank, priorities, select
from preference_data.schema import Completion, CompletionScore

RULES = ("random", "disagreement", "uncertainty")


def made(rewards_and_logps, prompt_id="p"):
    """Completions c0, c1, ... of a prompt and their scores; each has two tokens."""
    completions, scores = {}, {}
    for i, (reward, mean_logp) in enumerate(rewards_and_logps):
        key = f"{prompt_id}c{i}"
        logp = None if mean_logp is None else 2 * mean_logp
        completions[key] = Completion(
            id=key, prompt_id=prompt_id, index=i, text=f"text {i}", policy="x", logp=logp, n_tokens=2
        )
        scores[key] = CompletionScore(id=key, prompt_id=prompt_id, reward=reward, parts={})
    return completions, scores


def test_values_by_hand():
    """Rewards 1, 0, 3 and log-probabilities per token -4, -1, -3."""
    completions, scores = made([(1.0, -4.0), (0.0, -1.0), (3.0, -3.0)])
    a, b, c = completions
    value = priorities([(a, b), (a, c), (b, c)], completions, scores, rule="disagreement", near_tie=0)
    # b is likelier than a and worse by 1, c than a and better by 2, b than c and worse by 3
    assert value == {(a, b): 1.0, (a, c): -2.0, (b, c): 3.0}
    value = priorities([(a, b), (a, c), (b, c)], completions, scores, rule="uncertainty", near_tie=0)
    assert value == {(a, b): -1.0, (a, c): -2.0, (b, c): -3.0}
    whole = {(a, b, c): 3.0}, {(a, b, c): -1.0}
    for rule, best in zip(RULES[1:], whole, strict=True):
        assert priorities([(a, b, c)], completions, scores, rule=rule, near_tie=0) == best
    assert priorities([(a, b)], completions, scores, rule="random", near_tie=0) == {}


def test_the_sum_of_log_probabilities_is_taken_per_token():
    """A short completion is likelier as a whole, and the long one is per token."""
    completions, scores = made([(0.0, None), (1.0, None)])
    a, b = completions
    completions[a] = completions[a].model_copy(update={"logp": -3.0, "n_tokens": 1})
    completions[b] = completions[b].model_copy(update={"logp": -8.0, "n_tokens": 8})
    value = priorities([(a, b)], completions, scores, rule="disagreement", near_tie=0)
    assert value == {(a, b): -1.0}  # policy and reward both prefer b


def test_near_ties_are_dropped_and_what_has_no_reward_too():
    completions, scores = made([(0.0, -1.0), (0.5, -2.0), (0.75, -3.0), (None, -4.0), (2.0, None)])
    a, b, c, unscored, unknown = completions
    candidates = list(combinations(completions, 2))
    for rule, with_logp in (("disagreement", {a, b, c}), ("uncertainty", {a, b, c, unknown})):
        value = priorities(candidates, completions, scores, rule=rule, near_tie=0.5)
        left = {pair for pair in candidates if {*pair} <= with_logp} - {(a, b), (b, c)}
        assert set(value) == left
    # three of which two are a near-tie: the others decide
    assert priorities([(a, b, c)], completions, scores, rule="uncertainty", near_tie=0.5) == {
        (a, b, c): -0.75
    }
    selected = select(
        candidates, completions, scores, n=10, rule="uncertainty", random_share=0, near_tie=0.5, seed=0
    )
    assert selected == dict.fromkeys([(a, c), (c, unknown), (b, unknown), (a, unknown)], "active")


def test_what_cannot_be_ranked_says_why():
    completions, scores = made([(0.0, None), (1.0, None)])
    more = {"near_tie": 0.0}
    assert priorities([tuple(completions)], completions, scores, rule="uncertainty", **more)
    with pytest.raises(NothingToRank, match="such as completions pc0, pc1, .* log-probability: sample again"):
        priorities([tuple(completions)], completions, scores, rule="disagreement", **more)
    with pytest.raises(NothingToRank, match="two completions with a reward: score"):
        priorities([tuple(completions)], completions, {}, rule="uncertainty", **more)
    assert priorities([], {}, {}, rule="disagreement", **more) == {}


numbers = st.integers(-3, 3).map(float)
groups = st.lists(
    st.lists(st.tuples(st.none() | numbers, st.none() | numbers), min_size=2, max_size=4),
    min_size=1,
    max_size=8,
)


def world(values, k):
    """Prompts p0, p1, ... and all candidates of up to k of their completions."""
    completions, scores, candidates = {}, {}, []
    for number, group in enumerate(values):
        own = made(group, f"p{number}")
        completions |= own[0]
        scores |= own[1]
        candidates += combinations(own[0], min(k, len(group)))
    return completions, scores, candidates


@settings(deadline=None)
@given(groups, st.integers(2, 4), st.sampled_from(RULES), st.integers(1, 30), st.floats(0, 1), st.randoms())
def test_the_selection_does_not_depend_on_any_order(values, k, rule, n, share, random):
    completions, scores, candidates = world(values, k)
    more = {"n": n, "rule": rule, "random_share": share, "near_tie": 0.5, "seed": 1}
    try:
        selected = select(candidates, completions, scores, **more)
    except NothingToRank:
        return
    shuffled = [tuple(random.sample(item, len(item))) for item in random.sample(candidates, len(candidates))]
    again = select(shuffled, completions, scores, **more)
    assert [(set(item), why) for item, why in again.items()] == [
        (set(item), why) for item, why in selected.items()
    ]
    places = min(n, len(candidates))
    by_lot = places if rule == "random" else round(share * places)
    assert list(selected.values()).count("random") == by_lot
    assert len(selected) <= places
    value = priorities(candidates, completions, scores, rule=rule, near_tie=0.5)
    active = [value[item] for item, why in selected.items() if why == "active"]
    assert active == sorted(active, reverse=True)
    rest = [value[item] for item in value if item not in selected]
    assert len(active) == places - by_lot or not rest  # places stay empty only when nothing is left
    assert not active or all(item <= active[-1] for item in rest)


@given(st.sampled_from(RULES[1:]), st.floats(0.01, 100), st.floats(0.01, 100))
def test_units_do_not_matter(rule, of_reward, of_logp):
    values = [(1.0, -4.0), (0.0, -1.0), (3.0, -3.0), (2.5, -0.5)]
    completions, scores, candidates = world([values], 2)
    other = world([[(of_reward * reward, of_logp * logp) for reward, logp in values]], 2)
    selected = [
        select(candidates, *records, n=3, rule=rule, random_share=0, near_tie=0, seed=0)
        for records in ((completions, scores), other[:2])
    ]
    assert list(selected[0]) == list(selected[1])


def test_the_random_share_is_a_sample_of_all_candidates():
    """Over seeds, the near-tie and the best candidate of the rule are drawn as often as any other."""
    values = [[(0.0, -1.0), (0.0, -2.0)], [(9.0, -9.0), (0.0, -1.0)]]
    values += [[(i / 10 + 1, -1.0), (0.0, -2.0)] for i in range(18)]
    completions, scores, candidates = world(values, 2)
    more = {"n": 10, "rule": "disagreement", "random_share": 0.3, "near_tie": 0.0}
    seeds = 2000
    drawn = dict.fromkeys(candidates, 0)
    for seed in range(seeds):
        selected = select(candidates, completions, scores, **more, seed=seed)
        assert selected.get(candidates[0]) in (None, "random")  # a near-tie is never asked for by the rule
        assert candidates[1] in selected
        for item, why in selected.items():
            drawn[item] += why == "random"
    expected = 3 / 20
    error = sqrt(expected * (1 - expected) / seeds)
    for count in drawn.values():
        assert abs(count / seeds - expected) < 4 * error


def test_more_places_keep_what_the_lot_has_drawn():
    completions, scores, candidates = world([[(1.0, -1.0), (2.0, -1.0), (3.0, -3.0), (4.0, -2.0)]] * 5, 2)
    more = {"rule": "uncertainty", "random_share": 0.5, "near_tie": 0.0, "seed": 3}
    few, many = (select(candidates, completions, scores, n=n, **more) for n in (8, 20))
    assert {item for item, why in few.items() if why == "random"} <= set(many)
    everything = select(candidates, completions, scores, n=None, **more)
    assert set(everything) == set(candidates)

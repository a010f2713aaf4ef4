"""Judgements and rewards to labels, by the stated rules."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preference_data.preferences.labels import Tally, of_judgements, of_scores
from preference_data.schema import CompletionScore
from tests.preference_data.test_pairs import COMPLETIONS, vote
from tests.preference_data.votes import PROMPT, counted, judged


def labels_of(*judgements, axis="factuality", min_agreement=0.75, **rules):
    return of_judgements(counted(judgements, **rules), {"p": PROMPT}, axis=axis, min_agreement=min_agreement)


def labelled(*judgements, **more):
    labels, tally = labels_of(*judgements, **more)
    return {label.completion[-1]: label.label for label in labels}, tally


@pytest.mark.parametrize(
    ("votes", "expected", "undecided"),
    [
        ([("c0", "c1", "a")], {"0": True, "1": False}, 0),
        ([("c0", "c1", "b")], {"0": False, "1": True}, 0),
        ([("c0", "c1", "both_bad")], {"0": False, "1": False}, 0),
        ([("c0", "c1", "tie")], {}, 0),
        ([("c0", "c1", "a"), ("c0", "c2", "a")], {"0": True, "1": False, "2": False}, 0),
        ([("c0", "c1", "a"), ("c0", "c2", "b")], {"1": False, "2": True}, 1),  # c0 is liked once of twice
        ([("c0", "c1", "a"), ("c0", "c2", "tie")], {"0": True, "1": False}, 0),
    ],
)
def test_labels_of_judgements(votes, expected, undecided):
    labels, tally = labelled(*[vote(*items) for items in votes])
    assert labels == expected
    good = sum(expected.values())
    assert tally == Tally(good, len(expected) - good, undecided)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("1234", {"a": True, "d": False}),  # the middle says nothing
        ("1123", {"d": False}),  # two in first place: neither is the best
        ("1222", {"a": True}),
        ("1111", {}),
        ("1234!", {"a": False, "b": False, "c": False, "d": False}),
    ],
)
def test_labels_of_a_ranking_of_four(said, expected):
    assert labelled(judged("abcd", said))[0] == expected


def test_thumbs_outweigh_places():
    ranked = [judged("abc", "123", annotator=f"r{i}") for i in range(3)]
    thumbs = judged("ab", None, annotator="r9", thumbs=(False, None))
    assert labelled(*ranked, thumbs)[0] == {"a": False, "c": False}
    own = judged("abc", "123!", thumbs=(True, None, None))  # good on its own, whatever the others are
    assert labelled(own)[0] == {"a": True, "b": False, "c": False}


def test_a_thumb_on_a_single_completion():
    assert labelled(judged("a", None, thumbs=(True,)))[0] == {"a": True}
    assert labelled(judged("a", "1"))[0] == {}  # the first and the last of one


def test_an_adjudicator_outweighs_all():
    split = [judged("ab", "a", thumbs=(True, True)), judged("ab", "b", annotator="r2")]
    about = {"purpose": "adjudication", "about": "a-b", "comparison": "again"}
    assert labelled(*split, judged("ab", "b", annotator="lead", **about))[0] == {"a": False, "b": True}


def test_labels_weigh_their_evidence():
    given = [judged("ab", "a", annotator=f"r{i}") for i in range(2)] + [judged("cd", "a")]
    labels, _ = labels_of(*given)
    # two that agree: 0.75, a lone one: 0.5; on average 0.625
    assert {item.completion: (item.judges, item.agreement, item.weight) for item in labels} == {
        "a": (2, 1.0, 1.2), "b": (2, 1.0, 1.2), "c": (1, 1.0, 0.8), "d": (1, 1.0, 0.8),
    }  # fmt: skip
    (label, *_) = labels_of(*[judged("ab", "aaab"[i], annotator=f"r{i}") for i in range(4)])[0]
    assert (label.judges, label.agreement) == (4, 0.75)


def test_an_annotator_counts_once():
    often = [judged("ab", "a"), judged("ac", "a"), judged("ad", "a"), judged("ab", "b", annotator="r2")]
    assert labelled(*often)[0] == {"c": False, "d": False}


def test_what_measures_annotators_or_was_not_heard_is_no_vote():
    gold = vote("c0", "c1", "a", purpose="gold")
    unheard = vote("c0", "c1", "a", annotator="r2", heard=0.5)
    unusable = vote("c0", "c1", "a", annotator="r3", audio_unusable=True)
    assert labelled(gold, unheard, unusable) == ({}, Tally(0, 0, 0))
    assert labelled(vote("c0", "c1", "a", "b"), axis="behaviour")[0] == {"0": False, "1": True}
    both = [vote("c0", "c1", "a"), vote("c2", "c3", "a", annotator="r2")]
    assert labelled(*both, exclude=("r2",))[0] == {"0": True, "1": False}


def test_a_label_asks_as_the_prompt_did():
    ((label,), _) = labels_of(judged(("answer 0", ""), "a"))  # of an empty text there is nothing to train on
    (message,) = label.prompt
    assert (message.role, [part.type for part in message.content]) == ("user", ["audio", "text"])
    assert message.content[1].text == PROMPT.question
    assert label.audios == PROMPT.audios
    assert label.source == "factuality"


@given(st.permutations(range(6)))
def test_the_order_of_judgements_does_not_matter(order):
    said = [("ab", "a"), ("ab", "b"), ("ac", "a"), ("bc", "both_bad"), ("abc", "213"), ("cd", "tie")]
    made = [judged(*each, annotator=f"r{i}") for i, each in enumerate(said)]
    assert labels_of(*[made[i] for i in order], min_agreement=0.6) == labels_of(*made, min_agreement=0.6)


def test_labels_of_scores():
    rewards = [1.0, 0.5, 0.2, None]
    scores = [
        CompletionScore(id=f"c{i}", prompt_id="p", reward=reward, parts={})
        for i, reward in enumerate(rewards)
    ]
    labels, tally = of_scores(scores, {"p": PROMPT}, COMPLETIONS, good_from=1.0, bad_to=0.2)
    assert {label.completion[-1]: label.label for label in labels} == {"0": True, "2": False}
    assert tally == Tally(1, 1, 1)


def test_the_same_text_is_labelled_once():
    same = COMPLETIONS | {"c1": COMPLETIONS["c1"].model_copy(update={"text": "answer 0"})}
    scores = [CompletionScore(id=f"c{i}", prompt_id="p", reward=1.0, parts={}) for i in range(2)]
    labels, tally = of_scores(scores, {"p": PROMPT}, same, good_from=1.0, bad_to=0.0)
    assert len(labels) == 1
    assert tally == Tally(1, 0, 0)

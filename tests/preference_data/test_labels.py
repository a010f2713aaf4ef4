"""Votes and rewards to labels, by the stated rules."""

import pytest

from preference_data.preferences.labels import Tally, of_judgements, of_scores
from preference_data.schema import CompletionScore
from tests.preference_data.test_pairs import COMPLETIONS, PROMPT, vote


def labelled(*votes, axis="factuality", min_agreement=0.75):
    labels, tally = of_judgements(
        votes, {"p": PROMPT}, COMPLETIONS, axis=axis, min_agreement=min_agreement, min_heard=0.8
    )
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


def test_what_measures_annotators_or_was_not_heard_is_no_vote():
    gold = vote("c0", "c1", "a", purpose="gold")
    unheard = vote("c0", "c1", "a", annotator="r2", heard=0.5)
    unusable = vote("c0", "c1", "a", annotator="r3", audio_unusable=True)
    assert labelled(gold, unheard, unusable) == ({}, Tally(0, 0, 0))
    assert labelled(vote("c0", "c1", "a", "b"), axis="behaviour")[0] == {"0": False, "1": True}


def test_a_label_asks_as_the_prompt_did():
    ((label,), _) = of_judgements(
        [vote("c0", "c1", "a")],
        {"p": PROMPT},
        COMPLETIONS | {"c1": COMPLETIONS["c1"].model_copy(update={"text": ""})},  # nothing to train on
        axis="factuality",
        min_agreement=0.75,
        min_heard=0.8,
    )
    (message,) = label.prompt
    assert (message.role, [part.type for part in message.content]) == ("user", ["audio", "text"])
    assert message.content[1].text == PROMPT.question
    assert label.audios == PROMPT.audios
    assert label.source == "factuality"


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

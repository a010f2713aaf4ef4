"""What is drawn: how many, who sees it, on which side; and that nothing sent away tells which is which."""

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preference_data.schema import Completion, Prompt
from ui_annotation.assignment import BadAnswer, draw, unblind
from ui_annotation.project import Project

WORDS = ["seven", "tiger", "river", "stone"]


def world(n=100):
    """Prompts that ask the same of clips with four different words, three different answers each."""
    prompts = {
        f"p{i}": Prompt(
            id=f"p{i}",
            audios=(f"{i}.wav",),
            question="Which word is spoken?",
            answer_gt=f"The speaker says {WORDS[i % 4]}.",
            meta_info="{}",
            task_name="speech_QA",
        )
        for i in range(n)
    }
    completions = [
        Completion(id=f"{name}-{j}", prompt_id=name, index=j, text=text, policy=f"policy-{j}")
        for name in prompts
        for j, text in enumerate(["good", "bad", "ugly", "good"])
    ]
    return completions, prompts


def drawn(n=100, **changed):
    options = {"per_prompt": 2, "overlap": 0.3, "retests": 0.1, "gold": 0.05, "seed": 0} | changed
    return draw(*world(n), **options)


def test_counts_are_the_shares_asked_for():
    everything = drawn()
    assert Counter(one.purpose for one in everything) == {"comparison": 200, "retest": 20, "gold": 10}
    comparisons = [one for one in everything if one.purpose == "comparison"]
    assert sum(one.everyone for one in comparisons) == 60
    assert all(one.everyone for one in everything if one.purpose != "comparison")
    assert set(Counter(one.prompt_id for one in comparisons).values()) == {2}
    assert all(one.text_a != one.text_b for one in everything)


def test_retests_have_their_sides_swapped():
    comparisons = {one.id: one for one in drawn()}
    for again in comparisons.values():
        if again.purpose == "retest":
            first = comparisons[again.retest_of]
            assert first.purpose == "comparison"
            assert (again.completion_a, again.text_a) == (first.completion_b, first.text_b)
            assert (again.completion_b, again.text_b) == (first.completion_a, first.text_a)


def test_without_overlap_retests_and_gold_go_to_one_annotator_each():
    comparisons = drawn(overlap=0.0)
    assert Counter(one.purpose for one in comparisons) == {"comparison": 200, "retest": 20, "gold": 10}
    assert not any(one.everyone for one in comparisons)


def test_gold_is_the_right_answer_against_the_right_answer_about_another_clip():
    _, prompts = world()
    gold = [one for one in drawn(gold=0.5) if one.purpose == "gold"]
    assert len(gold) == 100
    for one in gold:
        right, wrong = (one.text_a, one.text_b) if one.expected == "a" else (one.text_b, one.text_a)
        assert right == prompts[one.prompt_id].answer_gt
        assert wrong != right
        assert wrong in {other.answer_gt for other in prompts.values()}
    assert 30 <= sum(one.expected == "a" for one in gold) <= 70


def test_answers_that_say_the_same_make_no_gold():
    completions, prompts = world(4)
    spelled = ["Seven.", "seven", " SEVEN!", "seven,"]
    same = {
        name: prompt.model_copy(update={"answer_gt": text})
        for (name, prompt), text in zip(prompts.items(), spelled, strict=True)
    }
    comparisons = draw(completions, same, per_prompt=2, overlap=0.5, retests=0.0, gold=0.5, seed=0)
    assert {one.purpose for one in comparisons} == {"comparison"}


def test_another_question_makes_no_gold():
    completions, prompts = world(2)
    other = {name: prompt.model_copy(update={"question": name}) for name, prompt in prompts.items()}
    comparisons = draw(completions, other, per_prompt=2, overlap=0.5, retests=0.0, gold=0.5, seed=0)
    assert {one.purpose for one in comparisons} == {"comparison"}


def test_the_seed_decides_all_and_another_seed_shares_no_id():
    assert drawn() == drawn()
    assert not {one.id for one in drawn()} & {one.id for one in drawn(seed=1)}


def test_ids_are_all_different_and_look_alike():
    ids = [one.id for one in drawn()]
    assert len(set(ids)) == len(ids)
    assert all(len(one) == 16 and set(one) <= set("0123456789abcdef") for one in ids)


def test_place_in_the_list_tells_nothing():
    comparisons = drawn(n=400)
    places = [i / len(comparisons) for i, one in enumerate(comparisons) if one.purpose != "comparison"]
    # 120 uniform draws: mean 0.5, standard deviation of the mean 0.289 / sqrt(120) = 0.026
    assert sum(places) / len(places) == pytest.approx(0.5, abs=4 * 0.026)


def test_sides_are_even():
    comparisons = [one for one in drawn(n=400) if one.purpose == "comparison"]
    share = sum(one.completion_a < one.completion_b for one in comparisons) / len(comparisons)
    assert share == pytest.approx(0.5, abs=4 * 0.5 / 800**0.5)


def test_datasets_split_by_how_many_judge():
    _, prompts = world()
    everyone, one_each = Project("demo", "audio", drawn(), prompts, Path(), annotators=5).datasets()
    assert (everyone.name, everyone.judgements_each, len(everyone.comparisons)) == ("demo-everyone", 5, 90)
    assert (one_each.name, one_each.judgements_each, len(one_each.comparisons)) == ("demo-one-each", 1, 140)


@pytest.mark.parametrize(
    "more", [{"retests": 0.3}, {"gold": 0.2}, {"overlap": 0.6}, {"per_prompt": 3}, {"n": 150}], ids=str
)
def test_more_of_anything_draws_again_what_was_drawn(more):
    first, second = ({one.id: one for one in drawn(**options)} for options in ({}, more))
    comparisons = {name for name, one in first.items() if one.purpose == "comparison"}
    assert comparisons <= second.keys()
    if more.keys() & {"retests", "gold"}:
        assert first.items() <= second.items()
    if "overlap" in more:  # whoever shared a comparison still does
        assert all(second[name].everyone for name in comparisons if first[name].everyone)


def test_what_is_compared_is_known_by_its_texts():
    """Sampled again in another order or with other ids, two answers are the same two answers."""
    completions, prompts = world()
    options = {"per_prompt": 2, "overlap": 0.3, "retests": 0.1, "gold": 0.05, "seed": 0}
    again = [one.model_copy(update={"id": f"new-{one.id}", "policy": "new"}) for one in completions[::-1]]
    assert [one.id for one in draw(again, prompts, **options)] == [one.id for one in drawn()]


BETTER = {"good": 2, "bad": 0, "ugly": 1}


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    overlap=st.floats(0, 1),
    ranks=st.permutations(["good", "bad", "ugly"]),
)
def test_blinding_round_trips(seed, overlap, ranks):
    """Annotators who answer by the truth about what they see give back the truth about who it was."""
    rank = {text: i for i, text in enumerate(ranks)}
    completions, prompts = world(12)
    text_of = {one.id: one.text for one in completions}
    for one in draw(completions, prompts, per_prompt=3, overlap=overlap, retests=0.3, gold=0.0, seed=seed):
        seen = "a" if rank[one.text_a] > rank[one.text_b] else "b"
        back = unblind(one, "annotator-1", {"factuality": seen, "behaviour": seen})
        chosen = back.completion_a if back.factuality == "a" else back.completion_b
        rejected = back.completion_b if back.factuality == "a" else back.completion_a
        assert rank[text_of[chosen]] > rank[text_of[rejected]]
        assert (back.comparison, back.prompt_id, back.purpose) == (one.id, one.prompt_id, one.purpose)
        assert back.retest_of == one.retest_of


def test_unblind_keeps_everything_that_was_said():
    one = drawn()[0]
    said = {
        "factuality": "tie",
        "behaviour": "both_bad",
        "errors_a": ["omission", "wrong_count"],
        "clip": "unusable",
        "corrected": "Seven.",
        "rationale": "  ",
    }
    back = unblind(one, "ann", said, submitted_at="2026-01-01T00:00:00+00:00", seconds=3.5, heard=0.9)
    assert (back.factuality, back.behaviour) == ("tie", "both_bad")
    assert (back.errors_a, back.errors_b) == (("omission", "wrong_count"), ())
    assert back.audio_unusable
    assert (back.corrected, back.rationale) == ("Seven.", None)
    assert (back.submitted_at, back.seconds, back.heard) == ("2026-01-01T00:00:00+00:00", 3.5, 0.9)


@pytest.mark.parametrize(
    ("answers", "names"),
    [
        ({"factuality": "c", "behaviour": "a"}, ["factuality", "'c'"]),
        ({"behaviour": "a"}, ["factuality", "'None'"]),
        ({"factuality": "a", "behaviour": "a", "errors_b": ["typo"]}, ["errors_b", "'typo'"]),
        ({"factuality": "a", "behaviour": "a", "clip": "meh"}, ["clip", "'meh'"]),
    ],
)
def test_answers_that_do_not_fit_are_named(answers, names):
    one = drawn()[0]
    with pytest.raises(BadAnswer) as caught:
        unblind(one, "annotator-2", answers)
    for name in [one.id, "annotator-2", *names]:
        assert name in str(caught.value)

"""What is drawn: how many, who sees it, in which order; and what comes back is about the right completion."""

from collections import Counter
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preference_data.preferences import selection
from preference_data.schema import AXES, Completion, Prompt, Ranking
from ui_annotation.assignment import BadAnswer, Rates, draw, review, unblind
from ui_annotation.project import Project

TEXTS = ["good", "bad", "ugly", "good", "fair"]
RATES = Rates(retests=0.1, gold=0.05)


def make_prompts(n):
    return {
        f"p{i}": Prompt(
            id=f"p{i}",
            audios=(f"{i}.wav",),
            question="What is heard?",
            answer_gt="reference",
            meta_info="{}",
            task_name="sound_QA",
        )
        for i in range(n)
    }


def make_completions(prompts, texts=TEXTS):
    return [
        Completion(id=f"{name}-{j}", prompt_id=name, index=j, text=text, policy=f"policy-{j}")
        for name in prompts
        for j, text in enumerate(texts)
    ]


def is_true(prompt, text):
    """ "fair" is neither true nor false, as far as anybody knows."""
    return {"good": True, "true": True, "reference": True, "bad": False, "ugly": False}.get(text)


def drawn(n=100, texts=TEXTS, **changed):
    prompts = make_prompts(n)
    options = {"size": 2, "per_prompt": 2, "overlap": 0.3, "rates": RATES, "seed": 0, "is_true": is_true}
    return draw(make_completions(prompts, texts), prompts, **options | changed)


def project(comparisons, n=100, annotators=2, **more):
    return Project("demo", "audio", comparisons, make_prompts(n), Path(), annotators, **more)


def judge(item, annotator="ann", best=None, **answers):
    """A judgement of a comparison that prefers `best`, else what is shown first."""
    place = "abcd"[item.texts.index(best) if best else 0]
    if len(item.texts) == 2:
        given = dict.fromkeys(AXES, place)
    else:
        ranks = [{"value": other, "rank": 1 if other == place else 2} for other in "abcd"[: len(item.texts)]]
        given = dict.fromkeys(AXES, ranks)
    return unblind(item, annotator, given | answers)


def purposes(comparisons):
    return Counter(item.purpose for item in comparisons)


# -------------------------------------------------------------------- how many, and of what


def test_counts_are_the_shares_that_were_asked_for():
    everything = drawn()
    assert purposes(everything) == {"comparison": 200, "retest": 20, "gold": 10}
    comparisons = [item for item in everything if item.purpose == "comparison"]
    assert sum(item.everyone for item in comparisons) == 60
    assert set(Counter(item.prompt_id for item in comparisons).values()) == {2}
    assert all(len(set(item.texts)) == 2 for item in everything)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_dataset_has_controls_at_the_same_rates(size):
    datasets = project(drawn(n=400, size=size, per_prompt=1, rates=Rates(0.1, 0.1))).datasets()
    assert [dataset.name for dataset in datasets] == [f"demo-{size}-1", f"demo-{size}-2"]
    for dataset in datasets:
        n = purposes(dataset.comparisons)
        assert (n["retest"], n["gold"]) == (n["comparison"] // 10, n["comparison"] // 10)
    assert [len(dataset.comparisons) for dataset in datasets] == [336, 144]


def test_a_prompt_with_fewer_different_completions_is_compared_in_a_smaller_form():
    assert {len(item.texts) for item in drawn(texts=["good", "bad", "good"], size=4)} == {2}
    assert drawn(texts=["good", "good"]) == []


def test_retests_have_their_completions_in_reverse_order():
    comparisons = {item.id: item for item in drawn(size=3)}
    retests = [item for item in comparisons.values() if item.purpose == "retest"]
    assert len(retests) == 20
    for again in retests:
        first = comparisons[again.about]
        assert first.purpose == "comparison"
        assert (again.completions, again.texts) == (first.completions[::-1], first.texts[::-1])
        assert again.everyone == first.everyone


# -------------------------------------------------------------------- gold


def test_gold_has_true_and_false_completions_and_of_nothing_else_is_the_order_known():
    gold = [item for item in drawn(rates=Rates(0, 0.5), per_prompt=1) if item.purpose == "gold"]
    assert len(gold) == 50
    for item in gold:
        assert item.expected.ranks == tuple(1 if is_true(None, text) else 2 for text in item.texts)
        assert set(item.expected.ranks) == {1, 2}
        assert "fair" not in item.texts
    assert 12 <= sum(item.expected.ranks == (1, 2) for item in gold) <= 38  # places are drawn by lot


def test_gold_takes_references_only_where_completions_do_not_suffice():
    assert not any("reference" in item.texts for item in drawn(rates=Rates(0, 0.5), per_prompt=1))
    scarce = drawn(texts=["bad", "ugly", "fair"], rates=Rates(0, 0.5), per_prompt=1)
    gold = [item for item in scarce if item.purpose == "gold"]
    assert len(gold) == 50
    assert all("reference" in item.texts and item.completions for item in gold)


@pytest.mark.parametrize(
    "known", [lambda prompt, text: None, lambda prompt, text: True, lambda prompt, text: False]
)
def test_where_truth_is_not_known_there_is_no_gold(known):
    """A reference is not enough: it may say the same as a completion in other words."""
    assert purposes(drawn(rates=Rates(0.1, 0.5), is_true=known)) == {"comparison": 200, "retest": 20}


@pytest.mark.parametrize("size", [2, 3, 4])
def test_what_a_person_decided_is_gold_in_reverse_order(size):
    options = {"rates": Rates(0.5, 0.5), "size": size, "per_prompt": 1, "is_true": lambda prompt, text: None}
    before = {item.id: item for item in drawn(**options) if item.purpose == "comparison"}
    judgements = [
        judge(item, who, best)
        for item in before.values()
        for who, best in (("ann", item.texts[0]), ("bob", item.texts[1]))
    ]
    decisions = [judge(item, "eve", sorted(item.texts)[0]) for item in review(judgements)]
    after = drawn(**options, earlier=[*judgements, *decisions])
    assert purposes(after) == {"comparison": 100, "retest": 50, "gold": 50}
    assert len({item.id for item in after}) == 200
    for item in after:
        if item.purpose == "gold":
            assert item.texts == before[item.about].texts[::-1]
            best = sorted(item.texts)[0]
            assert item.expected.ranks == tuple(1 if text == best else 2 for text in item.texts)


# -------------------------------------------------------------------- what was judged stays judged


def judge_all(comparisons, annotators=("ann", "bob")):
    return [
        judge(item, who) for item in comparisons for who in (annotators if item.everyone else annotators[:1])
    ]


CHANGES = {
    "seed": {"seed": 7},
    "more retests": {"rates": Rates(0.3, 0.05)},
    "more gold": {"rates": Rates(0.1, 0.2)},
    "fewer of both": {"rates": Rates(0, 0), "seed": 3},
    "another completion": {"more_texts": ("new",), "seed": 5},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("size", [2, 4])
def test_only_what_is_missing_is_asked_again(change, size):
    change = dict(change)
    texts = [*TEXTS, "true"]  # four of them are known to be true or false
    base = {"size": size}
    first = drawn(texts=texts, **base)
    assert purposes(first) == {"comparison": 200, "retest": 20, "gold": 10}
    missing = next(item for item in first if item.purpose == "comparison" and not item.everyone)
    judgements = [item for item in judge_all(first) if item.comparison != missing.id]
    second = drawn(texts=[*texts, *change.pop("more_texts", ())], **base | change, earlier=judgements)
    again = {item.id for item in second} & {item.comparison for item in judgements}
    kept = purposes(item for item in first if item.id in again)
    assert kept == purposes(first) & purposes(second) - Counter(["comparison"])
    assert purposes(item for item in second if item.id in again) == kept  # and for what it was judged
    open_ids = {item.id for item in project(second, earlier=judgements).open()}
    assert open_ids == {item.id for item in second} - again


def test_a_larger_overlap_asks_once_more_about_what_everyone_judges_now():
    first = drawn()
    judgements = judge_all(first)
    second = drawn(overlap=0.6, earlier=judgements)
    n = Counter(item.comparison for item in judgements)
    comparisons = [item for item in second if item.purpose == "comparison"]
    assert {item.id for item in comparisons} <= n.keys()
    assert all(item.everyone for item in comparisons if n[item.id] == 2)
    of_project = project(second, earlier=judgements).open()
    assert sum(item.purpose == "comparison" for item in of_project) == 60


def test_what_is_selected_and_why_does_not_depend_on_what_is_judged():
    """Else what is drawn by lot would be a sample of what nobody has judged yet."""
    completions = {item.id: item for item in make_completions(make_prompts(100))}
    by_lot = {"n": 50, "rule": "random", "random_share": 0.0, "near_tie": 0.0, "seed": 0}
    select = partial(selection.select, completions=completions, scores={}, **by_lot)
    first = drawn(select=select)
    assert purposes(first)["comparison"] == 50
    judgements = judge_all(first[:30])
    again = drawn(select=select, earlier=judgements)
    selected = [
        {item.id: item.selected for item in some if item.purpose == "comparison"} for some in (first, again)
    ]
    assert selected[0] == selected[1]
    assert len(selected[0]) == 50
    # what is not selected any more stays, because it is judged
    fewer = drawn(select=partial(select, n=5), earlier=judgements)
    compared = {item.id: item.selected for item in fewer if item.purpose == "comparison"}
    assert {item.comparison for item in judgements if item.purpose == "comparison"} <= compared.keys()
    assert sum(why is not None for why in compared.values()) == 5


def test_nothing_is_open_when_all_is_judged():
    first = drawn()
    done = project(drawn(seed=1, earlier=judge_all(first)), earlier=judge_all(first))
    assert (done.open(), done.datasets()) == ([], [])


def test_completions_that_are_gone_take_their_judgements_with_them():
    first = drawn(n=10, rates=Rates(0, 0), per_prompt=3)
    second = drawn(
        n=10, rates=Rates(0, 0), per_prompt=3, texts=["good", "bad", "new"], earlier=judge_all(first)
    )
    again = {item.id for item in second} & {item.id for item in first}
    assert again == {item.id for item in first if set(item.texts) == {"good", "bad"}}


def test_gold_that_was_judged_is_not_displaced_by_what_a_person_decided():
    first = drawn(n=40, rates=Rates(0.1, 0.1))
    judgements = judge_all(first)
    torn = [item for item in first if item.purpose == "comparison"][:30]
    judgements += [judge(item, "cat", item.texts[1]) for item in torn]
    decisions = [judge(item, "eve") for item in review(judgements)]
    assert len(decisions) == 30
    second = drawn(n=40, rates=Rates(0.1, 0.1), earlier=[*judgements, *decisions])
    gold = {item.id for item in first if item.purpose == "gold"}
    assert {item.id for item in second if item.purpose == "gold"} == gold


@pytest.mark.parametrize(
    "more", [{"rates": Rates(0.3, 0.2)}, {"overlap": 0.6}, {"per_prompt": 3}, {"n": 150}], ids=str
)
def test_more_of_anything_draws_again_what_was_drawn(more):
    first, second = ({item.id: item for item in drawn(**options)} for options in ({}, more))
    comparisons = {name for name, item in first.items() if item.purpose == "comparison"}
    assert comparisons <= second.keys()
    if "rates" in more:
        assert first.items() <= second.items()
    if "overlap" in more:  # whoever shared a comparison still does
        assert all(second[name].everyone for name in comparisons if first[name].everyone)


def test_what_is_compared_is_known_by_its_texts():
    """Sampled again in another order or with other ids, two completions are the same two completions."""
    prompts = make_prompts(100)
    again = [
        item.model_copy(update={"id": f"new-{item.id}", "policy": "new"})
        for item in make_completions(prompts)[::-1]
    ]
    options = {"size": 2, "per_prompt": 2, "overlap": 0.3, "rates": RATES, "seed": 0, "is_true": is_true}
    assert [item.id for item in draw(again, prompts, **options)] == [item.id for item in drawn()]


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(
    "twins",
    [("dog", "dog "), ("dog", "\n dog"), ("", " \t"), ("\u00e9t\u00e9", "e\u0301te\u0301")],
    ids=ascii,
)
def test_nobody_compares_what_looks_the_same(twins, size):
    """The same of the two in whatever order they were sampled."""
    assert drawn(n=1, texts=twins, size=size) == []
    (item,) = drawn(n=1, texts=[*twins, "cat"], size=size, rates=Rates(0, 0))
    (again,) = drawn(n=1, texts=["cat", *twins[::-1]], size=size, rates=Rates(0, 0))
    assert item.texts == again.texts
    assert len({"cat", *twins} & {*item.texts}) == len(item.texts) == 2


def test_the_seed_decides_all():
    assert drawn() == drawn()
    assert {item.id for item in drawn()} != {item.id for item in drawn(seed=1)}


# -------------------------------------------------------------------- review


def test_a_disagreement_on_either_axis_is_decided_by_a_person():
    agreed, torn, tied = drawn(n=3, per_prompt=1, rates=Rates(0, 0))
    judgements = [
        judge(agreed, "ann"),
        judge(agreed, "bob"),
        judge(torn, "ann"),
        judge(torn, "bob", behaviour="b"),
        judge(tied, "ann"),
        judge(tied, "bob", factuality="tie", behaviour="both_bad"),
    ]
    (decided,) = review(judgements)
    assert (decided.purpose, decided.about, set(decided.texts)) == ("adjudication", torn.id, set(torn.texts))
    assert {*zip(decided.texts, decided.completions, strict=True)} == {
        *zip(torn.texts, torn.completions, strict=True)
    }
    assert review(judgements[::-1]) == [decided]


def test_two_who_differ_on_one_pair_of_four_disagree():
    (item,) = drawn(n=1, size=4, per_prompt=1, rates=Rates(0, 0))
    first = [{"value": place, "rank": rank} for place, rank in zip("abcd", (1, 2, 3, 4), strict=True)]
    other = [{"value": place, "rank": rank} for place, rank in zip("abcd", (1, 2, 4, 3), strict=True)]
    tie = [{"value": place, "rank": 1} for place in "abcd"]
    same = unblind(item, "ann", {"factuality": first, "behaviour": tie})
    assert review([same, unblind(item, "bob", {"factuality": tie, "behaviour": first})]) == []
    assert len(review([same, unblind(item, "bob", {"factuality": other, "behaviour": tie})])) == 1


def test_what_annotators_typed_stands_among_the_others_at_a_random_place():
    comparisons = drawn(n=400, per_prompt=1, rates=Rates(0, 0))
    typed = review([judge(item, corrected=" I typed this. ") for item in comparisons])
    assert purposes(typed) == {"correction": 400}
    assert all(len(item.texts) == 3 for item in typed)
    places = Counter(item.texts.index("I typed this.") for item in typed)
    assert all(places[i] == pytest.approx(400 / 3, abs=4 * (400 * 2 / 9) ** 0.5) for i in range(3))
    item = typed[0]
    assert item.completions[item.texts.index("I typed this.")] not in {
        c for x in comparisons for c in x.completions
    }


def test_a_typed_answer_among_four_takes_the_place_of_the_last():
    (item,) = drawn(n=1, size=4, per_prompt=1, rates=Rates(0, 0))
    (typed,) = review([judge(item, corrected="new")])
    assert set(typed.texts) == {*item.texts[:3], "new"}


def test_who_typed_what_is_there_already_typed_nothing():
    (item,) = drawn(n=1, per_prompt=1, rates=Rates(0, 0))
    assert review([judge(item, corrected=f" {item.texts[1]}\n"), judge(item, "bob", corrected=" ")]) == []


def test_what_is_decided_is_what_votes_say_whether_of_a_comparison_or_of_somebody_elses_retest():
    comparisons = drawn(n=1, per_prompt=1, overlap=0.0, rates=Rates(1.0, 0))
    item, retest = sorted(comparisons, key=lambda item: item.purpose)
    best, other = item.texts
    (torn,) = review([judge(item, "ann", best), judge(retest, "bob", other)])
    assert (torn.purpose, torn.about) == ("adjudication", item.id)
    assert [torn] == review([judge(item, "ann", best), judge(item, "bob", other)])
    assert review([judge(item, "ann", best), judge(retest, "bob", best)]) == []
    assert review([judge(item, "ann", best), judge(retest, "ann", other)]) == []  # measures ann alone
    (typed,) = review([judge(retest, "bob", best, corrected="new")])
    assert (typed.purpose, typed.about) == ("correction", item.id)
    assert review([judge(item, "ann", best), judge(retest, "bob", best, corrected="new")]) == [typed]


def test_nobody_is_asked_to_approve_what_they_typed():
    item, other = drawn(n=1, per_prompt=2, overlap=1.0, rates=Rates(0, 0))
    given = [judge(item, "ann", corrected="new"), judge(other, "bob", corrected=" new")]
    assert len(review(given)) == len(review(given, "eve")) == 2
    assert review(given, "ann") == review(given, "bob") == []


def test_a_decision_is_never_taken_for_an_annotators_judgement():
    """Whoever decides may be an annotator, and may see the completions in the same order again."""
    comparisons = drawn(n=60, per_prompt=1, rates=Rates(0.5, 0))
    torn = [judge(item, who, item.texts[i]) for item in comparisons for i, who in enumerate(("ann", "bob"))]
    decisions = review(torn)
    shown = {(item.prompt_id, item.texts) for item in comparisons}
    assert any((item.prompt_id, item.texts) in shown for item in decisions)
    assert not {item.id for item in decisions} & {item.id for item in comparisons}


# -------------------------------------------------------------------- unblinding


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    overlap=st.floats(0, 1),
    size=st.integers(2, 4),
    order=st.permutations(["good", "bad", "ugly", "fair"]),
)
def test_blinding_round_trips(seed, overlap, size, order):
    """Annotators who answer by the truth about what they see give back the truth about who it was."""
    rank = {text: i for i, text in enumerate(order, start=1)}
    text_of = {item.id: item.text for item in make_completions(make_prompts(12))}
    for item in drawn(n=12, size=size, overlap=overlap, rates=Rates(0.3, 0), seed=seed):
        if size == 2:
            answer = "a" if rank[item.texts[0]] < rank[item.texts[1]] else "b"
        else:
            answer = [{"value": p, "rank": rank[t]} for p, t in zip("abcd", item.texts, strict=False)]
        back = unblind(item, "annotator-1", {"factuality": answer, "behaviour": answer})
        by_rank = sorted(zip(back.factuality.ranks, back.completions, strict=True))
        assert [text_of[name] for _, name in by_rank] == [text for text in order if text in item.texts]
        assert back.behaviour == back.factuality
        copied = ("prompt_id", "completions", "texts", "purpose", "about")
        assert all(getattr(back, name) == getattr(item, name) for name in copied)
        assert (back.comparison, back.kind) == (item.id, "choice" if size == 2 else "ranking")


def test_unblind_keeps_all_answers():
    item = drawn()[0]
    answers = {
        "factuality": "tie",
        "behaviour": "both_bad",
        "errors_a": ["omission", "wrong_count"],
        "thumbs": ["b_bad"],
        "clip": "unusable",
        "corrected": "Seven.",
        "rationale": "  ",
    }
    back = unblind(item, "ann", answers, submitted_at="2026-01-01T00:00:00+00:00", seconds=3.5, heard=0.9)
    assert back.factuality == Ranking(ranks=(1, 1))
    assert back.behaviour == Ranking(ranks=(1, 1), all_bad=True)
    assert back.errors == (("omission", "wrong_count"), ())
    assert back.thumbs == (None, False)
    assert back.audio_unusable
    assert (back.corrected, back.rationale) == ("Seven.", None)
    assert (back.submitted_at, back.seconds, back.heard) == ("2026-01-01T00:00:00+00:00", 3.5, 0.9)


def test_ranks_with_gaps_are_closed_and_thumbs_that_contradict_say_nothing():
    (item,) = drawn(n=1, size=4, per_prompt=1, rates=Rates(0, 0))
    ranks = [{"value": place, "rank": rank} for place, rank in zip("abcd", (4, 1, 3, 3), strict=True)]
    back = unblind(
        item,
        "ann",
        {
            "factuality": ranks,
            "behaviour": ranks[::-1],
            "all_bad": ["behaviour"],
            "thumbs": ["a_good", "a_bad", "c_good", "d_bad"],
        },
    )
    assert back.factuality == Ranking(ranks=(3, 1, 2, 2))
    assert back.behaviour == Ranking(ranks=(3, 1, 2, 2), all_bad=True)
    assert back.thumbs == (None, None, True, False)


GOOD = {"factuality": "a", "behaviour": "a"}
RANKS = [{"value": place, "rank": 1} for place in "abc"]
RANKED = {"factuality": RANKS, "behaviour": RANKS}


@pytest.mark.parametrize(
    ("size", "answers", "names"),
    [
        (2, GOOD | {"factuality": "c"}, ["factuality", "'c'"]),
        (2, {"behaviour": "a"}, ["factuality", "'None'"]),
        (2, GOOD | {"errors_b": ["typo"]}, ["errors", "typo"]),
        (2, GOOD | {"clip": "meh"}, ["clip", "'meh'"]),
        (2, GOOD | {"thumbs": ["c_good"]}, ["thumbs", "'c_good'"]),
        (3, RANKED | {"behaviour": RANKS[:2]}, ["behaviour", "a, b, c"]),
        (3, RANKED | {"behaviour": [{"value": "a"}, *RANKS[1:]]}, ["behaviour", "a, b, c"]),
        (3, RANKED | {"factuality": None}, ["factuality", "'None'"]),
        (3, RANKED | {"factuality": "a"}, ["factuality", "'a'"]),
        (3, RANKED | {"all_bad": ["honesty"]}, ["all_bad", "'honesty'"]),
    ],
)
def test_answers_that_do_not_fit_are_named(size, answers, names):
    item = drawn(size=size)[0]
    with pytest.raises(BadAnswer) as caught:
        unblind(item, "annotator-2", answers)
    for name in [item.id, "annotator-2", *names]:
        assert name in str(caught.value)

"""The wording of a corpus: what it asks, what it accepts, and what it cannot be talked into."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from preference_data.corpora.catalog import phrasebook_of
from preference_data.toy_world.phrasebook import BadPhrasebook, Phrasebook
from preference_data.toy_world.spoken_digits import facts_of

DRAWS = 2000
BOOKS = {name: Phrasebook.load(phrasebook_of(name, None)) for name in ("synthetic", "spoken_digits")}
WORLD = BOOKS["synthetic"]
SPEECH = {"word": "seven", "gender": "woman"}
MIXED = {**SPEECH, "background": "music"}
MUSIC = {"instrument": "piano", "direction": "rising", "tempo": "fast"}


def draw_facts(name: str, rng: np.random.Generator) -> dict[str, str | list[str]]:
    if name == "spoken_digits":
        return facts_of([int(digit) for digit in rng.integers(0, 10, rng.integers(1, 4))])
    forms = [
        ("word", "gender"),
        ("word", "gender", "background"),
        ("event", "count"),
        ("first", "last", "count"),
        ("instrument", "direction", "tempo"),
    ]
    slots = forms[rng.integers(len(forms))]
    return {slot: str(rng.choice(WORLD.slots[slot].values)) for slot in slots}


def draws(name: str, seed: int):
    rng = np.random.default_rng(seed)
    for _ in range(DRAWS):
        facts = draw_facts(name, rng)
        yield BOOKS[name].ask(facts, rng), facts, rng


@pytest.mark.parametrize("name", BOOKS)
def test_every_reference_is_perfect_and_its_question_is_recognised(name):
    kinds = set()
    for question, facts, _ in draws(name, seed=0):
        kinds.add(question.kind)
        assessment = BOOKS[name].assess(question.reference, question, facts)
        assert (assessment.score, assessment.factual, assessment.behaves) == (10, True, True), question
        assert BOOKS[name].question(question.text, facts) == question
    assert kinds == {kind for kind, weight in BOOKS[name].kinds.items() if weight}


@pytest.mark.parametrize("name", BOOKS)
def test_a_spoiled_answer_is_never_perfect_and_errs_as_declared(name):
    seen = set()
    for question, facts, rng in draws(name, seed=1):
        answer, defect = BOOKS[name].spoil(question, facts, rng)
        assessment = BOOKS[name].assess(answer, question, facts)
        assert assessment.score < 10, (question, answer)
        assert assessment.factual == (defect == "ignored_format"), (question, answer)
        assert not assessment.behaves or defect in ("invented", "answered_absent"), (question, answer)
        seen.add(defect)
    assert seen == {"invented", "ignored_format", "answered_absent"}


@pytest.mark.parametrize("name", BOOKS)
def test_answers_that_ignore_the_clip_score_low(name):
    book = BOOKS[name]
    everything = " ".join(
        slot.sentence.format(**{slot_name: value})
        for slot_name, slot in book.slots.items()
        for value in slot.values
    )
    denial = " ".join(sorted({slot.absent for slot in book.slots.values() if slot.absent}))
    first = next(iter(book.slots.items()))
    constant = first[1].sentence.format(**{first[0]: first[1].values[0]})
    asked = [(question, facts) for question, facts, _ in draws(name, seed=2)][:500]
    for answer in ("", "I do not know.", denial, denial.split(". ")[0], constant, everything):
        scores = [book.assess(answer, question, facts).score for question, facts in asked]
        assert np.mean(scores) < 3, answer


def assess(answer: str, text: str, facts=SPEECH):
    return WORLD.assess(answer, WORLD.question(text, facts), facts)


def test_scores_by_hand():
    question = "Which word is spoken?"
    assert assess("The speaker says seven.", question).score == 10
    # right but not a sentence: 1 + 9 (0.75 * 1 + 0)
    assert assess("Seven.", question).score == pytest.approx(7.75)
    # one right, one false: precision 1/2, recall 1, F1 2/3; two sentences do not behave: 1 + 9 * 0.75 * 2/3
    assert assess(
        "The speaker says seven. There is rain in the background.", question
    ).score == pytest.approx(5.5)
    assert assess("The speaker says tiger.", question).score == 1
    # word right, gender wrong: one of two asked things, one false sentence: F1 1/2, and it behaves
    assert assess("A man says seven.", "Describe the audio.").score == pytest.approx(1 + 9 * (0.375 + 0.25))


@pytest.mark.parametrize(
    "answer",
    [
        "She said 'seven'.",
        "The speaker says seven xyzzy plugh.",
        "The speaker says seven.The speaker is a woman.",
        ". . .",
        "The speaker says \u212aeven.",  # KELVIN SIGN lower-cases to k
    ],
)
def test_what_cannot_be_read_counts_as_false(answer):
    assessment = assess(answer, "Which word is spoken?")
    assert (assessment.factual, assessment.fact_is_right, assessment.score) == (False, False, 1)


def test_a_garbage_tail_is_a_false_claim():
    assert not assess("The speaker says seven. Blah blah.", "Which word is spoken?").factual
    assert assess("the speaker says SEVEN", "Which word is spoken?").score == 10


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.sampled_from("The speaker says seven.is no!?{}()|\\\u0130\u212a\n"), max_size=60))
def test_any_text_can_be_assessed(answer):
    for text in ("Which word is spoken?", "Describe the audio.", "What instrument is it?"):
        assert 1 <= assess(answer, text).score <= 10


def test_background_music_is_music_whose_instrument_is_not_known():
    no_music = WORLD.assess("There is no music.", WORLD.question("What is in the background?", MIXED), MIXED)
    assert not no_music.factual
    with pytest.raises(ValueError, match="has no answer"):
        WORLD.question("Which instrument plays?", MIXED)
    assert WORLD.question("Which instrument plays?", SPEECH).reference == "There is no music."


def test_a_question_that_the_facts_do_not_answer_is_refused():
    with pytest.raises(ValueError, match="has no answer"):
        WORLD.question("Which sound comes first?", {"event": "bell", "count": "two"})
    with pytest.raises(ValueError, match="not in the phrasebook"):
        WORLD.question("Who wrote this?", SPEECH)


def test_abstentions_are_told_apart():
    question = WORLD.question("Which word is spoken?", SPEECH)
    wrongly = WORLD.assess("There is no speech.", question, SPEECH)
    assert (wrongly.abstains, wrongly.answerable, wrongly.factual) == (True, True, False)
    question = WORLD.question("Which word is spoken?", MUSIC)
    rightly = WORLD.assess("There is no speech.", question, MUSIC)
    assert (rightly.abstains, rightly.answerable, rightly.factual) == (True, False, True)


def test_yes_no_and_lists():
    book, facts = BOOKS["spoken_digits"], facts_of([7, 2])
    said = book.question("Is the digit seven said?", facts)
    assert book.assess("Yes, seven is said.", said, facts).score == 10
    assert not book.assess("No, seven is not said.", said, facts).fact_is_right
    assert not book.assess("Yes, two is said.", said, facts).fact_is_right  # true, but not what was asked
    digits = book.question("List the digits.", facts)
    assert book.assess("Seven two.", digits, facts).factual
    assert not book.assess("The digits are two seven.", digits, facts).factual


def small(**changes) -> dict:
    book = {
        "slots": {
            "name": {
                "values": ["Nina", "Nina Simone", "Bob"],
                "questions": ["Who is it?"],
                "sentence": "This is {name}.",
            }
        },
        "descriptions": ["You hear {name}."],
        "describe_questions": ["What do you hear?"],
        "one_word": "One word.",
        "kinds": {"closed": 1, "one_word": 1},
        "inventions": ["name"],
        "tasks": [{"task": "speech_QA"}],
        "targets": [{"task": "caption", "text": " {description}"}],
    }
    return {**book, **changes}


def test_values_keep_their_capitals_and_may_be_several_words():
    book, rng = Phrasebook.model_validate(small()), np.random.default_rng(0)
    facts = {"name": "Nina Simone"}
    for _ in range(50):
        question = book.ask(facts, rng)
        assert question.kind == "closed"  # two words cannot be asked for in one
        assert book.assess(question.reference, question, facts).score == 10
        spoiled, _ = book.spoil(question, facts, rng)  # nothing to invent but another name
        assert not book.assess(spoiled, question, facts).factual
    assert book.assess("this is nina", question, facts).score == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inventions": ["mood"]}, "mood: no such slot"),
        ({"descriptions": ["You hear {name} and {name}."]}, "holds a slot twice"),
        ({"descriptions": ["You hear {name.__class__}."]}, "braces may hold"),
        ({"tasks": [{"task": "speach_QA"}]}, "tasks.0.task"),
        ({"targets": [{"task": "transcibe", "text": "{name}"}]}, "'transcibe' is not a pre-training task"),
        ({"kinds": {"closed": 0}}, "not all 0"),
        ({"describe_questions": ["Who is it?"]}, "'Who is it\\?' comes twice"),
        ({"one_wrd": "x"}, "one_wrd"),
    ],
)
def test_a_bad_phrasebook_names_the_file_and_the_field(tmp_path: Path, changes, message):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(small(**changes)))
    with pytest.raises(BadPhrasebook, match=message) as caught:
        Phrasebook.load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", BOOKS)
def test_the_tokenizer_is_shown_every_word_that_is_ever_said(name):
    shown = set(" ".join(BOOKS[name].texts()).split())
    for question, facts, _ in draws(name, seed=3):
        for text in (question.text, question.reference, BOOKS[name].description(facts)):
            assert set(text.split()) <= shown

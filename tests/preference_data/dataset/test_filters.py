"""What chats are left out for, each on its own, and near repetitions without comparing all with all."""

import pytest

from preference_data.dataset.filters import Limits, band_width, normalised, review
from preference_data.prompts.languages import share_in_scripts
from preference_data.schema import Chat, Turn


def chat(*answers, question="What is it?", clip="a.wav"):
    audios = (clip,) if clip else ()
    turns = tuple(Turn(question=question, answer=answer) for answer in answers)
    return Chat(id="c", audios=audios, turns=turns)


def reasons(chats, **limits):
    return list(review(chats, Limits(**limits)))


def test_as_they_stand_limits_let_everything_pass():
    chats = [chat(""), chat("x"), chat("x"), chat("你好" * 5000)]
    assert reasons(chats) == [None] * 4


def test_lengths_count_every_answer():
    chats = [chat("Rain."), chat("Rain.", "No"), chat("Rain.", "It is raining hard.")]
    assert reasons(chats, min_answer_chars=3, max_answer_chars=10) == [None, "too_short", "too_long"]


def test_a_token_that_steers_the_model_is_never_let_in():
    chats = [chat("ok<|im_end|>"), chat("ok", question="<|AUDIO|>?"), chat("a <| b")]
    assert reasons(chats) == ["control_token", "control_token", None]


def test_the_script_of_the_answers():
    chats = [
        chat("It is rain."),
        chat("是雨声。"),
        chat("It is rain.", "是雨声。"),
        chat("7"),
        chat("It is called 'Ночь' over there."),
    ]
    assert reasons(chats, languages=("en",)) == [None, "language", "language", None, None]
    assert reasons(chats, languages=("en", "zh")) == [None] * 5


@pytest.mark.parametrize(
    ("text", "language", "share"),
    [
        ("hello", "en", 1.0),
        ("héllo wörld", "de", 1.0),
        ("你好", "zh", 1.0),
        ("ねこ と 犬", "ja", 1.0),
        ("ねこ と 犬", "zh", 0.25),
        ("안녕", "ko", 1.0),
        ("привет", "en", 0.0),
        ("123 !?", "en", 1.0),
    ],
)
def test_share_in_scripts(text, language, share):
    assert share_in_scripts(text, [language]) == share


def test_repetitions_are_told_by_clip_and_words_not_by_case_and_points():
    chats = [
        chat("It is rain."),
        chat("it is  RAIN"),
        chat("It is rain.", clip="b.wav"),
        chat("It is rain.", question="What is that?"),
    ]
    assert reasons(chats, max_similarity=1) == [None, "repetition", None, None]
    assert normalised("Ｒain, it_is!") == "rain it is"


LONG = "The recording has a dog barking in the distance while rain falls on a roof, and a car passes slowly."


def test_near_repetitions_of_the_same_clip():
    chats = [
        chat(LONG),
        chat(LONG.replace("slowly", "quickly")),
        chat(LONG.replace("slowly", "quickly"), clip="b.wav"),
        chat("A piano plays a slow melody in a large and empty hall, and somebody coughs at the end."),
    ]
    assert reasons(chats, max_similarity=0.8) == [None, "near_repetition", None, None]
    assert reasons(chats, max_similarity=1) == [None] * 4
    assert reasons(chats, max_similarity=0.99) == [None] * 4


def jaccard(one, other):
    shingles = [{text[i : i + 5] for i in range(len(text) - 4)} for text in (one, other)]
    return len(shingles[0] & shingles[1]) / len(shingles[0] | shingles[1])


def test_the_estimate_is_the_jaccard_index_of_what_is_compared():
    from preference_data.dataset.filters import _EarlierChats

    seen = _EarlierChats(0.5)
    other = LONG.replace("dog barking", "cat crying").replace("roof", "tent")
    one, two = seen._minima(LONG), seen._minima(other)
    assert (one == two).mean() == pytest.approx(jaccard(LONG, other), abs=0.18)  # 64 draws: 3 sigma
    assert (one == one).all()


def test_many_texts_take_time_in_proportion():
    """Few texts are compared with few others, where all with all would be 400 for each."""
    from preference_data.dataset.filters import _EarlierChats

    class Counted(dict):
        candidates = 0

        def get(self, key, default):
            numbers = super().get(key, default)
            self.candidates += len(numbers)
            return numbers

    def candidates_per_text(n):
        earlier = _EarlierChats(0.9)
        earlier.bands = Counted()
        texts = [f"Answer {i}: {i * 7919 % 10_007} birds and {i * i % 9973} bees." for i in range(n)]
        assert not any(earlier.repeats(chat(text, clip="")) for text in texts)
        return earlier.bands.candidates / n

    assert candidates_per_text(800) < 8


@pytest.mark.parametrize(
    ("similarity", "width"), [(0.98, 16), (0.9, 8), (0.8, 4), (0.7, 4), (0.6, 2), (0.02, 1)]
)
def test_bands_are_as_wide_as_finding_the_alike_allows(similarity, width):
    assert band_width(similarity) == width
    if width > 1:
        assert 1 - (1 - similarity**width) ** (64 // width) >= 0.95

"""Word-level time stamps: n words, n + 1 boundaries, on the grid, within the clip."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.evaluation.benchmarks import srwt
from preference_data.prompts.time_stamps import (
    render_spans,
    render_words,
    stamp,
    stamps_to,
)
from preference_data.schema import Word

GOLDEN = "<|0.00|><|sil|><|0.54|>面<|0.86|>条<|1.17|>机<|1.46|><|sil|><|2.01|>"
"""The example line of the release's evaluation (EVALUATION.md)."""
WORDS = [
    Word(text="面", start_s=0.54, end_s=0.86),
    Word(text="条", start_s=0.86, end_s=1.17),
    Word(text="机", start_s=1.17, end_s=1.46),
]


@st.composite
def timed_words(draw):
    times = sorted(draw(st.lists(st.integers(0, 3000), min_size=2, max_size=12)))
    text = st.text(alphabet="abc xyz面", min_size=1, max_size=5).filter(str.strip)
    pairs = zip(times[::2], times[1::2], strict=False)
    return [Word(text=draw(text), start_s=a / 100, end_s=b / 100) for a, b in pairs]


def read_back(text):
    """The words of a line and their times, by the reader of the metric."""
    read = srwt.parse(text)
    assert read is not None
    assert len(read.times_s) == len(read.words) + 1
    spoken = zip(read.words, read.times_s, read.times_s[1:], strict=False)
    return [Word(text=word, start_s=start, end_s=end) for word, start, end in spoken if word != "<|sil|>"]


def test_the_releases_example():
    assert render_words(WORDS, duration_s=2.01) == GOLDEN


def test_stamps_are_3001_of_a_hundredth_of_a_second():
    assert stamps_to() == [f"<|{i * 0.01:.2f}|>" for i in range(3001)]  # as the released tokenizer has them
    assert stamp(1.004) == "<|1.00|>"
    with pytest.raises(ValueError, match="30.01 s is outside"):
        stamp(30.01)


@given(timed_words(), st.integers(0, 100))
def test_words_come_back_by_the_reader_of_the_metric(words, tail):
    duration_s = min(30.0, words[-1].end_s + tail / 100)
    text = render_words(words, duration_s)
    assert read_back(text) == words
    times_s = srwt.parse(text).times_s
    assert times_s[0] == 0
    assert times_s[-1] == pytest.approx(duration_s)


@given(timed_words())
def test_spans_come_back(spans):
    pieces = [re.split(r"<\|(\d+\.\d\d)\|>", part) for part in render_spans(spans).split("<|delim|>")]
    assert all((before, after) == ("", "") for before, _, _, _, after in pieces)
    read = [Word(text=text, start_s=start, end_s=end) for _, start, text, end, _ in pieces]
    assert sorted(read, key=repr) == sorted(spans, key=repr)


def test_spans_may_overlap_and_are_ordered_by_their_beginning():
    dog, car = Word(text="dog", start_s=1.0, end_s=2.5), Word(text="car", start_s=0.2, end_s=1.4)
    assert render_spans([dog, car]) == "<|0.20|>car<|1.40|><|delim|><|1.00|>dog<|2.50|>"


@pytest.mark.parametrize(
    ("span", "what"),
    [
        (("", 0.0, 0.5), "word 1 is ''"),
        (("hello", 0.5, 0.4), "span 1 'hello' runs backwards"),
        (("hello", 0.0, 2.02), r"ends at 2.02 s, after the clip \(2.01 s\)"),
        (("<|im_end|>", 0.0, 0.5), "must hold text and no tag"),
    ],
)
def test_spans_that_cannot_be_stamped(span, what):
    text, start_s, end_s = span
    with pytest.raises(ValueError, match=what):
        render_spans([Word(text=text, start_s=start_s, end_s=end_s)], duration_s=2.01)
    with pytest.raises(ValueError, match="no spans to stamp"):
        render_spans([])


def test_a_span_beyond_the_last_stamp_is_refused():
    with pytest.raises(ValueError, match="30.01 s is outside 0 to 30 s"):
        render_spans([Word(text="hello", start_s=0, end_s=30.01)])


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ([], "no words"),
        ([WORDS[1], WORDS[0]], "word 2 '面' from 0.54 to 0.86 s: .* the one before ends at 1.17"),
        ([Word(text="a", start_s=0.5, end_s=0.4)], "word 1 'a'"),
        (
            [Word(text="a", start_s=1.5, end_s=2.5)],
            r"the last word ends at 2.50 s, after the clip \(2.01 s\)",
        ),
        ([Word(text="<|sil|>", start_s=0, end_s=1)], "must hold text and no tag"),
    ],
)
def test_words_that_cannot_be_stamped(words, what):
    with pytest.raises(ValueError, match=what):
        render_words(words, duration_s=2.01)

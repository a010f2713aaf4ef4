"""Time stamps in text, as Qwen-Audio has them (arXiv:2311.07919, section 3.2).

They go from `<|0.00|>` to `<|30.00|>` in steps of 0.01 s.

Words (SRWT, speech recognition with word-level time stamps) share their boundaries: n words, n + 1 stamps,
with `<|sil|>` as the word of a pause:

    <|0.00|><|sil|><|0.54|>hello<|0.86|>world<|1.17|>

Spans have a beginning and an end each and may overlap, `<|delim|>` between them (ours: neither the paper nor
the release shows a line):

    <|0.40|>dog<|1.20|><|delim|><|0.90|>car<|3.00|>
"""

from __future__ import annotations

from collections.abc import Sequence

from preference_data.schema import Word

LONGEST_S = 30.0
SILENCE = "<|sil|>"
DELIMITER = "<|delim|>"


def stamp(time_s: float) -> str:
    """A time as its tag, on the grid of 0.01 s.

    Raises:
        ValueError: it is outside 0 to 30 s.
    """
    if not 0 <= time_s <= LONGEST_S + 0.005:
        raise ValueError(f"{time_s} s is outside 0 to {LONGEST_S:g} s: there is no such time stamp")
    return f"<|{min(round(time_s * 100), 3000) / 100:.2f}|>"


def stamps_to(longest_s: float = LONGEST_S) -> list[str]:
    """Every time stamp up to `longest_s`: 3,001 up to 30 s."""
    return [stamp(i / 100) for i in range(round(longest_s * 100) + 1)]


def render_words(words: Sequence[Word], duration_s: float | None = None) -> str:
    """Words with n + 1 stamps from 0.00 on; pauses become `<|sil|>`, also one up to `duration_s` if given.

    Raises:
        ValueError: words overlap, run backwards, pass the end, or are not words.
    """
    if not words:
        raise ValueError("no words to stamp")
    text, now = stamp(0), 0
    for number, word in enumerate(words, 1):
        _check_word(word.text, number)
        start, end = round(word.start_s * 100), round(word.end_s * 100)
        if start < now or end < start:
            raise ValueError(
                f"word {number} {word.text!r} from {word.start_s} to {word.end_s} s: words must follow each "
                f"other, the one before ends at {now / 100:.2f} s"
            )
        if start > now:
            text += SILENCE + stamp(start / 100)
        text += word.text + stamp(end / 100)
        now = end
    if duration_s is not None:
        if now > round(duration_s * 100):
            raise ValueError(f"the last word ends at {now / 100:.2f} s, after the clip ({duration_s:.2f} s)")
        if now < round(duration_s * 100):
            text += SILENCE + stamp(duration_s)
    return text


def render_spans(spans: Sequence[Word], duration_s: float | None = None) -> str:
    """Spans with their times, in order of their beginning; they may overlap.

    Raises:
        ValueError: a span runs backwards, passes the end or names nothing.
    """
    if not spans:
        raise ValueError("no spans to stamp")
    ordered = sorted(spans, key=lambda span: (round(span.start_s * 100), round(span.end_s * 100)))
    for number, span in enumerate(ordered, 1):
        _check_word(span.text, number)
        if round(span.end_s * 100) < round(span.start_s * 100):
            raise ValueError(
                f"span {number} {span.text!r} runs backwards, from {span.start_s} to {span.end_s} s"
            )
        if duration_s is not None and round(span.end_s * 100) > round(duration_s * 100):
            raise ValueError(f"span {number} ends at {span.end_s:.2f} s, after the clip ({duration_s:.2f} s)")
    return DELIMITER.join(stamp(span.start_s) + span.text + stamp(span.end_s) for span in ordered)


def _check_word(text: str, number: int) -> None:
    if not text.strip() or "<|" in text or "|>" in text:
        raise ValueError(f"word {number} is {text!r}: it must hold text and no tag")

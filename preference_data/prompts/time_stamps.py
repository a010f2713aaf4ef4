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

import re
from collections.abc import Sequence

from preference_data.schema import Word

LONGEST_S = 30.0
SILENCE = "<|sil|>"
DELIMITER = "<|delim|>"
_STAMP = re.compile(r"<\|(\d{1,2}\.\d\d)\|>")


class BadStamps(ValueError):
    """Text or times that are not as time stamps must be."""


def stamp(time_s: float) -> str:
    """A time as its tag, on the grid of 0.01 s.

    Raises:
        BadStamps: it is outside 0 to 30 s.
    """
    if not 0 <= time_s <= LONGEST_S + 0.005:
        raise BadStamps(f"{time_s} s is outside 0 to {LONGEST_S:g} s: there is no such time stamp")
    return f"<|{min(round(time_s * 100), 3000) / 100:.2f}|>"


def stamps_to(longest_s: float = LONGEST_S) -> list[str]:
    """Every time stamp up to `longest_s`: 3,001 up to 30 s."""
    return [stamp(i / 100) for i in range(round(longest_s * 100) + 1)]


def render_words(words: Sequence[Word], duration_s: float | None = None) -> str:
    """Words with n + 1 stamps from 0.00 on; pauses become `<|sil|>`, also one up to `duration_s` if given.

    Raises:
        BadStamps: words overlap, run backwards, pass the end, or are not words.
    """
    if not words:
        raise BadStamps("no words to stamp")
    text, now = stamp(0), 0
    for number, word in enumerate(words, 1):
        _check_word(word.text, number)
        start, end = round(word.start_s * 100), round(word.end_s * 100)
        if start < now or end < start:
            raise BadStamps(
                f"word {number} {word.text!r} from {word.start_s} to {word.end_s} s: words must follow each "
                f"other, the one before ends at {now / 100:.2f} s"
            )
        if start > now:
            text += SILENCE + stamp(start / 100)
        text += word.text + stamp(end / 100)
        now = end
    if duration_s is not None:
        if now > round(duration_s * 100):
            raise BadStamps(f"the last word ends at {now / 100:.2f} s, after the clip ({duration_s:.2f} s)")
        if now < round(duration_s * 100):
            text += SILENCE + stamp(duration_s)
    return text


def render_spans(spans: Sequence[Word], duration_s: float | None = None) -> str:
    """Spans with their times, in order of their beginning; they may overlap.

    Raises:
        BadStamps: a span runs backwards, passes the end or names nothing.
    """
    if not spans:
        raise BadStamps("no spans to stamp")
    ordered = sorted(spans, key=lambda span: (round(span.start_s * 100), round(span.end_s * 100)))
    text = DELIMITER.join(stamp(span.start_s) + span.text + stamp(span.end_s) for span in ordered)
    parse_spans(text, duration_s)
    return text


def parse_spans(text: str, duration_s: float | None = None) -> list[Word]:
    """The spans that `render_spans` wrote.

    Raises:
        BadStamps: a span is not text between two stamps in order, or spans do not begin in order.
    """
    spans: list[Word] = []
    for number, part in enumerate(text.split(DELIMITER), 1):
        pieces = _STAMP.split(part)
        times = _times(pieces)
        if len(pieces) != 5 or pieces[0] or pieces[4]:
            raise BadStamps(f"span {number} is not text between two time stamps: {part[:60]!r}")
        _check_word(pieces[2], number)
        if times[1] < times[0] or (spans and times[0] < spans[-1].start_s):
            raise BadStamps(f"span {number} {pieces[2]!r} runs backwards or begins before the one before it")
        _check_end(times, duration_s)
        spans.append(Word(text=pieces[2], start_s=times[0], end_s=times[1]))
    return spans


def _times(pieces: Sequence[str]) -> list[float]:
    times = [float(time) for time in pieces[1::2]]
    if beyond := [time for time in times if time > LONGEST_S]:
        raise BadStamps(f"{beyond[0]:.2f} s is beyond {LONGEST_S:g} s: there is no such time stamp")
    return times


def _check_word(text: str, number: int) -> None:
    if not text.strip() or "<|" in text or "|>" in text:
        raise BadStamps(f"word {number} is {text!r}: it must hold text and no tag")


def _check_end(times: Sequence[float], duration_s: float | None) -> None:
    if duration_s is not None and round(times[-1] * 100) > round(duration_s * 100):
        raise BadStamps(f"the last time stamp is {times[-1]:.2f} s, after the clip ({duration_s:.2f} s)")

"""Speech recognition with word time stamps (SRWT, Qwen-Audio): how far stamps are from where they should be.

A text reads `<|0.54|>word<|0.86|>word<|1.17|>`: n words and n + 1 stamps, each shared by two neighbours.
The metric is Qwen-Audio's average accumulated shift: over the words that the alignment of both texts pairs as
equal, the shift of a word's start plus that of its end, in milliseconds per word. `<|sil|>` counts as a
word, as officially. The official script drops malformed lines on either side by themselves, which sets
the rest against each other wrongly; here the pair is left out and counted.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from align.evaluation.benchmarks.wer import distance, without_tags

_STAMP = re.compile(r"<\|(\d{1,2}\.\d+)\|>")
_TASK_TAGS = ("<|startoftranscript|>", "<|transcribe|>", "<|en|>", "<|zh|>")


class Stamped(NamedTuple):
    """Words and the n + 1 times between and around them, in seconds."""

    words: tuple[str, ...]
    times_s: tuple[float, ...]


def parse(text: str) -> Stamped | None:
    """Words and stamps; None unless stamps stand around and between words and never run backwards.

    Text before the first and after the last stamp is not a timed word and is ignored, as officially.
    """
    for tag in _TASK_TAGS:
        text = text.replace(tag, "")
    pieces = _STAMP.split(text)
    words, times = tuple(pieces[2:-1:2]), tuple(map(float, pieces[1::2]))
    if (
        len(times) < 2
        or not all(words)
        or any(end < start for start, end in zip(times, times[1:], strict=False))
    ):
        return None
    return Stamped(words, times)


def score(references: Sequence[str], texts: Sequence[str]) -> dict[str, Any]:
    """Shift of the stamps of words recognised, and the character error rate of the words.

    Returns:
        `aas_ms` (None if no word was matched), `words_matched` of `words`, `malformed` (pairs left out of the
        shift), `cer` (over all pairs, tags removed, as officially for Chinese).
    """
    shift = 0.0
    matched = words = malformed = errors = length = 0
    for reference, text in zip(references, texts, strict=True):
        wanted, recognised = parse(reference), parse(text)
        if wanted is None or recognised is None:
            malformed += 1
        else:
            pairs = align(wanted.words, recognised.words)
            shift += sum(_shift(wanted.times_s, i, recognised.times_s, j) for i, j in pairs)
            matched += len(pairs)
            words += len(wanted.words)
        characters = [list(re.sub(r"\s+", "", without_tags(side)).lower()) for side in (reference, text)]
        errors += distance(*characters)
        length += len(characters[0])
    return {
        "aas_ms": 1000 * shift / matched if matched else None,
        "words_matched": matched,
        "words": words,
        "malformed": malformed,
        "cer": errors / length if length else None,
    }


def align(reference: Sequence[str], text: Sequence[str]) -> list[tuple[int, int]]:
    """Positions of equal words in an alignment of fewest edits; of equally short ones the official choice.

    Going back from the end, it prefers to pair two words, then to insert, then to delete.
    """
    m, n = len(reference), len(text)
    edits = [[i + j if not i or not j else 0 for j in range(n + 1)] for i in range(m + 1)]
    for i in range(1, m + 1):
        for j in range(1, n + 1):
            kept = edits[i - 1][j - 1] + (reference[i - 1] != text[j - 1])
            edits[i][j] = min(kept, edits[i][j - 1] + 1, edits[i - 1][j] + 1)
    pairs, i, j = [], m, n
    while i and j:
        is_equal = reference[i - 1] == text[j - 1]
        if edits[i][j] == edits[i - 1][j - 1] + (not is_equal):
            i, j = i - 1, j - 1
            if is_equal:
                pairs.append((i, j))
        elif edits[i][j] == edits[i][j - 1] + 1:
            j -= 1
        else:
            i -= 1
    return pairs[::-1]


def _shift(wanted: Sequence[float], i: int, recognised: Sequence[float], j: int) -> float:
    return abs(wanted[i] - recognised[j]) + abs(wanted[i + 1] - recognised[j + 1])

"""Word and character error rates with the normalisation of the Qwen2-Audio evaluation.

Tags such as `<|en|>` are stripped; English passes Whisper's English normaliser and then its basic one,
other languages the basic one; Chinese has its figures written out (`chinese_numbers`); words of nothing but
punctuation go; Chinese and Cantonese are compared by character, so that what the reports call WER is there a
character error rate. Errors are summed over the corpus. Cantonese needs a package of its own and uses it
where it is installed; steps that are left out are named in the result, never passed over.
"""

from __future__ import annotations

import importlib
import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal

import jiwer
from whisper_normalizer.basic import BasicTextNormalizer
from whisper_normalizer.english import EnglishTextNormalizer

from align.evaluation.benchmarks.chinese_numbers import written_out

Language = Literal["en", "zh", "yue", "other"]

_BRACKETED = re.compile(r"[<\[(]([^>\])]*)[>\])]")
_TAG = re.compile(r"<\|.*?\|>")
_basic = BasicTextNormalizer()


def score(references: Sequence[str], texts: Sequence[str], language: Language) -> dict[str, Any]:
    """Corpus-level error rate: `wer` = `errors` / `length` of the references, in words or characters.

    Returns:
        wer (None without any reference word), errors, length, unit, not_reproduced, and `warning`.
    """
    errors, lengths = _errors_by_row(references, texts, language)
    length = sum(lengths)
    return {
        "wer": sum(errors) / length if length else None,
        "errors": sum(errors),
        "length": length,
        "unit": "character" if language in ("zh", "yue") else "word",
        "not_reproduced": not_reproduced(language),
        **warning(references, texts, language),
    }


def row_shares(references: Sequence[str], texts: Sequence[str], language: Language) -> list[float] | None:
    """Each row's share of the error rate, such that their mean is the rate; None without any reference word.

    A share is the row's errors times rows over words; the number of words counts as known.
    """
    errors, lengths = _errors_by_row(references, texts, language)
    length = sum(lengths)
    return [row_errors * len(errors) / length for row_errors in errors] if length else None


def exact_matches(references: Sequence[str], texts: Sequence[str], language: Language) -> list[float]:
    """1 for a text that says what the reference does word for word, else 0.

    A reference of which nothing is left (`[laughter]`) is met by no text, and what normalisation removes must
    be the same.
    """
    pairs = zip(references, texts, strict=True)
    return [
        float(
            tokens(gt, language) == tokens(text, language) != []
            and _removed(gt, language) == _removed(text, language)
        )
        for gt, text in pairs
    ]


def warning(references: Sequence[str], texts: Sequence[str], language: Language) -> dict[str, str]:
    """Under `warning`, how many rows count as right although what is removed differs; else nothing."""
    n = sum(
        tokens(gt, language) == tokens(text, language) and _removed(gt, language) != _removed(text, language)
        for gt, text in zip(references, texts, strict=True)
    )
    if not n:
        return {}
    return {
        "warning": f"{n} of {len(texts)} rows have no word error, but differ from their reference in what "
        "normalisation removes: combining marks (vowels of Hindi, Arabic ...), signs, emoji, bracketed words"
    }


def _removed(text: str, language: Language) -> list[str]:
    """What the normalisers drop although it says something; other punctuation does not count."""
    text = unicodedata.normalize("NFKC", without_tags(text))
    if language == "zh":  # "5%" and "百分之五" are the same there
        text = written_out("".join(text.split()))
    # English has amounts written out: "$5" and "5 dollars" are the same there
    signs = "" if language == "en" else "#%&@"
    kinds = ("Mn", "Mc", "Me", "So", "Sm", *(() if language == "en" else ("Sc",)))
    marks = [char for char in text if unicodedata.category(char) in kinds or char in signs]
    return [*marks, *(words.casefold() for words in _BRACKETED.findall(text))]


def not_reproduced(language: Language) -> list[str]:
    """The steps of the official normalisation that this installation leaves out."""
    if language == "yue" and not find_spec("zhconv"):
        return ["traditional characters are not made simplified (pip install zhconv)"]
    return []


def tokens(text: str, language: Language) -> list[str]:
    """The words, or characters of Chinese and Cantonese, that are compared."""
    text = without_tags(text)
    words = [word for word in _normaliser(language)(text).lower().split() if not _is_punctuation(word)]
    return list("".join(words)) if language in ("zh", "yue") else words


def without_tags(text: str) -> str:
    """The text without `<|...|>` and without the blanks that they leave, also before punctuation."""
    text = re.sub(r"\s+", " ", _TAG.sub(" ", text))
    return re.sub(r" ?([!,.?;:])", r"\1", text).lstrip(" ")


def distance(reference: Sequence[str], text: Sequence[str]) -> int:
    """Insertions, deletions and substitutions of words between two lists of words without blanks."""
    alignment = jiwer.process_words(" ".join(reference), " ".join(text))
    return int(alignment.substitutions + alignment.deletions + alignment.insertions)


def _errors_by_row(
    references: Sequence[str], texts: Sequence[str], language: Language
) -> tuple[list[int], list[int]]:
    """Errors and the reference's length by row."""
    pairs = [
        (tokens(reference, language), tokens(text, language))
        for reference, text in zip(references, texts, strict=True)
    ]
    errors = [distance(reference, text) for reference, text in pairs]
    return errors, [len(reference) for reference, _ in pairs]


@cache
def _normaliser(language: Language) -> Callable[[str], str]:
    if language == "en":
        english = EnglishTextNormalizer()
        return lambda text: _basic(english(text))
    if language == "zh":
        return lambda text: _without_punctuation(written_out("".join(text.split())))
    if language == "yue" and find_spec("zhconv"):
        convert = importlib.import_module("zhconv").convert
        return lambda text: _basic(convert(text, "zh-cn"))
    normal: Callable[[str], str] = _basic
    return normal


def _without_punctuation(text: str) -> str:
    signs = "$+<=>^`|~＄＋＜＝＞＾｀｜～"  # to the reports' script they are punctuation
    return "".join(" " if unicodedata.category(char)[0] == "P" or char in signs else char for char in text)


def _is_punctuation(word: str) -> bool:
    return all(unicodedata.category(char)[0] == "P" for char in word)

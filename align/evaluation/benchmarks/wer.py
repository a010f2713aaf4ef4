"""Word and character error rates with the normalisation of the Qwen2-Audio evaluation.

Tags such as `<|en|>` are stripped; English passes Whisper's English normaliser and then its basic one,
other languages the basic one; words of nothing but punctuation go; Chinese and Cantonese are compared by
character, so that what the reports call WER is there a character error rate. Errors are summed over the
corpus. Two parts need packages of their own and are used where these are installed; what is not done is
named in the result, never passed over.
"""

from __future__ import annotations

import importlib
import json
import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import jiwer
from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

Language = Literal["en", "zh", "yue", "other"]

_TAG = re.compile(r"<\|.*?\|>")
_basic = BasicTextNormalizer()


def score(references: Sequence[str], texts: Sequence[str], language: Language) -> dict[str, Any]:
    """Corpus-level error rate: `wer` = `errors` / `length` of the references, in words or characters.

    Returns:
        wer (None without any reference word), errors, length, unit, not_reproduced.
    """
    pairs = [
        (tokens(reference, language), tokens(text, language))
        for reference, text in zip(references, texts, strict=True)
    ]
    errors = distance([reference for reference, _ in pairs], [text for _, text in pairs])
    length = sum(len(reference) for reference, _ in pairs)
    return {
        "wer": errors / length if length else None,
        "errors": errors,
        "length": length,
        "unit": "character" if language in ("zh", "yue") else "word",
        "not_reproduced": not_reproduced(language),
    }


def not_reproduced(language: Language) -> list[str]:
    """What the official normalisation does and this installation does not."""
    if language == "en" and not find_spec("whisper_normalizer"):
        return ["British spellings are not made American (pip install whisper-normalizer)"]
    if language == "yue" and not find_spec("zhconv"):
        return ["traditional characters are not made simplified (pip install zhconv)"]
    if language == "zh":
        return ["numbers, dates and units are not written out (SpeechIO's Chinese text normaliser)"]
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


def distance(references: Sequence[Sequence[str]], texts: Sequence[Sequence[str]]) -> int:
    """Insertions, deletions and substitutions of words between lists of words without blanks, summed."""
    if not references:
        return 0
    found = jiwer.process_words([" ".join(one) for one in references], [" ".join(one) for one in texts])
    return int(found.substitutions + found.deletions + found.insertions)


@cache
def _normaliser(language: Language) -> Callable[[str], str]:
    if language == "en":
        english = EnglishTextNormalizer(_american_spellings())
        return lambda text: _basic(english(text))
    if language == "zh":
        return _without_punctuation
    if language == "yue" and find_spec("zhconv"):
        convert = importlib.import_module("zhconv").convert
        return lambda text: _basic(convert(text, "zh-cn"))
    normal: Callable[[str], str] = _basic
    return normal


def _american_spellings() -> dict[str, str]:
    """Whisper's list, if the package that the official script takes it from is installed."""
    spec = find_spec("whisper_normalizer")
    if spec is None or spec.origin is None:
        return {}
    table: dict[str, str] = json.loads(
        next(Path(spec.origin).parent.rglob("english.json")).read_text(encoding="utf-8")
    )
    return table


def _without_punctuation(text: str) -> str:
    return "".join(" " if unicodedata.category(one)[0] == "P" else one for one in text)


def _is_punctuation(word: str) -> bool:
    return all(unicodedata.category(one)[0] == "P" for one in word)

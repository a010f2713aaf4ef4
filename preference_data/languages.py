"""Languages by their code: the name that prompts use, and the scripts that their text is written in."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple


class Language(NamedTuple):
    """`scripts` are first words of Unicode character names, e.g. "LATIN" of "LATIN SMALL LETTER A"."""

    name: str
    scripts: tuple[str, ...] = ("LATIN",)


UNKNOWN = "unknown"
"""Stands for the language of audio without speech, in Qwen-Audio's tags."""

LANGUAGES: dict[str, Language] = {
    # Qwen-Audio's eight (arXiv:2311.07919, section 3.2)
    "en": Language("English"),
    "zh": Language("Mandarin", ("CJK",)),  # so called by Qwen2-Audio's own prompts
    "de": Language("German"),
    "es": Language("Spanish"),
    "ko": Language("Korean", ("HANGUL",)),
    "fr": Language("French"),
    "ja": Language("Japanese", ("CJK", "HIRAGANA", "KATAKANA")),
    "it": Language("Italian"),
    # more of Common Voice and CoVoST 2; tags of these are added to a released tokenizer
    "yue": Language("Cantonese", ("CJK",)),
    "ar": Language("Arabic", ("ARABIC",)),
    "ca": Language("Catalan"),
    "cs": Language("Czech"),
    "cy": Language("Welsh"),
    "et": Language("Estonian"),
    "fa": Language("Persian", ("ARABIC",)),
    "hi": Language("Hindi", ("DEVANAGARI",)),
    "id": Language("Indonesian"),
    "lv": Language("Latvian"),
    "mn": Language("Mongolian", ("CYRILLIC",)),
    "nl": Language("Dutch"),
    "pl": Language("Polish"),
    "pt": Language("Portuguese"),
    "ru": Language("Russian", ("CYRILLIC",)),
    "sl": Language("Slovenian"),
    "sv": Language("Swedish"),
    "ta": Language("Tamil", ("TAMIL",)),
    "th": Language("Thai", ("THAI",)),
    "tr": Language("Turkish"),
    "uk": Language("Ukrainian", ("CYRILLIC",)),
    "vi": Language("Vietnamese"),
}
TEXT_LANGUAGES: dict[str, Language] = {**LANGUAGES, "zh_tr": Language("traditional Chinese", ("CJK",))}
"""Text has one more, as in the released tokenizer: Chinese in traditional characters."""


def share_in_scripts(text: str, languages: Iterable[str]) -> float:
    """Share of a text's letters that are of a script of any of these languages; 1 if it has no letters.

    Scripts do not tell English from German: this finds answers in Chinese among English ones.
    """
    wanted = {script for code in languages for script in TEXT_LANGUAGES[code].scripts}
    scripts = Counter(unicodedata.name(letter, "?").split()[0] for letter in text if letter.isalpha())
    letters = scripts.total()
    return sum(n for script, n in scripts.items() if script in wanted) / letters if letters else 1.0

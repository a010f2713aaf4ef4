"""Languages by their code: the name that prompts use, and the scripts that their text is written in."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple


class Language(NamedTuple):
    """`scripts` are first words of Unicode character names, e.g. "LATIN" of "LATIN SMALL LETTER A"."""

    name: str
    scripts: tuple[str, ...]


UNKNOWN = "unknown"
"""Stands for the language of audio without speech, in Qwen-Audio's tags."""

# fmt: off
_NAMES = {
    # Qwen-Audio's eight (arXiv:2311.07919, section 3.2), the only ones whose tags its released tokenizer has
    "en": "English", "zh": "Mandarin", "de": "German", "es": "Spanish", "ko": "Korean", "fr": "French",
    "ja": "Japanese", "it": "Italian",
    # Whisper's other ones and some more of Common Voice
    "af": "Afrikaans", "am": "Amharic", "ar": "Arabic", "as": "Assamese", "az": "Azerbaijani",
    "ba": "Bashkir", "be": "Belarusian", "bg": "Bulgarian", "bn": "Bengali", "bo": "Tibetan",
    "br": "Breton", "bs": "Bosnian", "ca": "Catalan", "cs": "Czech", "cy": "Welsh", "da": "Danish",
    "el": "Greek", "eo": "Esperanto", "et": "Estonian", "eu": "Basque", "fa": "Persian", "fi": "Finnish",
    "fo": "Faroese", "ga": "Irish", "gl": "Galician", "gu": "Gujarati", "ha": "Hausa", "he": "Hebrew",
    "hi": "Hindi", "hr": "Croatian", "ht": "Haitian Creole", "hu": "Hungarian", "hy": "Armenian",
    "id": "Indonesian", "is": "Icelandic", "jv": "Javanese", "ka": "Georgian", "kk": "Kazakh",
    "km": "Khmer", "kn": "Kannada", "ky": "Kyrgyz", "la": "Latin", "lb": "Luxembourgish", "ln": "Lingala",
    "lo": "Lao", "lt": "Lithuanian", "lv": "Latvian", "mg": "Malagasy", "mi": "Maori", "mk": "Macedonian",
    "ml": "Malayalam", "mn": "Mongolian", "mr": "Marathi", "ms": "Malay", "mt": "Maltese", "my": "Burmese",
    "ne": "Nepali", "nl": "Dutch", "nn": "Norwegian Nynorsk", "no": "Norwegian", "oc": "Occitan",
    "pa": "Punjabi", "pl": "Polish", "ps": "Pashto", "pt": "Portuguese", "ro": "Romanian", "ru": "Russian",
    "rw": "Kinyarwanda", "sa": "Sanskrit", "sd": "Sindhi", "si": "Sinhala", "sk": "Slovak",
    "sl": "Slovenian", "sn": "Shona", "so": "Somali", "sq": "Albanian", "sr": "Serbian", "su": "Sundanese",
    "sv": "Swedish", "sw": "Swahili", "ta": "Tamil", "te": "Telugu", "tg": "Tajik", "th": "Thai",
    "tk": "Turkmen", "tl": "Tagalog", "tr": "Turkish", "tt": "Tatar", "ug": "Uyghur", "uk": "Ukrainian",
    "ur": "Urdu", "uz": "Uzbek", "vi": "Vietnamese", "yi": "Yiddish", "yo": "Yoruba",
    "ckb": "Central Kurdish", "haw": "Hawaiian", "kab": "Kabyle", "yue": "Cantonese",
}
_SCRIPTS = {  # of languages that are not written in Latin letters
    "CJK": "zh yue ja", "HIRAGANA": "ja", "KATAKANA": "ja", "HANGUL": "ko",
    "ARABIC": "ar fa ur ps sd ug ckb", "HEBREW": "he yi",
    "CYRILLIC": "ru uk be bg mk sr mn kk ky tg tt ba", "GREEK": "el", "ARMENIAN": "hy", "GEORGIAN": "ka",
    "DEVANAGARI": "hi mr ne sa", "BENGALI": "bn as", "GUJARATI": "gu", "GURMUKHI": "pa", "KANNADA": "kn",
    "MALAYALAM": "ml", "SINHALA": "si", "TAMIL": "ta", "TELUGU": "te",
    "KHMER": "km", "LAO": "lo", "MYANMAR": "my", "THAI": "th", "TIBETAN": "bo", "ETHIOPIC": "am",
}
# fmt: on


LANGUAGES: dict[str, Language] = {
    code: Language(name, tuple(s for s, codes in _SCRIPTS.items() if code in codes.split()) or ("LATIN",))
    for code, name in _NAMES.items()
}
"""By ISO 639-1, where there is none by 639-3. Mandarin is so called by Qwen2-Audio's own prompts."""
TEXT_LANGUAGES: dict[str, Language] = {**LANGUAGES, "zh_tr": Language("traditional Chinese", ("CJK",))}
"""Text has one more, as in the released tokenizer: Chinese in traditional characters."""


UNNAMED = "?"
"""Script of a letter that this Python's Unicode does not name."""


def script_of(letter: str) -> str:
    """First word of a letter's Unicode name: LATIN, CJK, CYRILLIC ..."""
    return unicodedata.name(letter, UNNAMED).split()[0]


def share_in_scripts(text: str, languages: Iterable[str]) -> float:
    """Share of a text's letters that are of a script of any of these languages; 1 if it has no letters.

    Scripts do not tell English from German: this finds answers in Chinese among English ones.
    """
    wanted = {script for code in languages for script in TEXT_LANGUAGES[code].scripts}
    scripts = Counter(script_of(letter) for letter in text if letter.isalpha())
    letters = scripts.total()
    return sum(n for script, n in scripts.items() if script in wanted) / letters if letters else 1.0

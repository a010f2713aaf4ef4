"""Whether an answer is in the language of its question, as far as the script tells.

Deterministic and offline. Tells Latin, Han, kana, Hangul, Cyrillic, Arabic and every other script of Unicode
apart, but not languages of the same script: English and French, or Chinese and Japanese without kana.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from functools import lru_cache
from itertools import groupby

from preference_data.prompts.languages import UNNAMED, script_of

_FOREIGN = 0.25
"""Share of its words from which on an answer is in another script: names and quotations stay below."""
_SAME = {
    **dict.fromkeys(("HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA"), "KANA"),
    "IDEOGRAPHIC": "CJK",
    UNNAMED: "",
}
_WITHOUT_SPACES = frozenset({"CJK", "KANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN"})
"""Scripts whose characters are counted as words."""


def in_another_script(answer: str, *texts: str) -> bool | None:
    """Whether a quarter of an answer's words or more are in scripts that none of `texts` uses.

    None where it cannot be said: the answer has no letters, or all the texts have none.
    """
    own, known = words(answer), {script for text in texts for script in words(text)}
    if not own or not known:
        return None
    foreign = sum(n for script, n in own.items() if script not in known)
    return foreign >= _FOREIGN * own.total()


@lru_cache(1 << 14)
def words(text: str) -> Counter[str]:
    """How many words of a text are in each script; a script is named as Unicode names its letters."""
    letters = (c for c in unicodedata.normalize("NFKC", text) if unicodedata.category(c)[0] != "M")
    counts: Counter[str] = Counter()
    for script, run in groupby(letters, _script):
        if script:
            counts[script] += len(list(run)) if script in _WITHOUT_SPACES else 1
    return counts


def _script(character: str) -> str:
    """LATIN, CJK, CYRILLIC ...; empty for what is not a letter."""
    if not character.isalpha():
        return ""
    script = script_of(character)
    return _SAME.get(script, script)

"""Which chats are fit to learn from: lengths, languages and duplicates, each refusal with its reason.

Whether an answer could be given without the clip needs a model: see `align.training.filtering`.
"""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

import numpy as np

from preference_data.prompts.languages import share_in_scripts
from preference_data.prompts.prompts import control_token
from preference_data.schema import Chat

Reason = Literal["control_token", "too_short", "too_long", "language", "repetition", "near_repetition"]

MIN_SCRIPT_SHARE = 0.8
"""Names and loan words in another script are not another language."""
_SHINGLE = 5
_MINIMA = 64
_RECALL = 0.95
"""At least this share of the texts that are just too alike must meet in some band of minima."""
_PRIME = np.uint64((1 << 31) - 1)


class Limits(NamedTuple):
    """Limits that chats must keep; see `Filters` in the configuration. By default all pass."""

    min_answer_chars: int = 0
    max_answer_chars: int | None = None
    max_similarity: float | None = None
    languages: tuple[str, ...] = ()


def review(chats: Iterable[Chat], limits: Limits) -> Iterator[Reason | None]:
    """Why each chat is left out, in their order; None if it stays. The first of repetitions stays.

    Keeps no text, but bytes per chat: 0.25 kB where only the same text counts (max_similarity 1), 1.9 kB from
    0.9 on, 3.4 kB at 0.8 and 6.2 kB at 0.5, where texts have more bands.
    """
    earlier = _EarlierChats(limits.max_similarity)
    for chat in chats:
        yield _refused(chat, limits) or earlier.repeats(chat)


def _refused(chat: Chat, limits: Limits) -> Reason | None:
    texts = [chat.system or "", *(text for turn in chat.turns for text in (turn.question, turn.answer))]
    answers = [turn.answer.strip() for turn in chat.turns]
    if control_token(*texts):
        return "control_token"
    if min(map(len, answers)) < limits.min_answer_chars:
        return "too_short"
    if limits.max_answer_chars is not None and max(map(len, answers)) > limits.max_answer_chars:
        return "too_long"
    shares = [share_in_scripts(answer, limits.languages) for answer in answers if limits.languages]
    return "language" if shares and min(shares) < MIN_SCRIPT_SHARE else None


def normalised(text: str) -> str:
    """Lower case, no punctuation, single spaces, compatibility characters as their plain ones."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.sub(r"[^\w\s]|_", " ", plain).split())


def band_width(similarity: float) -> int:
    """Minima per band: many, to compare few texts in vain; few enough that most alike ones meet."""
    widths = [w for w in (16, 8, 4, 2) if 1 - (1 - similarity**w) ** (_MINIMA // w) >= _RECALL]
    return max(widths, default=1)


class _EarlierChats:
    """The chats so far, by their clips: hashes of whole texts, and min-hashes of their shingles.

    Min-hashing (Broder 1997): the share of equal minima of two texts estimates the Jaccard index of their
    shingles; bands of minima find the candidates without comparing all with all.
    """

    def __init__(self, max_similarity: float | None) -> None:
        self.max_similarity = max_similarity
        self.texts: set[int] = set()
        self.bands: dict[int, list[int]] = {}
        self.minima = np.empty((0, _MINIMA), dtype=np.uint32)
        self.n = 0
        self.width = band_width(max_similarity or 1)
        draw = np.random.default_rng(0)
        self.factor = draw.integers(1, _PRIME, _MINIMA, dtype=np.uint64)[:, None]
        self.offset = draw.integers(0, _PRIME, _MINIMA, dtype=np.uint64)[:, None]

    def repeats(self, chat: Chat) -> Reason | None:
        if self.max_similarity is None:
            return None
        clips = "\n".join(chat.audios)
        text = "\n".join(normalised(f"{turn.question} {turn.answer}") for turn in chat.turns)
        whole = hash((clips, text))
        if whole in self.texts:
            return "repetition"
        self.texts.add(whole)
        if self.max_similarity == 1:
            return None
        return "near_repetition" if self._is_near(clips, text) else None

    def _is_near(self, clips: str, text: str) -> bool:
        """Whether a text of these clips is too alike; if not, it is remembered."""
        minima = self._minima(text)
        bands = minima.reshape(-1, self.width)
        keys = [hash((clips, i, band.tobytes())) for i, band in enumerate(bands)]
        candidates = [number for number in {n for key in keys for n in self.bands.get(key, ())}]
        if ((self.minima[candidates] == minima).mean(axis=1) > self.max_similarity).any():
            return True
        for key in keys:
            self.bands.setdefault(key, []).append(self.n)
        if self.n == len(self.minima):
            self.minima = np.resize(self.minima, (max(64, 2 * self.n), _MINIMA))
        self.minima[self.n] = minima
        self.n += 1
        return False

    def _minima(self, text: str) -> np.ndarray:
        shingles = {text[i : i + _SHINGLE] for i in range(max(1, len(text) - _SHINGLE + 1))}
        hashes = np.fromiter((zlib.crc32(shingle.encode()) for shingle in shingles), dtype=np.uint64)
        return ((self.factor * (hashes % _PRIME) + self.offset) % _PRIME).min(axis=1).astype(np.uint32)

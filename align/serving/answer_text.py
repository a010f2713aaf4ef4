"""Tokens of an answer -> its text, piece by piece as they are drawn."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from align.generation.engine import decode_tokens


class AnswerText:
    """The text of a completion as its tokens come: all pieces together are `completion_text`.

    Half a character, white space that may be the last, and what may become a stop text are held back.

    Args:
        tokenizer: of the policy.
        is_plain: whether a plain text is continued, see `decode_tokens`.
        stops: texts that end the answer and are not part of it.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, is_plain: bool = False, stops: Sequence[str] = ()
    ) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        self._is_plain = is_plain
        self._undecoded: list[int] = []
        self._held = ""
        self._has_begun = False
        self.is_stopped = False
        """Whether a stop text has come."""

    def add(self, tokens: Sequence[int]) -> str:
        """What these tokens make certain of the text."""
        self._undecoded += tokens
        piece = self._decode()
        if piece.endswith("\ufffd"):  # a character whose other bytes are still to come
            return ""
        self._undecoded = []
        self._held += piece
        return self._certain()

    def finish(self) -> str:
        """The rest of the text."""
        self._held += self._decode()
        self._undecoded = []
        certain = self._certain()
        return certain if self.is_stopped else certain + self._held.rstrip()

    def _decode(self) -> str:
        return decode_tokens(self._tokenizer, self._undecoded, is_plain=self._is_plain)

    def _certain(self) -> str:
        if self.is_stopped:
            return ""
        text = self._held if self._has_begun else self._held.lstrip()
        places = [(text.find(stop), stop) for stop in self._stops]
        ends = [(place + len(stop), place) for place, stop in places if place >= 0]
        if ends:  # what is complete first, so that it does not matter how many characters come at a time
            self.is_stopped, self._held = True, ""
            return text[: min(ends)[1]].rstrip()
        end = len(text) - max((_overlap(text, stop) for stop in self._stops), default=0)
        end = len(text[:end].rstrip())
        self._has_begun |= end > 0
        self._held = text[end:]
        return text[:end]


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of a text with which a stop text may have begun."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)

"""Full-text search: what annotators type, and how well a record's fields match it.

SQLite calls `score` for each record that a search looks at. So there is no index that could be stale; a
record takes about 20 µs.
"""

from __future__ import annotations

import functools
import html
import json
import re
import unicodedata
from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

_MOST_PARTS = 200
_PART = re.compile(r'(?P<bar>\|)|(?P<minus>-?)(?:"(?P<phrase>[^"]*)"|(?P<word>[^\s"|]+))')
_TAG = re.compile(r"<[^>]*>")
_NO_WORD = re.compile(r"[\W_]+")


class Query(NamedTuple):
    """Strings to look for in normalised text: all of one of `alternatives`, and none of `excluded`."""

    alternatives: list[list[str]]
    excluded: list[str]


@functools.lru_cache
def parse(query: str) -> Query:
    """Read words (all of them), "a phrase", one | other, -without, prefix*; "|" binds weaker than "and".

    What comes after the first 200 parts is left out.
    """
    alternatives: list[list[str]] = [[]]
    excluded: list[str] = []
    for part in islice(_PART.finditer(query), _MOST_PARTS):
        if part["bar"]:
            alternatives.append([])
            continue
        term = _normalised(part["phrase"] or part["word"] or "")
        if not term.strip():
            continue
        if part["word"] and part["word"].endswith("*"):
            term = term.rstrip()
        (excluded if part["minus"] else alternatives[-1]).append(term)
    return Query([terms for terms in alternatives if terms], excluded)


def score(fields: str, query: str, field: str) -> int | None:
    """Count the words of a query in a record.

    Args:
        fields: Of the record, as JSON: HTML by name.
        query: See `parse`.
        field: Where to look; "" is everywhere, so that words may be in different fields.

    Returns:
        None if the record does not match; 0 if nothing was wanted but that words are absent.
    """
    alternatives, excluded = parse(query)
    content = json.loads(fields)
    text = _normalised(" ".join(_texts(content.get(field) if field else content)))
    if not (alternatives or excluded) or any(term in text for term in excluded):
        return None
    if not alternatives:
        return 0
    matching = [terms for terms in alternatives if all(term in text for term in terms)]
    return sum(text.count(term) for terms in matching for term in terms) or None


def _normalised(text: str) -> str:
    """Words without case and accents, a space before and after each."""
    letters = unicodedata.normalize("NFKD", text.casefold())
    if not letters.isascii():
        letters = "".join(letter for letter in letters if not unicodedata.combining(letter))
    return f" {_NO_WORD.sub(' ', letters).strip()} "


def _texts(value: Any) -> Iterator[str]:
    """The texts in a field without their markup; a data URL is megabytes without a word."""
    if isinstance(value, str):
        if ";base64," not in value:
            yield html.unescape(_TAG.sub(" ", value))
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)

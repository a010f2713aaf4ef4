"""Licences of clips by their names, which publishers write in many ways."""

from __future__ import annotations

import re
from collections.abc import Collection


def plain(licence: str) -> str:
    """A name for comparison: "CC BY 4.0", "cc-by-4.0" and "CC_BY_4.0" are the same."""
    return re.sub(r"[^a-z0-9.]+", "-", licence.casefold()).strip("-")


def is_allowed(licence: str | None, allowed: Collection[str]) -> bool:
    """Whether a clip may be used; without a list every clip may, with one not those of unknown licence."""
    return not allowed or (licence is not None and plain(licence) in map(plain, allowed))

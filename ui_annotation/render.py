"""Untrusted text and clips -> the HTML that Argilla's markdown fields show; and back.

What policies, manifests and people wrote must look exactly as written and must do nothing. A `<p>` on one
line is an HTML block for markdown, which is left alone until a blank line; so characters that could end
the block, or mean something to HTML, markdown or the formula renderer, become numeric references.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import islice

from preference_data.schema import Prompt

_PARAGRAPH = '<p style="white-space:pre-wrap;overflow-wrap:anywhere;margin:0">'
_SPEAKER = '<p style="font-weight:bold;margin:0">'
"""No text of others is bold: none can speak as a turn of its own."""
_TURN = '<div style="border-left:3px solid #999;padding-left:8px;margin-bottom:12px">'
_KEPT = frozenset(" .,?!()-'")
"""ASCII beside letters and digits without a meaning in an HTML block; kept for the full-text search."""


def verbatim(text: str) -> str:
    """HTML that shows `text` literally, white-space and line breaks included."""
    return f"{_PARAGRAPH}{''.join(map(_escaped, text))}</p>"


def plain(field: str) -> str:
    """The text that `verbatim` was given.

    Raises:
        ValueError: `verbatim` did not make this field.
    """
    if not (field.startswith(_PARAGRAPH) and field.endswith("</p>")):
        raise ValueError(f"{field[:80]!r} is not a field of ours")
    return _unescaped(field[len(_PARAGRAPH) : -len("</p>")])


def _escaped(character: str) -> str:
    # C1 controls stay: browsers read &#128; as the Euro sign of windows-1252
    harmless = character.isalnum() or character in _KEPT
    if harmless or (character > "\x7f" and (character.isprintable() or character <= "\x9f")):
        return character
    return f"&#{ord(character)};"


def conversation(prompt: Prompt, clips: Mapping[str, tuple[str, float]]) -> str:
    """What stands above a question: every message before it with its clips and its text, and its own clips.

    Of a single question these are its players alone.

    Args:
        prompt: all that was said.
        clips: URL and duration in seconds of its clips by their paths.
    """
    left, n, html = iter(prompt.audios), 0, ""
    *earlier, last = prompt.messages
    for message in earlier:
        own = players([clips[path] for path in islice(left, message.n_clips)], n + 1)
        html += f"{_TURN}{_SPEAKER}{message.role.capitalize()}</p>{own}{verbatim(message.text)}</div>"
        n += message.n_clips
    return html + players([clips[path] for path in islice(left, last.n_clips)], n + 1)


def players(clips: Sequence[tuple[str, float]], first: int = 1) -> str:
    """One player below the other: (URL, duration in seconds) -> "Audio 1 (3.2 s)" ... from number `first`."""
    return "".join(player(url, f"Audio {i} ({s:.1f} s)") for i, (url, s) in enumerate(clips, start=first))


def player(url: str, label: str) -> str:
    """An audio player with its name above it; both on one line, as markdown wants its HTML blocks."""
    source = "".join(c if c.isalnum() or c in "/.-_:" else f"&#{ord(c)};" for c in url)
    return (
        f"<div>{verbatim(label)}"
        f'<audio controls preload="metadata" style="width:100%" src="{source}"></audio></div>'
    )


def sources(field: str) -> tuple[str, ...]:
    """The URLs that `players` or `conversation` was given, in order."""
    return tuple(_unescaped(url) for url in re.findall(r'<audio [^>]*src="([^"]*)"', field))


def durations(field: str) -> tuple[float, ...]:
    """Their durations, to a tenth of a second."""
    return tuple(float(s) for s in re.findall(r">Audio \d+ \((\d+\.\d) s\)</p><audio ", field))


def _unescaped(text: str) -> str:
    return re.sub(r"&#(\d+);", lambda reference: chr(int(reference[1])), text)

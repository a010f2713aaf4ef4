"""Argilla's pages: our script put into them, remote fonts taken out, and which scripts they may run at all.

Argilla copies its built UI to a temporary folder when it is imported and serves it from there. That copy is
edited, before anything is compressed or cached.
"""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.staticfiles import StaticFiles

SCRIPTS = ("listening.js", "keys.js")
TAGS = "".join(f'<script src="/media/{name}" defer></script>' for name in SCRIPTS)
_INLINE = re.compile(r"<script>(.*?)</script>", re.DOTALL)
_REMOTE_FONT = re.compile(r"@import url\(https://fonts\.googleapis\.com/[^)]*\);")


def folder(argilla: Starlette) -> Path:
    """Where the UI is that `argilla` serves.

    Raises:
        RuntimeError: It serves none.
    """
    for route in argilla.routes:
        if isinstance(route, Mount) and isinstance(route.app, StaticFiles) and route.app.directory:
            directory = Path(route.app.directory)
            if (directory / "index.html").is_file():
                return directory
    raise RuntimeError(
        "argilla-server serves no UI at '/': install the pinned version, leave ARGILLA_BASE_URL unset"
    )


def add_scripts(ui: Path) -> None:
    """Put our script into the head of each page.

    Raises:
        RuntimeError: A page has no head, so that listening would go unnoticed.
    """
    for page in ui.rglob("*.html"):
        html = page.read_text(encoding="utf-8")
        if "</head>" not in html:
            raise RuntimeError(
                f"{page}: no </head> to put our script into; is argilla-server the pinned one?"
            )
        page.write_text(html.replace("</head>", TAGS + "</head>", 1), encoding="utf-8")


def remove_remote_fonts(ui: Path) -> None:
    """Have the pages ask no other host for fonts; they fall back to the system's."""
    for sheet in ui.rglob("*.css"):
        css = sheet.read_text(encoding="utf-8")
        if _REMOTE_FONT.search(css):
            sheet.write_text(_REMOTE_FONT.sub("", css), encoding="utf-8")


def policy(ui: Path) -> str:
    """The Content-Security-Policy of the UI: its own files, and by hash the inline scripts it was built with.

    So a script that came in with a model's answer does not run, and no page can fetch from another host.
    (Text is escaped before it is pushed; this holds when that fails.)
    """
    scripts = sorted(
        {_hash(body) for page in ui.rglob("*.html") for body in _INLINE.findall(page.read_text("utf-8"))}
    )
    return "; ".join(
        [
            "default-src 'self'",
            f"script-src 'self' {' '.join(scripts)}",
            "style-src 'self' 'unsafe-inline'",
            "img-src 'self' data:",
            "media-src 'self' data: blob:",
            "font-src 'self' data:",
            "connect-src 'self'",
            "object-src 'none'",
            "base-uri 'self'",
            "form-action 'self'",
            "frame-ancestors 'self'",
        ]
    )


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"

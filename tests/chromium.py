"""Debian's Chromium for the tests and benchmarks that look at pages, and texts that must stay text there."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import pytest
from playwright.sync_api import Browser, sync_playwright

T = TypeVar("T")
CHROMIUM = Path("/usr/bin/chromium")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--autoplay-policy=no-user-gesture-required",
]

HOSTILE = [
    "<img src=x onerror=\"window.top.__ran='img'\">",
    "</script><script>window.top.__ran='script'</script>",
    "<svg onload=\"window.top.__ran='svg'\"></svg>",
    '<object data="http://198.51.100.7/x"></object>',
    '<iframe srcdoc="<script>parent.__ran=1</script>"></iframe>',
    "[click](javascript:window.top.__ran='link')",
    "![i](http://198.51.100.7/x.png)",
    '<a href="javascript:window.top.__ran=1" autofocus onfocus="window.top.__ran=2">a</a>',
    "<style>@import url(http://198.51.100.7/x.css); *{display:none}</style>",
    "<audio src=x onerror=\"window.top.__ran='audio'\"></audio>",
    "$' $` $& ${window.top.__ran=1} #TEMPLATE#",
    "{{constructor.constructor('window.top.__ran=1')()}} {{ record.fields.prompt }}",
    "$$\\href{javascript:window.top.__ran=1}{x}$$ \\(a\\)",
    "```html\n<script>window.top.__ran=1</script>\n```",
    "<!-- --><base href=http://198.51.100.7/> --><meta http-equiv=refresh content='0;url=http://198.51.100.7/'>",
    "</p></div><form action=http://198.51.100.7/><button autofocus>go</button></form>",
    "&lt;img src=x onerror=alert(1)&gt; &amp; &#60;b&#62;",
    "# heading\n\n    indented code\n\n* list\n\n\n<b>bold</b> **stars** _under_ ~~gone~~ | a | b |",
    "\u202egnp.exe\u202c \u200b \ufeff \u2028 '\"`; DROP TABLE records; --",
    "<math><mtext><table><mglyph><style><img src=x onerror=\"window.top.__ran='mxss'\">",
]
"""Texts of strangers that would run a script (and set `__ran`) or ask another machine for something."""


@contextmanager
def chromium(*flags: str) -> Iterator[Browser]:
    """A headless browser. Where there is none the test skips, saying so; with CI=true it fails."""
    if not CHROMIUM.exists():
        missing = f"{CHROMIUM} is missing: apt-get install chromium"
        pytest.fail(missing) if os.environ.get("CI") == "true" else pytest.skip(missing)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=[*FLAGS, *flags])
        yield browser
        browser.close()


def until(condition: Callable[[], T], what: str, seconds: float = 15.0) -> T:
    """Poll from outside: a page's policy may forbid what waiting inside of it would need."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds} s: {what}")

"""Takes a picture of what a run's report says about the comparison: `docs/report.png`, below 300 kB.

python -m docs.picture_report runs/demo
"""

from __future__ import annotations

import sys
from pathlib import Path

from playwright.sync_api import Page

from tests.chromium import chromium

PICTURE = Path(__file__).with_name("report.png")
WIDTH, MARGIN = 1100, 28


def top_of(page: Page, heading: str) -> float:
    """Where a heading stands, in pixels from the top of the page."""
    found = page.locator("h2, h3").filter(has_text=heading)
    if not found.count():
        raise ValueError(f"the report has no heading {heading!r}; take a run with a finished evaluate stage")
    return float(found.first.evaluate("heading => heading.getBoundingClientRect().top"))


def take(run: Path, picture: Path) -> None:
    """The comparison, from its heading to the next one."""
    with chromium() as browser:
        page = browser.new_page(viewport={"width": WIDTH, "height": 900})
        page.goto((run / "report.html").resolve().as_uri())
        top = top_of(page, "Did it get better?") - MARGIN
        bottom = top_of(page, "By category") - MARGIN
        page.screenshot(
            path=picture, full_page=True, clip={"x": 0, "y": top, "width": WIDTH, "height": bottom - top}
        )


if __name__ == "__main__":
    take(Path(sys.argv[1]), PICTURE)

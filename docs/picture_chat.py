"""Takes a picture of two policies answering about a clip, side by side: `docs/chat.png`, below 300 kB.

python -m docs.picture_chat runs/whisper_digits/2_sft runs/whisper_digits/6_dpo CLIP QUESTION REFERENCE
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Page, expect

from tests.chromium import chromium

PICTURE = Path(__file__).with_name("chat.png")
ALIGN = Path(sys.executable).with_name("align")
LOADED_MS, PLAYED_MS = 300_000, 5_000


@contextmanager
def chat(policies: Sequence[str], keep: str) -> Iterator[str]:
    """The address of `align chat` with these policies, until the block ends."""
    command = [ALIGN, "chat", *policies, "--keep", keep]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            for line in server.stdout:
                if address := re.match(r"http://\S+", line):
                    yield address[0]
                    break
            else:
                raise RuntimeError("align chat has ended; see above")
        finally:
            server.send_signal(signal.SIGINT)


def ask_and_judge(page: Page, question: str, reference: str) -> None:
    """Ask greedily, and judge that the answer that is the reference is better."""
    page.locator("#question").fill(question)
    page.locator("#ask").click(timeout=LOADED_MS)
    turn = page.locator("article.turn").last
    expect(turn.locator(".vote")).to_be_visible(timeout=60_000)
    answers = turn.locator(".answer > p").all_inner_texts()
    better = "ab"[answers.index(reference)]
    turn.locator(f"button[data-choice={better}]").click()
    expect(turn.locator(".after-vote")).to_be_visible()


def take(policies: Sequence[str], clip: Path, question: str, reference: str, picture: Path) -> None:
    """A question about a clip that has been played, and a vote."""
    with tempfile.TemporaryDirectory() as keep, chat(policies, keep) as address, chromium() as browser:
        page = browser.new_page(viewport={"width": 1100, "height": 1400})
        page.goto(address)
        page.locator("#sampling summary").click()
        page.locator("#temperature").fill("0")
        page.locator("#sampling summary").click()
        page.locator("#files").set_input_files(clip)
        page.get_by_role("button", name="Play", exact=True).click()
        expect(page.locator("#state")).to_have_text("ready", timeout=LOADED_MS)
        page.wait_for_timeout(PLAYED_MS)
        ask_and_judge(page, question, reference)
        end = page.locator("#composer").evaluate("form => form.getBoundingClientRect().bottom")
        page.screenshot(path=picture, clip={"x": 0, "y": 0, "width": 1100, "height": end + 24})


if __name__ == "__main__":
    first, second, clip, question, reference = sys.argv[1:]
    take([first, second], Path(clip), question, reference, PICTURE)

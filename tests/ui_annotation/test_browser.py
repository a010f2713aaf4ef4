"""Annotating in a real browser: sign in, listen, answer by keyboard; and hostile text that must stay text.

Screenshots are kept in test-artifacts/ at the top of the checkout.
"""

import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from playwright.sync_api import Page

from preference_data.schema import Completion, Prompt
from tests.chromium import chromium
from tests.ui_annotation.conftest import ANNOTATORS, Server
from ui_annotation import assignment, client, pull, push
from ui_annotation.project import Project

ARTIFACTS = Path(__file__).parents[2] / "test-artifacts"
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


@pytest.fixture
def workspace(argilla_server):
    """Of its own: annotators find no other dataset on their home page."""
    return argilla_server.add_workspace(*ANNOTATORS)


@pytest.fixture(scope="module")
def browser():
    with chromium() as one:
        yield one


@pytest.fixture
def page(browser):
    one = browser.new_page(viewport={"width": 1400, "height": 900})
    yield one
    one.close()


def sent(
    server: Server,
    workspace: str,
    folder: Path,
    questions: list[str],
    answers: list[list[str]],
    tasks: list[str],
):
    """A pushed project: one prompt per question, on a clip of its own, with two answers."""
    prompts, completions = {}, []
    for i, question in enumerate(questions):
        seconds = np.arange(int(16_000 * (0.8 + 0.1 * i))) / 16_000
        soundfile.write(folder / f"{i}.wav", 0.2 * np.sin(2 * np.pi * (220 + 20 * i) * seconds), 16_000)
        name = f"{i} {question}"[:200]
        prompts[name] = Prompt(
            id=name,
            audios=(f"{i}.wav",),
            question=question,
            answer_gt="A tone.",
            meta_info="{}",
            task_name=tasks[i],
        )
        completions += [
            Completion(id=f"{name[:190]} {j}", prompt_id=name, index=j, text=text, policy=question)
            for j, text in enumerate(answers[i])
        ]
    comparisons = assignment.draw(completions, prompts, per_prompt=1, overlap=1, retests=0, gold=0, seed=0)
    owner = client.connect(server.url, server.api_key("owner"))
    project = Project("browser", workspace, comparisons, prompts, folder, 2)
    return owner, project, push.push(owner, project)


def signed_in(page: Page, server: Server, who: str, dataset: str) -> None:
    page.goto(f"{server.url}/sign-in")
    page.locator("input").nth(0).fill(who)
    page.locator("input").nth(1).fill(server.password(who))
    page.keyboard.press("Enter")
    page.wait_for_url(lambda url: "sign-in" not in url)
    page.get_by_text(dataset).first.click()
    page.wait_for_url("**/annotation-mode*")
    page.wait_for_selector("audio")
    page.wait_for_load_state("networkidle")


def until(condition, what: str, seconds: float = 15.0):
    """Poll from outside: the page's policy forbids what waiting inside of it would need."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.1)
    raise AssertionError(f"not within {seconds} s: {what}")


def kept(page: Page, name: str) -> None:
    ARTIFACTS.mkdir(exist_ok=True)
    page.screenshot(path=ARTIFACTS / f"{name}.png")


def audio(page: Page) -> dict:
    return page.evaluate(
        "() => { const a = document.querySelector('audio'); return {at: a.currentTime, ended: a.ended, "
        "error: a.error && a.error.message, source: a.getAttribute('src')}; }"
    )


def fields(page: Page) -> list[str]:
    """The text of the player's label and of the three fields, as the browser shows it."""
    return page.evaluate("() => [...document.querySelectorAll('p[style*=pre-wrap]')].map(p => p.textContent)")


def test_sign_in_listen_answer_by_keyboard_submit_and_pull_exactly_that(
    argilla_server, workspace, page, tmp_path
):
    answers = [["A dog barks.", "A bell rings twice."]] * 3
    questions = ["What is heard?", "And here?", "And now?"]
    owner, project, pushed = sent(argilla_server, workspace, tmp_path, questions, answers, ["sound_QA"] * 3)
    prompts, comparisons = project.prompts, project.comparisons
    signed_in(page, argilla_server, ANNOTATORS[0], pushed.datasets[0])
    until(lambda: len(fields(page)) == 4, "the record's fields")
    by_fields = {(prompts[one.prompt_id].question, one.text_a, one.text_b): one for one in comparisons}
    first = by_fields[tuple(fields(page)[1:])]
    kept(page, "annotate-1-record")

    page.keyboard.press("p")  # plays; the focus stays where the digits answer
    until(lambda: audio(page)["at"] > 0.3, "the clip's time to advance")
    assert audio(page)["error"] is None
    until(lambda: audio(page)["ended"], "the end of the clip")
    page.keyboard.press("2")
    page.keyboard.press("3")
    page.keyboard.press("2")  # what is wrong in answer A: an invented event
    kept(page, "annotate-2-answered")
    page.keyboard.press("Enter")

    until(lambda: fields(page)[1:] != [prompts[first.prompt_id].question, first.text_a, first.text_b], "next")
    kept(page, "annotate-3-next-record")
    found = until(lambda: pull.pull(owner, project), "the submitted answer")
    (one,) = found
    assert (one.comparison, one.annotator) == (first.id, ANNOTATORS[0])
    assert (one.completion_a, one.completion_b) == (first.completion_a, first.completion_b)
    assert (one.factuality, one.behaviour) == ("b", "tie")
    assert (one.errors_a, one.errors_b) == (("invented_event",), ())
    assert (one.corrected, one.rationale, one.audio_unusable) == (None, None, False)
    assert one.heard == pytest.approx(1.0, abs=0.02)
    records = owner.datasets(pushed.datasets[0], workspace=workspace).records(with_responses=True)
    (there,) = [record for record in records if record.responses["factuality"]]
    assert there.id == first.id
    assert [response.value for response in there.responses["factuality"]] == ["b"]
    assert [response.value for response in there.responses["behaviour"]] == ["tie"]


def test_an_answer_given_without_listening_is_not_heard(argilla_server, workspace, page, tmp_path):
    owner, project, pushed = sent(
        argilla_server, workspace, tmp_path, ["Deaf?"], [["Yes.", "No."]], ["sound_QA"]
    )
    signed_in(page, argilla_server, ANNOTATORS[1], pushed.datasets[0])
    until(lambda: len(fields(page)) == 4, "the record's fields")
    for key in ("1", "1", "Enter"):
        page.keyboard.press(key)
    (one,) = until(lambda: pull.pull(owner, project), "the answer")
    assert one.heard == 0.0


def test_hostile_text_is_shown_literally_and_does_nothing(argilla_server, workspace, page, tmp_path):
    elsewhere, dialogs = [], []
    ours = (argilla_server.url, "data:", "blob:")
    page.on("request", lambda one: elsewhere.append(one.url) if not one.url.startswith(ours) else None)
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    _, project, pushed = sent(
        argilla_server, workspace, tmp_path, HOSTILE, [[f"{h} 1", f"2 {h}"] for h in HOSTILE], HOSTILE
    )
    signed_in(page, argilla_server, ANNOTATORS[0], pushed.datasets[0])
    expected = {
        (project.prompts[one.prompt_id].question, one.text_a, one.text_b) for one in project.comparisons
    }
    seen = set()
    for _ in HOSTILE:
        until(lambda: tuple(fields(page)[1:]) not in seen and len(fields(page)) == 4, "the next record")
        seen.add(tuple(fields(page)[1:]))
        assert page.evaluate("() => window.__ran") is None
        assert page.locator("audio").count() == 1
        kept(page, f"hostile-{len(seen):02d}")
        if len(seen) < len(HOSTILE):
            page.get_by_label("Next (→)").click()
    assert seen == expected
    page.get_by_text("Filters", exact=True).first.click()
    page.get_by_text("Metadata", exact=True).first.click()
    page.get_by_text("Task", exact=True).first.click()
    page.locator("label").get_by_text(HOSTILE[0], exact=True).wait_for()  # the menu lists the tasks' names
    kept(page, "hostile-filters")
    assert page.evaluate("() => window.__ran") is None
    assert (elsewhere, dialogs) == ([], [])

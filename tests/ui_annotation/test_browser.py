"""Annotating in a real browser: sign in, listen, answer by keyboard; and hostile text that must stay text.

Screenshots are kept in test-artifacts/ at the top of the checkout.
"""

import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from playwright.sync_api import Page

from preference_data.schema import CHOICES, Completion, Prompt, Ranking
from tests.chromium import HOSTILE, chromium, until
from tests.ui_annotation.conftest import ANNOTATORS, Server
from ui_annotation import accounts, assignment, client, pull, push
from ui_annotation.project import Project

ARTIFACTS = Path(__file__).parents[2] / "test-artifacts"


@pytest.fixture
def workspace(argilla_server):
    """Of its own: annotators find no other dataset on their home page."""
    return argilla_server.add_workspace(*ANNOTATORS)


@pytest.fixture(scope="module")
def browser():
    with chromium() as chrome:
        yield chrome


@pytest.fixture
def page(browser):
    new = browser.new_page(viewport={"width": 1400, "height": 900})
    yield new
    new.close()


def sent(
    server: Server,
    workspace: str,
    folder: Path,
    questions: list[str],
    answers: list[list[str]],
    tasks: list[str],
    size: int = 2,
):
    """A pushed project: one prompt per question, on a clip of its own, with `size` answers."""
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
    comparisons = assignment.draw(
        completions, prompts, size=size, per_prompt=1, overlap=1, rates=assignment.Rates(0, 0), seed=0
    )
    owner = client.connect(server.url, server.api_key("owner"))
    project = Project("browser", workspace, comparisons, prompts, folder, 2)
    return owner, project, push.push(owner, project)


def signed_in(page: Page, server: Server, who: str, dataset: str) -> None:
    """Sign in, and open a dataset whose name begins like that."""
    page.goto(f"{server.url}/sign-in")
    page.locator("input").nth(0).fill(who)
    page.locator("input").nth(1).fill(server.password(who))
    page.keyboard.press("Enter")
    page.wait_for_url(lambda url: "sign-in" not in url)
    page.get_by_text(dataset).first.click()
    page.wait_for_url("**/annotation-mode*")
    page.wait_for_selector("audio")
    page.wait_for_load_state("networkidle")


def kept(page: Page, name: str) -> None:
    ARTIFACTS.mkdir(exist_ok=True)
    page.screenshot(path=ARTIFACTS / f"{name}.png")


def audio(page: Page) -> dict:
    return page.evaluate(
        "() => { const a = document.querySelector('audio'); return {at: a.currentTime, ended: a.ended, "
        "error: a.error && a.error.message, source: a.getAttribute('src')}; }"
    )


def fields(page: Page) -> list[str]:
    """The text of the player's label, the question and the answers, as the browser shows it."""
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
    by_fields = {(prompts[item.prompt_id].question, *item.texts): item for item in comparisons}
    first = by_fields[tuple(fields(page)[1:])]
    kept(page, "annotate-1-record")

    page.keyboard.press("p")  # plays; the focus stays where the digits answer
    until(lambda: audio(page)["at"] > 0.3, "the clip's time to advance")
    assert audio(page)["error"] is None
    until(lambda: audio(page)["ended"], "the end of the clip")
    page.keyboard.press("2")
    page.keyboard.press("3")
    page.keyboard.press("4")  # B is bad on its own
    page.keyboard.press("ArrowDown")
    page.keyboard.press("2")  # what is wrong in answer A: an invented event
    kept(page, "annotate-2-answered")
    page.keyboard.press("Enter")

    until(lambda: fields(page)[1:] != [prompts[first.prompt_id].question, *first.texts], "next")
    kept(page, "annotate-3-next-record")
    found = until(lambda: pull.pull(owner, project), "the submitted answer")
    (item,) = found
    assert (item.comparison, item.annotator) == (first.id, ANNOTATORS[0])
    assert (item.completions, item.texts) == (first.completions, first.texts)
    assert (item.factuality, item.behaviour) == (CHOICES["b"], CHOICES["tie"])
    assert (item.errors, item.thumbs) == ((("invented_event",), ()), (None, False))
    assert (item.corrected, item.rationale, item.audio_unusable) == (None, None, False)
    assert item.heard == pytest.approx(1.0, abs=0.02)
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
    (item,) = until(lambda: pull.pull(owner, project), "the answer")
    assert item.heard == 0.0


def play(page: Page) -> None:
    """The whole clip, by key; a page that still loads replaces its players."""
    deadline = time.monotonic() + 20
    while not audio(page)["ended"]:
        assert time.monotonic() < deadline, audio(page)
        before = audio(page)["at"]
        time.sleep(0.5)
        if audio(page)["at"] == before and not audio(page)["ended"]:
            page.keyboard.press("p")


def in_focus(page: Page, question: int) -> str | None:
    """The letter of the answer in the focus, if it is in this ranking, counted from 0."""
    return page.evaluate(
        """question => { const focus = document.activeElement;
        return document.querySelectorAll(".draggable")[question]?.contains(focus) ? focus.id : null; }""",
        question,
    )


def rank(page: Page, comparison, best_first: list[set[str]], question: int) -> None:
    """Give the answers in the focus their ranks, by digits; then to the next question."""
    ranked = page.locator(".draggable").nth(question).locator(".draggable__slot-box [title]")
    for number, (letter, text) in enumerate(zip("abcd", comparison.texts, strict=False), start=1):
        until(lambda c=letter: in_focus(page, question) == c, f"answer {letter} in the focus")
        page.keyboard.press(str(next(i for i, tied in enumerate(best_first, start=1) if text in tied)))
        until(lambda n=number: ranked.count() == n, f"{number} ranked answers")
    page.keyboard.press("ArrowDown")
    until(lambda: in_focus(page, question) is None, "the focus in the next question")


def write(page: Page, text: str) -> None:
    """Into the text box in the focus."""
    page.keyboard.press("Shift+Enter")
    page.keyboard.type(text)
    page.keyboard.press("Escape")


TRUER, FOLLOWS = 0, 1


def test_rank_by_keyboard_then_a_person_approves_what_was_typed_and_decides(
    argilla_server, workspace, browser, page, tmp_path
):
    texts = ["A dog barks.", "A bell rings.", "Two dogs bark.", "Nothing."]
    questions = ["What is heard?", "And here?"]
    owner, project, pushed = sent(
        argilla_server, workspace, tmp_path, questions, [texts] * 2, ["sound_QA"] * 2, size=4
    )
    by_question = {project.prompts[item.prompt_id].question: item for item in project.comparisons}

    signed_in(page, argilla_server, ANNOTATORS[0], pushed.datasets[0])
    until(lambda: len(fields(page)) == 6, "the record's fields")
    kept(page, "rank-1-record")
    first = by_question[fields(page)[1]]
    other = next(item for item in project.comparisons if item != first)
    play(page)
    rank(page, first, [{texts[1]}, {texts[0], texts[2]}, set(), {texts[3]}], TRUER)
    rank(page, first, [set(texts)], FOLLOWS)
    page.keyboard.press("2")  # none does what the question wants
    for _ in range(7):  # all bad, good or bad on its own, four times what is wrong, and whether it is usable
        page.keyboard.press("ArrowDown")
    write(page, "A bell rings twice.")
    kept(page, "rank-2-answered")
    page.keyboard.press("Enter")
    until(lambda: fields(page)[1:2] == [project.prompts[other.prompt_id].question], "the next record")
    (judgement,) = until(lambda: pull.pull(owner, project), "the submitted ranking")
    place = {texts[1]: 1, texts[0]: 2, texts[2]: 2, texts[3]: 3}
    assert judgement.factuality == Ranking(ranks=tuple(place[text] for text in first.texts))
    assert judgement.behaviour == Ranking(ranks=(1, 1, 1, 1), all_bad=True)
    assert (judgement.completions, judgement.corrected) == (first.completions, "A bell rings twice.")
    assert (judgement.kind, judgement.heard) == ("ranking", pytest.approx(1.0, abs=0.02))

    disagree(argilla_server, owner, project, pushed, first, texts[0])
    review = f"{workspace}-review"
    accounts.admit(argilla_server.home, ANNOTATORS[1], workspace=review)
    decisions = project._replace(
        name="browser-review",
        workspace=review,
        comparisons=assignment.review(pull.pull(owner, project)),
        annotators=1,
    )
    assert {item.purpose for item in decisions.comparisons} == {"adjudication", "correction"}
    names = push.push(owner, decisions).datasets
    assert names == ("browser-review-4-1",)
    key = {item.texts: item for item in decisions.comparisons}
    second = browser.new_page(viewport={"width": 1400, "height": 900})
    signed_in(second, argilla_server, ANNOTATORS[1], names[0])
    for number in range(2):
        until(lambda: tuple(fields(second)[2:]) in key, "a record to decide")
        item = key.pop(tuple(fields(second)[2:]))
        best = "A bell rings twice." if item.purpose == "correction" else texts[1]
        kept(second, f"review-{number + 1}-{item.purpose}")
        for question in (TRUER, FOLLOWS):
            rank(second, item, [{best}, {*texts} - {best}], question)
        second.keyboard.press("Enter")
    made = until(lambda: len(got := pull.pull(owner, decisions)) == 2 and got, "both decisions")
    for judgement in made:
        best = "A bell rings twice." if judgement.purpose == "correction" else texts[1]
        expected = Ranking(ranks=tuple(1 if text == best else 2 for text in judgement.texts))
        assert (judgement.factuality, judgement.behaviour) == (expected, expected)
        assert (judgement.annotator, judgement.about) == (ANNOTATORS[1], first.id)
    second.close()


def disagree(server: Server, owner, project: Project, pushed, comparison, best: str) -> None:
    """Have the second annotator prefer another answer, over the API."""
    dataset = client.datasets(owner, project.workspace)[pushed.datasets[0]]
    records = {item["external_id"]: item["id"] for item in client.records(owner, dataset["id"])}
    ranks = [
        {"value": place, "rank": 1 if text == best else 2}
        for place, text in zip("abcd", comparison.texts, strict=True)
    ]
    values = {axis: {"value": ranks} for axis in ("factuality", "behaviour")}
    with server.client(ANNOTATORS[1]) as annotator:
        body = {"status": "submitted", "values": values}
        path = f"/api/v1/records/{records[comparison.id]}/responses"
        annotator.post(path, json=body).raise_for_status()


def test_hostile_text_is_shown_literally_and_does_nothing(argilla_server, workspace, page, tmp_path):
    elsewhere, dialogs = [], []
    ours = (argilla_server.url, "data:", "blob:")
    page.on("request", lambda item: elsewhere.append(item.url) if not item.url.startswith(ours) else None)
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    _, project, pushed = sent(
        argilla_server,
        workspace,
        tmp_path,
        HOSTILE,
        [[h, f"{h} 1", f"2 {h}", f"{h}\n{h}"] for h in HOSTILE],
        HOSTILE,
        size=4,
    )
    signed_in(page, argilla_server, ANNOTATORS[0], pushed.datasets[0])
    expected = {(project.prompts[item.prompt_id].question, *item.texts) for item in project.comparisons}
    seen = set()
    for _ in HOSTILE:
        until(lambda: tuple(fields(page)[1:]) not in seen and len(fields(page)) == 6, "the next record")
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

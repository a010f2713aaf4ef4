"""The page: it tells the numbers of the JSON, needs no network, and answers stay text."""

import csv
import io
import json
import re
from pathlib import Path

import pytest

from align.release.cards import diff_words
from align.release.compare_page import to_json, write_html
from align.release.comparison import compare
from tests.align.release.test_compare import evaluated, scored, small_run
from tests.benchmarks.compare_page import JUDGE, make_run
from tests.chromium import chromium

HOSTILE = "<script>alert(1)</script> <img src=x onerror=alert(2)>"


@pytest.fixture
def run(tmp_path):
    return small_run(tmp_path)


def test_the_page_tells_the_numbers_of_the_json(tmp_path):
    run = make_run(tmp_path / "run", 80, clip_s=0.1)
    c = compare([run / "2_sft", run / "6_dpo"])
    write_html(c, run / "compare.html")
    html = (run / "compare.html").read_text(encoding="utf-8")
    (data,) = re.findall(r'<script type="application/json" id="numbers">(.*?)</script>', html, re.DOTALL)
    told = json.loads(json.dumps(to_json(c)))
    assert json.loads(data) == told
    shown = {}
    for part, row in re.findall(r'<tr data-policy="6_dpo" data-part="(\w+)"[^>]*>(.*?)</tr>', html):
        shown.setdefault(part, []).extend(re.sub("<[^>]+>", "|", row).split("|"))
    (said,) = told["differences"]
    for part, row in said["scores"].items():
        for number in (
            f"{row['before']:.2f}",
            f"{row['after']:.2f}",
            f"{row['delta']:+.2f}".replace("-", "−"),
        ):
            assert number in shown[part]
        assert f"{row['ci_low']:+.2f} to {row['ci_high']:+.2f}".replace("-", "−") in shown[part]
        won = said["wins"][part]
        assert f"{100 * won['rate']:.1f} %" in shown[part]
        assert str(won["wins"]) in shown[part]
    assert "The gate passed: 6_dpo" in html
    assert f"prompt <code>{JUDGE['prompt_sha256'][:12]}</code>" in html


def test_the_page_escapes_answers_and_allows_only_its_own_script(run):
    path = run / "7_evaluate/items/6_dpo.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row | {"response": HOSTILE}) + "\n" for row in rows))
    page = run / "compare.html"
    write_html(compare([run / "2_sft", run / "6_dpo"]), page)
    html = page.read_text(encoding="utf-8")
    (nonce,) = re.findall(r"nonce-([\w-]+)'", html)
    assert re.findall(r"<script[^>]*>", html) == [
        '<script type="application/json" id="numbers">',
        '<script type="application/json" id="packed">',
        f'<script nonce="{nonce}">',
    ]
    assert "<img" not in html
    assert html.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 4
    assert not re.search(r"https?://", html)
    (packed,) = re.findall(r'id="packed">(.*?)</script>', html)
    assert sorted(json.loads(packed)) == ["test/q1.wav", "test/q2.wav", "test/q3.wav"]
    assert all(url.startswith("data:audio/mpeg;base64,") for url in json.loads(packed).values())
    assert "media-src data:;" in html
    assert "test/q4.wav cannot be played: missing" in html


def test_text_in_the_data_cannot_end_its_script(tmp_path):
    run = tmp_path / "demo"
    rows = scored(10, 4, 4, 10, category="</script><script>alert(1)</script>", task_name="sound_QA")
    evaluated(run, {"2_sft": rows, "6_dpo": rows})
    write_html(compare([run / "2_sft", run / "6_dpo"]), run / "compare.html")
    html = (run / "compare.html").read_text(encoding="utf-8")
    assert html.count("</script>") == html.count("<script") == 3


def test_clips_beyond_the_pages_size_are_linked_relative_to_it(run):
    c = compare([run / "2_sft", run / "6_dpo"])
    page = run.parent / "pages/compare.html"
    write_html(c, page, "linked")
    html = page.read_text(encoding="utf-8")
    assert 'data-link="../demo/0_corpus/test/q1.wav"' in html
    assert "media-src data: 'self';" in html
    assert 'id="packed">{}</script>' in html
    write_html(c, page, most_bytes=page.stat().st_size + 6000)
    (packed,) = re.findall(r'id="packed">(.*?)</script>', page.read_text(encoding="utf-8"))
    assert 0 < len(json.loads(packed)) < 3


def test_every_page_has_a_nonce_of_its_own(run):
    c = compare([run / "2_sft", run / "6_dpo"])
    nonces = []
    for _ in range(2):
        write_html(c, run / "compare.html")
        nonces.append(re.search(r"nonce-([\w-]+)", (run / "compare.html").read_text()).group(1))
    assert nonces[0] != nonces[1]
    assert len(nonces[0]) >= 16


def test_word_diff_marks_what_no_other_answer_has():
    assert (
        diff_words("a <b> barks twice", ["a dog barks"])
        == "a <mark>&lt;b&gt;</mark> barks <mark>twice</mark>"
    )
    assert diff_words("a dog barks", ["a cat", "the dog"]) == "a dog <mark>barks</mark>"
    assert diff_words("", ["a"]) == ""
    assert diff_words("one two", ["three"]) == "<mark>one two</mark>"
    assert diff_words("one\n\ntwo  <b>", ["one three"]) == "one\n\n<mark>two  &lt;b&gt;</mark>"


def test_endless_answers_are_shown_unmarked_instead_of_taking_minutes():
    endless = "bark and " * 5000
    assert diff_words(endless, ["bark or " * 5000]) == endless


def test_what_people_said_of_a_question_stands_with_it(run):
    (run / "4_annotate").mkdir()
    (run / "chat").mkdir()
    (run / "chat" / "judgements.jsonl").write_text("of other questions, and damaged")
    said = {
        "comparison": "s",
        "prompt_id": "q2",
        "completions": ["x", "y"],
        "texts": ["A cat.", "<b>A dog.</b>"],
        "kind": "choice",
        "annotator_kind": "person",
        "factuality": {"ranks": [2, 1]},
        "behaviour": {"ranks": [1, 1], "all_bad": True},
    }
    judgements = [
        {"id": "1", "annotator": "ann", "rationale": "<i>It barks</i>", **said},
        {"id": "2", "annotator": "bob", "purpose": "retest", **said},
        {"id": "3", "annotator": "eve", "audio_unusable": True, **said},
        {"id": "4", "annotator": "gpt", **said, "annotator_kind": "model"},
    ]
    (run / "4_annotate/judgements.jsonl").write_text("".join(json.dumps(one) + "\n" for one in judgements))
    write_html(compare([run / "2_sft", run / "6_dpo"]), run / "compare.html")
    html = (run / "compare.html").read_text(encoding="utf-8")
    assert html.count("1 judgement by people") == html.count("judgement by people") == 1
    assert "ann: factuality B &gt; A, behaviour A = B (all bad)" in html
    assert "B: &lt;b&gt;A dog.&lt;/b&gt;" in html
    assert "&lt;i&gt;It barks&lt;/i&gt;" in html
    assert "bob" not in html
    assert "gpt" not in html


@pytest.fixture(scope="module")
def browser():
    with chromium() as one:
        yield one


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of 48 questions with hostile texts, and its page: `packed.html`, `linked.html`."""
    run = make_run(tmp_path_factory.mktemp("page") / "run", 48, clip_s=2.0, suffix="wav")
    for path in sorted(run.glob("7_evaluate/items/*.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:
            row["response"] = "=1+1 " + HOSTILE + row["response"]
            row["question"] += "</p>" + HOSTILE
            for reply in row["replies"]:
                reply["text"] += HOSTILE
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for audio in ("packed", "linked"):
        write_html(compare([run / "2_sft", run / "6_dpo"]), run / f"{audio}.html", audio)
    return run


class Seen:
    """A page in Chromium; `problems` are console messages, errors, dialogs and requests elsewhere."""

    def __init__(self, browser, path, hash=""):
        self.problems = []
        self.page = browser.new_page(accept_downloads=True)
        self.page.set_default_timeout(10_000)
        self.page.on("console", lambda message: self.problems.append(message.text))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.problems.append("dialog"), dialog.dismiss()))
        self.page.on("request", self.requested)
        self.here = path.parent.as_uri()
        self.page.goto(path.as_uri() + hash)

    def requested(self, request):
        if not request.url.startswith(("data:", "blob:", self.here)):
            self.problems.append(f"request to {request.url[:100]}")

    def shown(self):
        return self.page.locator(".card:visible").evaluate_all("cards => cards.map(card => card.dataset.id)")

    def focused(self):
        return self.page.evaluate("() => document.activeElement.dataset.id")

    def saved(self, button):
        with self.page.expect_download() as download:
            self.page.click(button)
        return Path(download.value.path()).read_text(encoding="utf-8-sig")


def of_outcome(c, outcome):
    return [str(question.answers[0].uniq_id) for question in c.questions if question.outcome == outcome]


def test_keys_move_and_filter_and_the_address_brings_back_what_was_seen(browser, folder):
    c = compare([folder / "2_sft", folder / "6_dpo"])
    regressed, improved = of_outcome(c, "regressed"), of_outcome(c, "improved")
    assert min(len(regressed), len(improved)) > 3
    seen = Seen(browser, folder / "packed.html")
    assert len(seen.shown()) == 48
    assert seen.shown()[: len(regressed)] == regressed
    for key in "jjk":
        seen.page.keyboard.press(key)
    assert seen.focused() == regressed[0]
    seen.page.keyboard.press("2")
    assert seen.shown() == improved
    for key in "jj":
        seen.page.keyboard.press(key)
    assert seen.focused() == improved[1]
    seen.page.select_option("#category", "music")
    music = [key for key in seen.shown()]
    assert 0 < len(music) < len(improved)
    assert seen.page.text_content("#visible") == f"{len(music)} shown"

    again = Seen(browser, folder / "packed.html", seen.page.evaluate("() => location.hash"))
    assert again.shown() == music
    assert again.page.input_value("#outcome") == "improved"
    again.page.keyboard.press("0")
    again.page.select_option("#category", "")
    again.page.fill("#words", c.questions[7].answers[1].response[-25:])
    assert str(c.questions[7].answers[0].uniq_id) in again.shown()
    assert len(again.shown()) < 3
    unknown = Seen(browser, folder / "packed.html", "#category=%3Cimg%3E&outcome=none&at=x")
    assert len(unknown.shown()) == 48
    assert seen.problems == again.problems == unknown.problems == []


def test_a_link_to_a_section_keeps_the_filters(browser, folder):
    seen = Seen(browser, folder / "packed.html", "#outcome=improved")
    n = len(seen.shown())
    seen.page.click("nav a[href='#lineage']")
    assert len(seen.shown()) == n < 48


@pytest.mark.parametrize("audio", ["packed", "linked"])
def test_space_plays_the_question_and_a_click_seeks(browser, folder, audio):
    seen = Seen(browser, folder / f"{audio}.html")
    seen.page.keyboard.press("j")
    seen.page.keyboard.press(" ")
    player = seen.page.locator(".card").first.locator(".player")
    player.locator("button[aria-label=Pause]").wait_for()
    seen.page.keyboard.press(" ")
    player.locator("button[aria-label=Play]").wait_for()
    seen.page.check("#loop")
    seen.page.select_option("#speed", "0.5")
    wave = player.locator(".wave")
    box = wave.bounding_box()
    wave.click(position={"x": box["width"] * 0.75, "y": 10})
    player.locator("button[aria-label=Pause]").wait_for()
    seen.page.wait_for_timeout(200)
    assert 1.4 < float(player.locator(".time").text_content().split()[0]) < 1.9  # of 2 s
    assert seen.problems == []


def test_a_clip_that_the_browser_cannot_seek_in_plays_from_its_start(browser, tmp_path):
    run = make_run(tmp_path / "run", 8, clip_s=2.0, suffix="flac")  # without a table of places
    write_html(compare([run / "2_sft", run / "6_dpo"]), run / "linked.html", "linked")
    seen = Seen(browser, run / "linked.html")
    player = seen.page.locator(".player").first
    player.locator("button").click()
    seen.page.wait_for_timeout(300)
    player.locator(".wave").click(position={"x": 200, "y": 10})
    seen.page.wait_for_timeout(300)
    assert player.locator("button").get_attribute("aria-label") == "Pause"
    assert seen.problems == []


def test_a_clip_that_has_gone_is_told(browser, folder, tmp_path):
    moved = tmp_path / "linked.html"
    moved.write_bytes((folder / "linked.html").read_bytes())
    seen = Seen(browser, moved)
    seen.page.locator(".player button").first.click()
    seen.page.locator(".time.failed", has_text="not found").wait_for()


def test_exports_are_the_json_and_what_is_shown(browser, folder):
    c = compare([folder / "2_sft", folder / "6_dpo"])
    seen = Seen(browser, folder / "packed.html", "#outcome=regressed")
    assert json.loads(seen.saved("#json")) == json.loads(json.dumps(to_json(c)))
    rows = list(csv.DictReader(io.StringIO(seen.saved("#csv"))))
    assert [row["uniq_id"] for row in rows] == of_outcome(c, "regressed")
    first = c.questions[0]
    assert rows[0]["6_dpo answer"] == "'" + first.answers[1].response  # begins with "=", would be a formula
    assert rows[0]["question"] == first.answers[0].question
    assert rows[0]["reference"] == first.answers[0].answer_gt
    assert float(rows[0]["2_sft score"]) == first.answers[0].score
    assert float(rows[0]["change"]) == first.change
    assert seen.problems == []


def test_hostile_texts_stay_text(browser, folder):
    seen = Seen(browser, folder / "packed.html")
    seen.page.evaluate("() => document.querySelectorAll('details').forEach(one => (one.open = true))")
    card = seen.page.locator(".card").first
    assert HOSTILE in card.locator(".answer > p").first.text_content()
    assert HOSTILE in card.locator(".quoted").first.text_content()
    assert HOSTILE in card.locator(".question").text_content()
    assert seen.page.locator("img").count() == 0
    assert seen.page.locator("script").count() == 3
    injected = "() => { const one = document.createElement('script'); one.textContent = 'alert(3)';"
    seen.page.evaluate(injected + " document.body.append(one); }")  # the policy refuses it, and says so
    assert len(seen.problems) == 1
    assert "Content Security Policy" in seen.problems[0]


@pytest.mark.parametrize("width", [420, 1200])
def test_nothing_runs_out_of_the_page(browser, folder, width):
    seen = Seen(browser, folder / "packed.html")
    seen.page.set_viewport_size({"width": width, "height": 900})
    assert seen.page.evaluate("() => document.documentElement.scrollWidth") == width

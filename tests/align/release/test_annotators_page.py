"""The page on annotators: what it says, that it is one file, and that what people typed stays text."""

import re
from html.parser import HTMLParser

import pytest

from align.release import annotators
from preference_data.preferences.quality import assess
from preference_data.schema import Prompt, Turn
from tests.preference_data.votes import judged

HOSTILE = "</p></article><script>alert(1)</script><img src=x onerror=alert(2)>\"'$x^$&{{ 7*7 }}"


class Page(HTMLParser):
    """The elements of a page with their attributes, its text, and the cells of its rows by first cell."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.text, self.rows, self.in_cell = [], "", [], False
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag):
        self.in_cell = self.in_cell and tag not in ("td", "th")

    def handle_data(self, data):
        self.text += data
        if self.in_cell:
            self.rows[-1][-1] += data.strip().replace("\xa0", " ")

    def row(self, *start):
        return next(row for row in self.rows if tuple(row[: len(start)]) == start)


def answer(comparison, who, choice, **more):
    named = {"id": f"{comparison} {who}", "comparison": comparison, "seconds": 10.0}
    return judged(more.pop("texts", "xy"), choice, annotator=who, **named | more)


def two_annotators(n=40):
    """Lisa always picks A; Ann picks A and B in turn. Two gold answers each, Ann's both right."""
    made = []
    for i in range(n):
        made += [answer(f"u{i}", "lisa", "a"), answer(f"u{i}", "ann", "ab"[i % 2])]
    for i in range(2):
        gold = {"purpose": "gold", "expected": "ab"[i]}
        made += [answer(f"g{i}", "lisa", "a", **gold), answer(f"g{i}", "ann", "ab"[i], **gold)]
    return made


@pytest.fixture
def page(tmp_path):
    def write(given, examples=(), **more):
        found = assess(given, min_heard=0.8, seed=0, **more)
        path = tmp_path / "page.html"
        annotators.write(found, path, title="Annotators of 4_annotate", examples=examples)
        return Page(path.read_text(encoding="utf-8"))

    return write


def test_remarks_come_first_and_in_words(page):
    text = page(two_annotators()).text
    remark = "lisa prefers what is shown first in 100 % of 40 clear answers about factuality (50 % expected)."
    assert text.index(remark) < text.index("Do they agree?")
    assert "ann prefers" not in text


def test_numbers_are_those_of_the_report(page):
    found = page(two_annotators(), clip_seconds={"p": 20.0})
    # 20 of 40 agree; 60 a and 20 b of 80: chance (60*59 + 20*19)/(80*79) = 0.620; (0.5-0.62)/0.38 = -0.32.
    assert found.row("Factuality")[1] == "−0.32"
    assert found.row("Behaviour")[2] == "undefined: all answers are the same"
    assert found.row("lisa", "42")[2:5] == ["40", "0", "2"]
    assert found.row("ann", "100 %")[2] == "2 of 2"
    assert found.row("lisa", "50 %")[2] == "1 of 2"
    assert found.row("lisa", "Factuality")  # the first table by annotator and question is on retests: none
    assert found.row("lisa", "Factuality")[2] == "–"
    assert ["ann", "Factuality", "50 %", "20 of 40"] in [row[:4] for row in found.rows]
    assert found.row("all", "84")[2:5] == ["80", "0", "4"]
    assert ["lisa", "42", "10.0 s", "10.0 s to 10.0 s", "100 %"] in [row[:5] for row in found.rows]


def test_the_page_is_one_file_that_runs_nothing(page):
    found = page(two_annotators())
    policy = next(
        a["content"] for tag, a in found.elements if a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy.startswith("default-src 'none'")
    assert not [tag for tag, _ in found.elements if tag in ("script", "link", "iframe", "img")]
    assert not [a for _, a in found.elements if {"src", "href"} & a.keys()]


def test_what_people_typed_is_shown_literally(page):
    given = two_annotators(4)
    typed = {"rationale": HOSTILE, "corrected": f"better {HOSTILE}", "errors": ((), ("omission",))}
    given.append(answer("h", HOSTILE, "b", texts=(f"A {HOSTILE}", f"B {HOSTILE}"), **typed))
    prompt = Prompt(
        id="p", audios=("a.wav",), question=f"Q {HOSTILE}", answer_gt="", meta_info="{}", task_name="t"
    )
    found = page(given, annotators.examples(given, {"p": prompt}))
    assert not [tag for tag, _ in found.elements if tag in ("script", "img")]
    assert not [name for _, a in found.elements for name in a if name.startswith("on")]
    for text in (f"better {HOSTILE}", f"A {HOSTILE}", f"B {HOSTILE}", f"Q {HOSTILE}", f"Why{HOSTILE}"):
        assert text in found.text
    assert "omission" in found.text
    assert sum(tag == "article" for tag, _ in found.elements) == 1


def test_a_question_is_shown_after_what_was_said_before(page):
    earlier = Turn(question=HOSTILE, answer="Rain.", audios=("a.wav",))
    own = {"id": "p", "audios": ("a.wav",), "answer_gt": "", "meta_info": "", "task_name": "t"}
    prompt = Prompt(history=(earlier,), question="Loud?", **own)
    given = [answer("h", "ann", "b", rationale="so")]
    found = page(given, annotators.examples(given, {"p": prompt}))
    assert f"User (audio 1): {HOSTILE}\nAssistant: Rain.\nUser: Loud?" in found.text


def test_a_dozen_examples_chosen_the_same_way_each_time():
    given = [answer(f"u{i}", "ann", "a", rationale=f"because {i}" if i % 2 else " ") for i in range(60)]
    prompts = {"p": Prompt(id="p", audios=(), question="What?", answer_gt="", meta_info="{}", task_name="t")}
    found = annotators.examples(given, prompts)
    assert len(found) == 12
    assert all(judgement.rationale.startswith("because ") for judgement, _ in found)
    assert annotators.examples(given[::-1], prompts) == found


@pytest.mark.parametrize("given", [[], [answer("u", "ann", "tie", seconds=None, heard=None)]])
def test_next_to_nothing_makes_a_page_too(page, given):
    text = re.sub(r"\s+", " ", page(given).text)
    assert "Whether annotators agree on factuality is unknown" in text
    assert f"{len(given)} answers of {len(given)} annotators" in text

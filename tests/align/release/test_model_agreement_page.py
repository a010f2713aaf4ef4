"""The page on annotators where a model judged too: its figures beside people's, a hostile name as text."""

import re

import pytest

from align.release import annotators
from preference_data.preferences.quality import assess

HOSTILE = "<img src=x onerror=alert(1)>{{ 7*7 }}"
RATE = {"value": 0.25, "low": 0.125, "high": 0.5, "n": 12}
AGREEMENT = {"share": RATE, "pairs": 30, "gold": 4, "ties": 5}
NOTHING = {"share": None, "pairs": 0, "gold": 0, "ties": 0}
MODEL = {
    "judge": HOSTILE,
    "hears": True,
    "prompt_sha256": "0123456789abcdef",
    "comparisons": 20,
    "judged": 18,
    "replies": {"used": 38, "not_json": 2},
    "agreement": {"axes": {"factuality": AGREEMENT, "behaviour": NOTHING}, "overall": AGREEMENT},
    "biases": {
        "model": {"flips": RATE, "first_place": None, "longer": RATE, "own": None},
        "people": {"flips": None, "first_place": RATE, "longer": RATE, "own": None},
    },
}


@pytest.fixture
def rows(tmp_path):
    def write(model):
        path = tmp_path / "quality.html"
        annotators.write(assess([], min_heard=0.8, seed=0), path, title="Annotators", model=model)
        html = path.read_text(encoding="utf-8").replace("\xa0", " ")
        marked = re.findall(r'<tr data-(?:model-axis|bias)="(\w+)">(.*?)</tr>', html, re.DOTALL)
        return html, {name: re.sub("<[^>]*>", " ", row).split() for name, row in marked}

    return write


def test_agreement_and_biases_are_there(rows):
    html, cells = rows(MODEL)
    assert cells["factuality"] == [
        *"Factuality 25 % 12 % to 50 %, n 12 30 4 gold, 5 tied by the model –".split()
    ]
    assert cells["behaviour"] == [*"Behaviour – 0 0 gold, 0 tied by the model –".split()]
    assert cells["overall"][:3] == ["Both", "25", "%"]
    assert cells["longer"].count("25") == 2
    assert cells["first_place"].count("–") == 1
    assert cells["own"].count("–") == 2
    assert "heard the clips" in html
    assert "18 of 20 comparisons" in html
    assert "38 used, 2 not json" in html


def test_a_hostile_name_is_text(rows):
    html, _ = rows(MODEL)
    assert "No person judged" in html
    assert "Who answered" not in html
    assert "<img" not in html
    assert "49" not in html.split('id="model"')[1].split("</section>")[0]


def test_a_model_that_cannot_hear_is_called_so_and_without_one_there_is_no_section(rows):
    assert "cannot hear: it read each clip" in rows(MODEL | {"hears": False})[0]
    assert 'id="model"' not in rows(None)[0]

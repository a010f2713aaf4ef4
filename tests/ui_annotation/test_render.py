"""Text appears exactly as written: nothing in it means anything to HTML, markdown or the formula renderer."""

import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown import markdown

from preference_data.schema import Prompt, Turn
from ui_annotation.render import conversation, durations, plain, player, players, sources, verbatim

HOSTILE = [
    '<img src=x onerror="fetch(`//evil.example`)">',
    "</script><script>alert(1)</script>",
    "</p></div><svg onload=alert(1)>",
    "$' $` $& $$ #TEMPLATE# $x^2$ \\(y\\)",
    "[click](javascript:alert(1)) ![x](//evil.example/x.png)",
    "<object data=javascript:alert(1)></object><iframe srcdoc='<script>1</script>'>",
    "<a href='https://evil.example'>here</a> https://evil.example www.evil.example a@evil.example",
    "&lt;b&gt; &amp;amp; &#60;i&#62; &copy",
    "# heading\n\n* item\n\n1. one\n\n    code\n\n> quote\n\n---\n\n| a | b |\n|---|---|",
    "**bold** _em_ ~~gone~~ `code` ```\nfence\n```",
    "two\n\nparagraphs\r\n\r\nand\ttabs   and    spaces \n",
    "\x00\x01\x1b[31m\x7f\x80\x85\u2028\u2029\u202e\ufeff",
    "{{ record.fields }} ${x} <% y %>",
    "<style>*{display:none}</style><!-- -->",
    "<p onclick=x>&#10;</p>",
    "中文 العربية 🎧 e\u0301",
    "",
]


class Shown(HTMLParser):
    """What a browser would make of a field: its elements and its text."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.elements, self.text = [], ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


@given(st.text())
def test_plain_is_the_inverse(text):
    assert plain(verbatim(text)) == text


@given(st.text(alphabet="<>&;#0123456789p/ \n\r\t$`*_[]()!|\\"))
def test_plain_is_the_inverse_of_markup(text):
    assert plain(verbatim(text)) == text


@given(st.text())
def test_no_character_can_mean_anything(text):
    inner = re.fullmatch(r"<p [^>]*>(.*)</p>", verbatim(text), re.DOTALL)[1]
    inner = re.sub(r"&#\d+;", "", inner)
    assert not set(inner) & set('<>&"#*_`$[]{}|~\\:/@=+^%\n\r\t\x0b\x0c\x00')


@pytest.mark.parametrize("text", HOSTILE)
def test_markdown_leaves_hostile_text_alone(text):
    field = verbatim(text)
    assert "\n" not in field
    for html in (field, markdown(field, extensions=["extra"])):
        shown = Shown(html)
        assert [tag for tag, _ in shown.elements] == ["p"]
        assert set(shown.elements[0][1]) == {"style"}
        if not set(text) & set("\x00\x01\x1b"):  # html.parser drops control characters
            assert shown.text.strip("\n") == text.strip("\n")


def test_fields_of_others_are_refused():
    for field in ("seven", "<p>seven</p>", verbatim("seven") + "x"):
        with pytest.raises(ValueError, match="not a field of ours"):
            plain(field)


def test_players_name_each_clip_and_its_length():
    urls = [f"/media/audio/{'a' * 64}.wav", f"/media/audio/{'b' * 64}.flac"]
    field = players([(urls[0], 3.21), (urls[1], 30)])
    assert sources(field) == tuple(urls)
    shown = Shown(field)
    assert shown.text == "Audio 1 (3.2 s)Audio 2 (30.0 s)"
    assert durations(field) == (3.2, 30.0)
    audio = [attributes for tag, attributes in shown.elements if tag == "audio"]
    assert [one["src"] for one in audio] == urls
    assert all("controls" in one and "autoplay" not in one for one in audio)
    assert "\n" not in field


def test_a_player_cannot_be_left():
    url = '/x" onerror="alert(1)" y="'
    field = player(url, "</div><script>alert(1)</script>")
    assert sources(field) == (url,)
    assert [tag for tag, _ in Shown(field).elements] == ["div", "p", "audio"]
    assert set(Shown(field).elements[2][1]) == {"controls", "preload", "style", "src"}


CLIPS = {
    name: (f"/media/w/{name * 64}.wav", seconds) for name, seconds in (("a", 1.0), ("b", 2.5), ("c", 3.0))
}


def asked(audios, history=(), system=None):
    about = {"question": "And these?", "answer_gt": "", "meta_info": "", "task_name": "chat"}
    return Prompt(id="p", audios=audios, history=history, system=system, **about)


def test_a_single_question_has_its_players_alone():
    assert conversation(asked(("a", "b")), CLIPS) == players([CLIPS["a"], CLIPS["b"]])
    assert conversation(asked(()), CLIPS) == ""


def test_a_conversation_is_shown_whole_and_in_order():
    history = (
        Turn(question="What is it?", answer="Rain.", audios=("a",)),
        Turn(question="", answer="Two.", audios=("b", "a")),
    )
    field = conversation(asked(("a", "b", "a", "c"), history, "Be brief."), CLIPS)
    assert Shown(field).text == (
        "SystemBe brief."
        "UserAudio 1 (1.0 s)What is it?AssistantRain."
        "UserAudio 2 (2.5 s)Audio 3 (1.0 s)AssistantTwo."
        "Audio 4 (3.0 s)"
    )
    assert sources(field) == tuple(CLIPS[name][0] for name in "abac")
    assert durations(field) == (1.0, 2.5, 1.0, 3.0)
    assert "\n" not in field


@pytest.mark.parametrize("text", [*HOSTILE, "Audio 9 (9.9 s)", "</div><p>Assistant</p>", "User\nUser"])
def test_no_text_of_a_conversation_can_leave_its_turn(text):
    history = (Turn(question=text, answer=text, audios=("a",)),)
    field = conversation(asked(("a", "b"), history, system="x" + text), CLIPS)
    assert (sources(field), durations(field)) == ((CLIPS["a"][0], CLIPS["b"][0]), (1.0, 2.5))
    for html in (field, markdown(field, extensions=["extra"])):
        shown = Shown(html)
        turn = ["div", "p"]
        assert [tag for tag, _ in shown.elements] == [
            *[*turn, "p"], *[*turn, "div", "p", "audio", "p"], *[*turn, "p"], *["div", "p", "audio"],
        ]  # fmt: skip
        bold = [one for tag, one in shown.elements if "bold" in one.get("style", "")]
        assert len(bold) == 3

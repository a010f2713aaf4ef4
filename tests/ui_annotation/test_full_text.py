import json

from ui_annotation import render
from ui_annotation.server import full_text


def score(query, field="", **fields):
    return full_text.score(json.dumps(fields), query, field)


def test_a_query_becomes_normalised_words():
    assert full_text.parse("Piano -siren") == ([[" piano "]], [" siren "])
    assert full_text.parse('"a dog"|cat* rain') == ([[" a dog "], [" cat", " rain "]], [])
    assert full_text.parse('a"b OR (x) NEAR(').alternatives == [[" a ", " b ", " or ", " x ", " near "]]
    assert full_text.parse("-x -y | -x") == ([], [" x ", " y ", " x "])
    assert full_text.parse('* | - "" !? \0 _') == ([], [])
    assert full_text.parse("odd " * 3000) == ([[" odd "] * 200], [])


def test_records_are_scored_by_the_words_that_were_wanted():
    fields = {
        "prompt": render.verbatim("What is heard?"),
        "answer": render.verbatim("A dog, a DOG: café\n'x'"),
    }
    assert score("dog", **fields) == score("siren | dog", **fields) == 2
    assert score("dog heard", **fields) == 3
    assert score("dog heard", "answer", **fields) is None
    assert score("dog -heard", "answer", **fields) == 2
    assert score("dog -heard", **fields) is None
    assert score("-siren", **fields) == 0
    assert score('"dog a dog"', **fields) == score("caf*", **fields) == score("Cafe", **fields) == 1
    assert score("do", **fields) is score("", **fields) is score("!", **fields) is score("x", "else") is None


def test_odd_fields_are_searched_without_their_markup():
    fields = {
        "chat": [{"role": "user", "content": "a <b>zebra</b>"}],
        "page": {"url": "data:audio/wav;base64,AAAAxylophone", "caption": "quokka"},
        "image": "data:image/png;base64,AAAAxylophone",
        "raw": "1 < 2 &#38; &amp;amp; 3 &# 4",
        "none": None,
        "empty": "",
    }
    assert score('"user a zebra"', "chat", **fields) == 1
    assert score("quokka", "page", **fields) == 1
    assert score("xylophone", **fields) is score("b", **fields) is None
    assert score('"1 2 amp 3 4"', "raw", **fields) == 1
    assert score("zebra quokka amp", **fields) == 3
    assert [score("x", name, **fields) for name in ("none", "empty")] == [None, None]

"""In which script an answer is, beside its question and its reference."""

import pytest

from align.evaluation.scripts import in_another_script, words

ENGLISH, CHINESE = "Which word is spoken?", "说了哪个词？"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The speaker says seven.", {"LATIN": 4}),
        ("说话者说“seven”。", {"CJK": 4, "LATIN": 1}),
        ("ピアノをひく人々", {"KANA": 6, "CJK": 2}),
        ("피아노가 연주된다", {"HANGUL": 2}),
        ("Играет пианино", {"CYRILLIC": 2}),
        ("يعزف البيانو", {"ARABIC": 2}),
        ("पियानो बजता है", {"DEVANAGARI": 3}),  # vowel signs are part of their words
        ("cafe\u0301 \uff41\uff42 \U0001d41a", {"LATIN": 3}),  # combined, full-width and mathematical letters
        ("42 ♪ ❤\ufe0f …", {}),
    ],
)
def test_words_are_counted_by_script(text, expected):
    assert words(text) == expected


@pytest.mark.parametrize(
    ("answer", "texts", "expected"),
    [
        ("The piano plays.", (ENGLISH, "The speaker says seven."), False),
        ("钢琴在演奏。", (ENGLISH, "The speaker says seven."), True),
        ("The piano plays.", (CHINESE, "说了七。"), True),
        ("钢琴在演奏。", (CHINESE, "说了七。"), False),
        ("你好", ("Translate into Chinese.", "您好"), False),  # the language of the reference
        ("Nǐ hǎo means hello", ("Translate into Chinese.", "您好"), False),  # that of the question
        ("The speaker says in Chinese: 好", (ENGLISH, "Hello."), False),  # a quotation
        ("The speaker 说话者说 seven 七 in 中文", (ENGLISH, "Seven."), True),  # two languages mixed
        ("42.", (ENGLISH, "Forty-two."), None),
        ("", (ENGLISH, "Seven."), None),
        ("The piano plays.", ("?", "42"), None),
    ],
)
def test_an_answer_is_foreign_where_neither_question_nor_reference_has_its_script(answer, texts, expected):
    assert in_another_script(answer, *texts) is expected

"""Which choice an answer names: every wrapping with its value by hand, and what must never be read."""

import pytest

from align.evaluation.benchmarks.choices import read_choice

ANIMALS = ("dog", "cat", "bird", "")
MALES = ("male", "female", "a child", "no one")
SCALES = ("A minor", "C major", "D major", "F# minor")

NAMED = {
    "A": "A",
    "b": "B",
    "a": "A",
    "B.": "B",
    "B。": "B",
    "B、": "B",
    "(B)": "B",
    "[B]": "B",
    '"B"': "B",
    "'B'": "B",
    "“B”": "B",
    "`B`": "B",
    "**B**": "B",
    "__B__": "B",
    "*(B)*": "B",
    "**B.** cat": "B",
    "$B$": "B",
    "Ｂ": "B",
    "（Ｂ）": "B",
    "  B\n": "B",
    "B) cat": "B",
    "(b) cat": "B",
    "b. cat": "B",
    "B: cat": "B",
    "B - cat": "B",
    "B – a cat": "B",
    "B cat": "B",
    "A dog": "A",  # as a letter and as an article the same
    "C, a bird": "C",
    "B\nThe clip holds a cat.": "B",
    "I hear it meow.\n\nB": "B",
    "First barking?\nNo, meowing.\n(B)": "B",
    "<answer>B</answer>": "B",
    "<answer> (B) cat </answer>": "B",
    "<answer>cat</answer>": "B",
    "<Answer>b</Answer>": "B",
    "It barks. <answer>\nB\n</answer> A": "B",
    "<final_answer>B</final_answer>": "B",
    "<answer>B": "B",  # a server that stops at the closing tag leaves it out
    "&lt;answer&gt;B&lt;/answer&gt;": "B",
    "<|channel|>analysis<|message|>A.<|end|><|start|>assistant<|channel|>final<|message|>B": "B",
    "Selected: B": "B",
    "I think B": "B",
    "Probably B.": "B",
    "B選項": "B",
    r"\boxed{B}": "B",
    r"The answer is $\boxed{\text{B}}$.": "B",
    "<think>A?</think>B": "B",
    "<think>It could be A. or C.</think>\n\nThe answer is B.": "B",
    "So A or C? No.</think>B": "B",
    "<thinking>A</thinking><answer>B</answer>": "B",
    "[THINK]A[/THINK]B": "B",
    '{"answer": "B"}': "B",
    '{"Answer": "(B) cat"}': "B",
    '```json\n{"reason": "A dog?", "answer": "B"}\n```': "B",
    'Here it is: {"choice": "b"}': "B",
    "Answer: B": "B",
    "answer: b": "B",
    "Answer:\nB": "B",
    "ANSWER: (B)": "B",
    "**Answer:** B": "B",
    "**Answer**: **B**": "B",
    "Answer B": "B",
    "Ans: B": "B",
    "#### B": "B",
    "Final answer: B. cat": "B",
    "The answer is B": "B",
    "The answer is: B.": "B",
    "The answer is (b).": "B",
    "the answer is b": "B",
    "The answer is cat.": "B",
    "The correct answer is a cat.": "B",
    "The correct answer is option B.": "B",
    "The correct option is c, a bird": "C",
    "The right choice would be B because it meows.": "B",
    "The answer is A because it barks.": "A",
    "My answer is 'B'.": "B",
    "Option B": "B",
    "option b is correct": "B",
    "Choice (B)": "B",
    "B is correct.": "B",
    "I think B is the right answer.": "B",
    "I choose B.": "B",
    "I would select option B.": "B",
    "I'd go with B.": "B",
    "It's B.": "B",
    "It is a cat.": "B",
    "It should be (B)": "B",
    "The answer is most likely B.": "B",
    "B<|im_end|>": "B",
    "{'answer': 'B'}": "B",
    "✅ B": "B",
    "答：B": "B",
    "我认为是B": "B",
    "《B》": "B",
    "The answer: option (B)": "B",
    "[[B]]": "B",
    "It is not A. The answer is B.": "B",
    "选B": "B",
    "选 B。": "B",
    "我选择B": "B",
    "选项B": "B",
    "應選B": "B",
    "故选（B）。": "B",
    "答案是B": "B",
    "答案：B": "B",
    "答案：（B）": "B",
    "答案为 B。": "B",
    "答案选B": "B",
    "正确答案是B，因为有猫叫。": "B",
    "B是正确的": "B",
    "B 选项正确": "B",
    "答案不是A，是狗叫吗？答案是B。": "B",
    "cat": "B",
    "Cat.": "B",
    "a cat": "B",
    "The cat!": "B",
    '"cat"': "B",
    "**cat**": "B",
    "CAT": "B",
    "A cat": "B",  # an article before the text of another choice
}

UNREAD = (
    "",
    "   ",
    "None",
    "A dog barks.",
    "A dog barks, then a bird sings.",
    "a dog barks",
    "I",
    "I hear a dog.",
    "A loud noise",
    "As far as I can tell, no animal",
    "Be quiet",
    "Bird and cat",
    "I cannot hear a dog or a cat.",
    "I'm sorry, I can't answer that.",
    "无法判断",
    "The answer is a",
    "It is a",
    "It's a D major chord",
    "It's a beautiful song",
    "选手A在唱歌",
    "...B",
    "The answer is (A) or (B)",
    "The answer is a dog barking",
    "The answer is A dog barking",
    "The answer is not B.",
    "The answer isn't B.",
    "I don't think the answer is B.",
    "I am not sure whether the answer is B.",
    "答案不是B",
    "不选B",
    "B不正确",
    "B is wrong.",
    "A, B",
    "A or B",
    "A and B",
    "A/B",
    "(A) or (B)",
    "A. dog B. cat C. bird",
    "A. The answer is B",
    "The answer is A or B.",
    "The answer is A. No, the answer is B.",
    "Answer: A, B",
    "答案是A或B",
    "答案是A和B",
    "选A还是选B",
    "<answer>A</answer> <answer>B</answer>",
    r"\boxed{A} \boxed{B}",
    '{"answer": "A or B"}',
    "<think>It must be B",
    "<think>The answer is B.",
    "B <think>or A",
    "B. dog",  # the letter of one choice, the text of another
    "The answer is B, dog.",
    "D",  # not offered
    "The answer is D.",
    "E",
    "BB",
    "B2",
    "Bravo",
    "Both",
    "dog cat",
    "Answer:",
    "答案",
    "The answer",
    "?",
    "B?",
)


@pytest.mark.parametrize("response", NAMED)
def test_a_choice_is_read_in_every_wrapping(response):
    assert read_choice(response, ANIMALS) == NAMED[response]


def test_an_answer_without_end_takes_no_time():
    for text in ("the answer is ", "答案是", "(", "<answer>", "\\boxed{", "A "):
        assert read_choice(text * 20_000, ANIMALS) is None
    assert read_choice("It meows. " * 20_000 + "The answer is B.", ANIMALS) == "B"


@pytest.mark.parametrize("response", UNREAD)
def test_what_names_no_choice_or_two_is_not_read(response):
    assert read_choice(response, ANIMALS) is None


@pytest.mark.parametrize(
    ("response", "choices", "letter"),
    [
        ("C major", SCALES, "B"),  # the text, not the letter C
        ("A minor.", SCALES, "A"),
        ("F# minor", SCALES, "D"),
        ("The answer is D major.", SCALES, "C"),
        ("C", SCALES, "C"),
        ("C sharp", SCALES, None),
        ("child", MALES, "C"),
        ("No one.", MALES, "D"),
        ("no", MALES, None),
        ("female", MALES, "B"),
        ("5", ("5", "-5", "", ""), "A"),
        ("-5", ("5", "-5", "", ""), "B"),
        ("B", ("A", "C", "D", "B"), None),  # the letter of one choice, the text of another
        ("कि", ("का", "कि", "", ""), "B"),
        ("का", ("का", "कि", "", ""), "A"),
        ("😀", ("😡", "😀", "", ""), "B"),
        ("狗叫。", ("猫叫", "狗叫", "", ""), "B"),
        ("答案是狗叫。", ("猫叫", "狗叫", "", ""), "B"),
        ("...", ("!!!", "...", "", ""), "B"),
        ("dog", ("dog", "Dog", "", ""), "A"),
        ("DOG", ("dog", "Dog", "", ""), None),  # alike but for case: only to the letter
        ("1.5 s", ("1.5 s", "15 s", "", ""), "A"),
    ],
)
def test_the_text_of_a_choice_is_its_letter(response, choices, letter):
    assert read_choice(response, choices) == letter


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("A:7/1", "B"),
        ("B:maj7/1", "A"),
        ("<answer>A:7/1</answer>", "B"),
        ("D", None),
        ("A", "A"),
    ],
)
def test_a_choice_said_letter_by_letter_is_not_another_ones_letter(response, letter):
    assert read_choice(response, ("B:maj7/1", "A:7/1", "D", "E")) == letter

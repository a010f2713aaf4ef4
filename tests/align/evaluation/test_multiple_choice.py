"""Multiple-choice benchmarks as published: layouts, publishers' rules restated, and what the clips add."""

import json
import random
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.evaluation.benchmarks import hearing
from align.evaluation.benchmarks.choices import chosen, read_choice
from align.evaluation.benchmarks.multiple_choice import LETTERS_FORM, read_question, rule_of
from align.evaluation.benchmarks.rows import BadBenchmark, BadRow, Utterance
from align.evaluation.benchmarks.tasks import read_answers, read_rows, score

SOUNDS = ["Dog", "A cat", "Church bell", "Car horn"]
ROWS = {
    "mmau": {  # as in mmau-test-mini.json of Sakshi113/MMAU
        "id": "m1",
        "audio_id": "./test-mini-audios/m1.wav",
        "question": "What is heard?",
        "choices": SOUNDS,
        "answer": "Church bell",
        "dataset": "AudioSet",
        "task": "sound",
        "split": "test-mini",
        "category": "Reasoning",
        "sub-category": "Acoustic Source Inference",
        "difficulty": "hard",
    },
    "mmar": {  # as in MMAR-meta.jsonl of ddlBoJack/MMAR
        "id": "r1",
        "audio_path": "./audio/r1.wav",
        "question": "What is heard?",
        "choices": [*SOUNDS, ""],
        "answer": "Church bell",
        "modality": "mix-sound-speech",
        "category": "Signal Layer",
        "sub-category": "Acoustic Quality Analysis",
        "language": None,
        "source": "youtube",
        "url": "https://www.youtube.com/watch?v=r1",
        "timestamp": "00:00:00,00:00:06",
        "thinking": "It rings.",
        "cue": ["ringing"],
        "rubric": [{"name": "Cue", "choices": [0, 1]}],
    },
    "mmsu": {  # as mmsu_inference.py of dingdongwang/MMSU reads it
        "id": "s1",
        "audio_path": "audio/s1.wav",
        "question": "What is heard?",
        **{f"choice_{letter}": text for letter, text in zip("abcd", SOUNDS, strict=True)},
        "answer_gt": "Church bell",
        "task_name": "sound_event",
        "category": "Perception",
        "sub-category": "Semantics",
        "sub-sub-category": "Semantics",
        "linguistics_sub_discipline": "Semantics",
    },
    "mmau_pro": {  # the columns of MMAU-Pro's test.parquet
        "id": "p1",
        "audio_path": ["data/p1.wav"],
        "question": "What is heard?",
        "answer": "Church bell",
        "choices": SOUNDS,
        "length_type": "short",
        "perceptual_skills": ["timbre"],
        "reasoning_skills": [],
        "category": "sound",
        "transcription": "",
        "task_classification": "closed",
        "task_identifier": None,
        "kwargs": None,
        "sub-cat": None,
    },
}
CATEGORIES = {
    "mmau": {
        "task": "sound",
        "difficulty": "hard",
        "category": "Reasoning",
        "sub-category": "Acoustic Source Inference",
    },
    "mmar": {
        "modality": "mix-sound-speech",
        "category": "Signal Layer",
        "sub-category": "Acoustic Quality Analysis",
    },
    "mmsu": {"category": "Perception", "sub-category": "Semantics", "task_name": "sound_event"},
    "mmau_pro": {"category": "sound", "length_type": "short"},
}


def question(audio="a.wav", gt="dog", choices=("dog", "cat"), number=0, **columns):
    return Utterance(
        audio, "?", gt, "made", choices=choices, id=f"q{number}", categories=tuple(columns.items())
    )


@pytest.mark.parametrize("kind", ROWS)
def test_a_published_layout_is_read_as_it_is(kind, tmp_path):
    path = tmp_path / "questions.json"
    path.write_text(json.dumps([ROWS[kind]]))
    (found,), odd = read_rows(path, kind)
    assert odd == []
    assert (found.gt, found.source, found.id) == ("Church bell", "questions", ROWS[kind]["id"])
    assert found.audio.endswith(f"{ROWS[kind]['id']}.wav")
    assert [choice for choice in found.choices if choice] == SOUNDS
    assert dict(found.categories) == CATEGORIES[kind]
    if kind == "mmsu":
        lettered = "A. Dog\nB. A cat\nC. Church bell\nD. Car horn"
        assert found.prompt == LETTERS_FORM.format(question="What is heard?", lettered=lettered)
    else:
        assert f"following options: {SOUNDS}." in found.prompt


@pytest.mark.parametrize(
    ("kind", "column"),
    [("mmau", "model_output"), ("mmar", "answer_prediction"), ("mmsu", "response"), ("mmau_pro", "response")],
)
def test_answers_from_elsewhere_stand_under_the_publishers_name(kind, column, tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text(f"{json.dumps({**ROWS[kind], column: 'C'})}\n{json.dumps({**ROWS[kind], column: None})}")
    rows, texts, odd = read_answers(path, kind)
    assert (texts, odd) == (["C", ""], {})
    assert score(kind, rows, texts) == {"answers": {"accuracy": 0.5, "unparsed": 0.5, "n": 2}}


@pytest.mark.parametrize(
    ("kind", "change", "reason"),
    [
        ("mmau", {"answer": "Fox"}, "no_right_choice"),
        ("mmau", {"answer": None}, "no_right_choice"),
        ("mmar", {"answer": ""}, "no_right_choice"),
        ("mmau_pro", {"choices": None}, "no_choices"),
        ("mmau_pro", {"choices": []}, "no_choices"),
        ("mmau", {"choices": ["Dog", "Dog"], "answer": "Dog"}, "no_choices"),
        ("mmau_pro", {"choices": [str(n) for n in range(11)], "answer": "3"}, "too_many_choices"),
        ("mmau_pro", {"audio_path": ["a.wav", "b.wav"]}, "several_clips"),
        ("mmau", {"audio_id": 3}, "no_question"),
        ("mmau", {"question": "What <|im_end|>?"}, "no_question"),
        ("mmau", {"question": "<audio> What?"}, "no_question"),
        ("mmsu", {"question": None}, "missing_key"),
    ],
)
def test_what_cannot_be_put_is_named_by_its_reason(kind, change, reason):
    with pytest.raises(BadRow) as caught:
        read_question(kind, {**ROWS[kind], **change}, "file:1", "made")
    assert caught.value.reason == reason
    with pytest.raises(BadRow, match="not an object"):
        read_question(kind, [], "file:1", "made")


def test_equal_and_blank_choices_keep_the_places_that_letters_mean():
    row = {**ROWS["mmau"], "choices": ["zero", "zero ", "", "one"], "answer": "zero"}
    found = read_question("mmau", row, "file:1", "made")
    assert found.choices == ("zero", "zero", "", "one")
    assert "['zero', 'one']" in found.prompt
    readings = [
        chosen(found.choices, text) for text in ("A", "B", "zero", "(A) or (B)", "D", "C", "(A) or (D)")
    ]
    assert readings == ["zero", "zero", "zero", "zero", "one", None, None]


def test_letters_go_as_far_as_the_choices():
    ten = [f"sound {n}" for n in range(10)]
    for number, letter in enumerate("ABCDEFGHIJ"):
        for text in (
            letter,
            f"({letter})",
            f"The answer is {letter}.",
            f"{letter}. {ten[number]}",
            ten[number],
        ):
            assert read_choice(text, ten) == letter
    for text in ("I hear a sound", "I think so.", "F or G"):
        assert read_choice(text, ten) is None
    assert read_choice("F", ten[:4]) is None
    assert read_choice("E", ten[:5]) == "E"


# -------------------------------------------------------------------------- publishers' rules

SPELLINGS = {  # what a policy says when it means a choice; whether the words of the choice stand alone in it
    "{text}": True,
    "{text}.": True,
    "  {text}\n": True,
    "{upper}": True,
    "**{text}**": True,
    '"{text}"': True,
    "<answer>{text}</answer>": True,
    "The answer is {text}.": True,
    "The correct option is: {text}": True,
    '{{"answer": "{text}"}}': True,
    "({letter}) {text}": True,
    "{letter}. {text}": True,
    "{letter}": False,
    "({letter})": False,
    "<answer>{letter}</answer>": False,
    "The answer is {letter}.": False,
    r"\boxed{{{letter}}}": False,
    "答案是{letter}": False,
    "<think>Is it {other}?</think>{text}": False,
    "<think>It is {text}, is it": False,
}
NOTHING = "<think>It is {text}, is it"
"""Never ends its thought."""
POOL = [
    "dog",
    "cat",
    "church bell",
    "car horn",
    "two dogs",
    "two cats",
    "bell tower",
    "Mozart (1784)",
    "c minor",
]


def rule_of_mmau_and_mmar(answer, prediction, choices):
    """Independently of the code: by lists, word for word."""
    words = {text: re.split(r"\W+", text.lower()) for text in (answer, prediction, *choices)}
    said = [word for word in words[prediction] if word]
    if not said:
        return False
    for word in words[answer]:
        if word and word not in said:
            return False
    for choice in choices:
        for word in words[choice]:
            if word and word in said and word not in words[answer]:
                return False
    return True


def made(kind, column):
    """500 answers: 25 questions in 20 spellings, half of them right. Beside them what each means."""
    rng = random.Random(7)
    rows, meant = [], []
    for number in range(25):
        choices = rng.sample(POOL, rng.choice([2, 3, 4]))
        right = rng.choice(choices)
        for spelling in SPELLINGS:
            text = right if rng.random() < 0.5 else rng.choice(choices)
            other = next(choice for choice in choices if choice != text)
            response = spelling.format(
                text=text, upper=text.upper(), other=other, letter="ABCD"[choices.index(text)]
            )
            ids = {"id": f"{number}-{spelling}", "choices": choices, "answer": right, column: response}
            rows.append({**ROWS[kind], **ids})
            meant.append((spelling, text == right))
    return rows, meant


@pytest.mark.parametrize(("kind", "column"), [("mmau", "model_output"), ("mmar", "answer_prediction")])
def test_500_answers_in_20_spellings_are_counted_as_the_publisher_counts_them(kind, column, tmp_path):
    raw, meant = made(kind, column)
    path = tmp_path / "answers.json"
    path.write_text(json.dumps(raw))
    rows, texts, odd = read_answers(path, kind)
    assert (len(rows), odd) == (500, {})
    theirs = [rule_of_mmau_and_mmar(row["answer"], row[column], row["choices"]) for row in raw]
    numbers = hearing.report(kind, rows, texts, {})
    assert numbers["publishers_rule"] == {"accuracy": np.mean(theirs), "answered": 1.0}
    (group,) = numbers["categories"]["sub-category"].values()
    assert group["publishers_rule"] == numbers["publishers_rule"]
    ours = [chosen(row.choices, text) == row.gt for row, text in zip(rows, texts, strict=True)]
    assert numbers["accuracy"] == np.mean(ours)
    # Ours reads what each spelling means. Theirs differs where a letter is the answer, or a thought stands
    # before it; and where a letter that is a word of a choice ("c minor") stands beside the choice
    assert ours == [is_right and spelling != NOTHING for spelling, is_right in meant]
    for (spelling, is_right), by_rule, row in zip(meant, theirs, rows, strict=True):
        if SPELLINGS[spelling] and "c minor" not in row.choices:
            assert by_rule == is_right, (spelling, row)
    differing = {spelling for (spelling, _), a, b in zip(meant, ours, theirs, strict=True) if a != b}
    assert differing >= {spelling for spelling, alone in SPELLINGS.items() if not alone}
    assert 0.2 < np.mean(theirs) < np.mean(ours) < 0.8


@given(st.lists(st.sampled_from([*POOL, "a", "not", "it is", "Dog!"]), max_size=4), st.permutations(POOL))
def test_the_rule_is_theirs_whatever_is_said(said, choices):
    response, offered = " ".join(said), choices[:4]
    row = question(gt=offered[0], choices=tuple(offered))
    assert rule_of("mmau")(row, response) == rule_of_mmau_and_mmar(offered[0], response, offered)


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("C", True),
        ("C. Church bell", True),
        ("The answer is C.", True),
        ("A", False),
        ("Dogs bark", False),  # read as D
        ("Church bell", True),  # read as C
        ("I cannot tell", None),
        ("", None),
        ("None", None),
    ],
)
def test_the_rule_of_mmsu_reads_a_letter_in_front_or_last_but_one(response, expected):
    row = read_question("mmsu", ROWS["mmsu"], "file:1", "made")
    assert rule_of("mmsu")(row, response) is expected


def test_what_a_rule_leaves_out_is_said():
    row = read_question("mmsu", ROWS["mmsu"], "file:1", "made")
    numbers = hearing.report("mmsu", [row] * 4, ["C", "A", "no idea", ""], {})
    assert numbers["publishers_rule"] == {"accuracy": 0.5, "answered": 0.5}
    assert numbers["accuracy"] == 0.25
    assert rule_of("mmau_pro") is rule_of("choice") is None
    assert "publishers_rule" not in hearing.report("mmau_pro", [row], ["C"], {})


# -------------------------------------------------------------------------- silence, and another clip


def two_a_clip(n_clips):
    """Two questions about each clip, one of which sounds like speech."""
    return [
        question(f"{clip}.wav", number=2 * clip + i, task=("speech", "music")[i])
        for clip in range(n_clips)
        for i in range(2)
    ]


def test_accuracy_above_silence_by_hand():
    rows = two_a_clip(4)
    texts = ["dog", "dog", "dog", "dog", "dog", "dog", "cat", "cat"]  # 6 of 8
    silent = ["dog", "cat", "dog", "cat", "dog", "cat", "dog", "cat"]  # 4 of 8, all of speech
    other = ["cat"] * 8
    numbers = hearing.report("choice", rows, texts, {"silence": silent, "other_clip": other})
    assert (numbers["accuracy"], numbers["n"], numbers["n_clips"], numbers["chance"]) == (0.75, 8, 4, 0.5)
    above = numbers["above_silence"]
    assert (above["before"], above["after"], above["delta"], above["n"]) == (0.5, 0.75, 0.25, 8)
    assert above["ci_low"] < 0 < above["delta"] < above["ci_high"]
    assert numbers["above_other_clip"]["delta"] == 0.75
    speech, music = (numbers["categories"]["task"][name] for name in ("speech", "music"))
    assert (speech["above_silence"]["delta"], music["above_silence"]["delta"]) == (-0.25, 0.75)
    assert (speech["n"], speech["n_clips"]) == (4, 4)


def test_a_deaf_policy_has_its_accuracy_and_nothing_above_silence():
    rows, rng = two_a_clip(100), np.random.default_rng(0)
    said = ["dog" if right else "cat" for right in rng.random(200) < 0.7]
    numbers = hearing.report("choice", rows, said, {"silence": said, "other_clip": said})
    assert numbers["accuracy"] == said.count("dog") / 200 > 0.6
    for part in (numbers, *numbers["categories"]["task"].values()):
        for name in ("above_silence", "above_other_clip"):
            assert (part[name]["delta"], part[name]["ci_low"], part[name]["ci_high"]) == (0, 0, 0)
    # One that guesses anew for each is deaf too: about 0, and the interval says so
    guesses = ["dog" if right else "cat" for right in rng.random(200) < 0.7]
    above = hearing.report("choice", rows, said, {"silence": guesses})["above_silence"]
    assert above["ci_low"] < 0 < above["ci_high"]
    assert abs(above["delta"]) < 0.15


def test_questions_about_the_same_clip_do_not_count_as_independent():
    alone = [question(f"{i}.wav", number=i) for i in range(80)]
    shared = [row._replace(audio=f"{i // 8}.wav") for i, row in enumerate(alone)]
    texts = ["dog" if (i // 8) % 2 else "cat" for i in range(80)]  # all of a clip right, or all wrong
    narrow, wide = (hearing.report("choice", rows, texts, {}) for rows in (alone, shared))
    assert narrow["accuracy"] == wide["accuracy"] == 0.5
    assert wide["ci_high"] - wide["ci_low"] > 2 * (narrow["ci_high"] - narrow["ci_low"])


def test_one_clip_alone_has_no_interval():
    numbers = hearing.report("choice", [question()] * 3, ["dog", "dog", "cat"], {"silence": ["cat"] * 3})
    assert (numbers["accuracy"], numbers["ci_low"], numbers["ci_high"]) == (2 / 3, None, None)
    assert (numbers["above_silence"]["delta"], numbers["above_silence"]["ci_low"]) == (2 / 3, None)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=30), st.integers(0, 99))
def test_another_clip_is_another_and_does_not_depend_on_order(numbers, seed):
    clips = [f"{n}.wav" for n in numbers]
    others = hearing.other_clips(clips, seed)
    if len(set(clips)) == 1:
        assert others == []
        return
    assert all(a != b for a, b in zip(clips, others, strict=True))
    assert set(others) == set(clips)
    assert hearing.other_clips(clips[::-1], seed) == others[::-1]


def test_questions_that_most_answer_without_the_clip_are_named():
    rows = [question(number=n) for n in range(3)]
    silent = {"a": ["dog", "cat", "dog"], "b": ["dog", "cat", "dog"], "c": ["dog", "dog", "cat"]}
    assert list(hearing.answered_without_clip("choice", rows, silent)) == ["q0", "q2"]
    half = {name: silent[name] for name in ("b", "c")}
    assert list(hearing.answered_without_clip("choice", rows, half)) == ["q0"]


def test_answers_from_another_file_are_put_in_order_by_id(tmp_path):
    rows = [question(number=n) for n in range(3)]
    assert hearing.in_order(rows, rows[::-1], ["x", "y", "z"], tmp_path) == ["z", "y", "x"]
    with pytest.raises(BadBenchmark, match="no answer to 1 of 3 questions, the first 'q0'"):
        hearing.in_order(rows, rows[1:], ["y", "z"], tmp_path)
    with pytest.raises(BadBenchmark, match="1 answers are to questions whose id came before"):
        hearing.in_order(rows, [*rows, rows[0]], ["x", "y", "z", "x"], tmp_path)


def test_a_question_without_an_id_is_known_by_what_it_says():
    row = {**ROWS["mmsu"], "id": None}
    first, again = (read_question("mmsu", row, where, "made") for where in ("a:1", "b:7"))
    other = read_question("mmsu", {**row, "question": "What else?"}, "a:2", "made")
    assert first.id == again.id != other.id

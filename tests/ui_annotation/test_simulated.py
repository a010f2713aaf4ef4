"""Simulated annotators: honest without errors, blind to the order, overlapping as asked."""

import json
from collections import Counter
from pathlib import Path

import pytest

import preference_data
from preference_data.phrasebook import Phrasebook
from preference_data.schema import Completion, Prompt
from ui_annotation.simulated import annotate, comparisons

PHRASEBOOK = Phrasebook.load(Path(preference_data.__file__).parent / "phrasebooks" / "made_world.yaml")
FACTS = {"word": "seven", "gender": "man"}
TEXTS = ["The speaker says seven.", "The speaker says tiger.", "The speaker says seven. The flute plays."]


def world(n=200):
    prompts = {
        f"p{i}": Prompt(
            id=f"p{i}",
            audios=("x.wav",),
            question="Which word is spoken?",
            answer_gt="The speaker says seven.",
            meta_info=json.dumps(FACTS),
            task_name="speech_QA",
        )
        for i in range(n)
    }
    completions = [
        Completion(id=f"{name}-{j}", prompt_id=name, index=j, text=text, policy="x")
        for name in prompts
        for j, text in enumerate([*TEXTS, TEXTS[0]])
    ]
    return prompts, completions


def judged(error_rate=0.0, overlap=0.3):
    prompts, completions = world()
    shown = comparisons(completions, per_prompt=3, seed=0)
    made = annotate(shown, prompts, PHRASEBOOK, annotators=2, overlap=overlap, error_rate=error_rate, seed=0)
    return shown, made, {one.id: one.text for one in completions}


def test_equal_answers_are_never_compared_and_sides_are_drawn_by_lot():
    shown, _, _ = judged()
    assert len(shown) == 600
    assert all(one.a.text != one.b.text for one in shown)
    first = Counter(one.a.text == TEXTS[0] for one in shown if TEXTS[0] in (one.a.text, one.b.text))
    assert first[True] / sum(first.values()) == pytest.approx(0.5, abs=0.06)


def test_without_errors_the_right_answer_wins():
    _, made, texts = judged()
    for one in made:
        a, b = texts[one.completion_a], texts[one.completion_b]
        if TEXTS[0] in (a, b):
            assert one.factuality == ("a" if a == TEXTS[0] else "b")
        else:
            assert one.factuality == "both_bad"
        if {a, b} == {TEXTS[0], TEXTS[1]}:
            assert one.behaviour == "tie"  # both are one plain sentence


def test_overlap_is_the_share_judged_by_everyone():
    shown, made, _ = judged(overlap=0.3)
    assert len(made) / len(shown) == pytest.approx(1.3, abs=0.05)
    assert {one.annotator for one in made} == {"simulated-1", "simulated-2"}


def test_errors_come_at_the_declared_rate():
    _, honest, _ = judged(error_rate=0.0, overlap=1.0)
    _, erring, _ = judged(error_rate=0.4, overlap=1.0)
    truth = {one.id: one.factuality for one in honest}
    wrong = sum(one.factuality != truth[one.id] for one in erring) / len(erring)
    assert wrong == pytest.approx(0.4 * 3 / 4, abs=0.05)  # one random choice in four is right by luck

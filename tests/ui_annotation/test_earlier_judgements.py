"""Judgements from before there were rankings go on to count."""

import json

import pytest

from preference_data import store
from preference_data.preferences import snapshots
from preference_data.schema import Completion, Prompt
from ui_annotation.assignment import Rates, draw

PROMPT = Prompt(
    id="p", audios=("a.wav",), question="What?", answer_gt="A.", meta_info="{}", task_name="speech_QA"
)
COMPLETIONS = [
    Completion(id=f"c{i}", prompt_id="p", index=i, text=text, policy="x")
    for i, text in enumerate(["a dog", "a cat", "a hen", "a cow"])
]
OLD = {
    "id": "0123456789abcdef",
    "comparison": "fedcba9876543210",
    "prompt_id": "p",
    "completion_a": "c2",
    "completion_b": "c0",
    "annotator": "ann",
    "factuality": "b",
    "behaviour": "both_bad",
    "purpose": "comparison",
    "retest_of": None,
    "expected": None,
    "errors_a": ["wrong_count"],
    "errors_b": [],
    "audio_unusable": False,
    "corrected": "two dogs",
    "rationale": None,
    "submitted_at": "2026-11-20T10:00:00+00:00",
    "seconds": 12.5,
    "heard": 0.9,
}


def test_a_choice_becomes_a_ranking_of_the_same_texts_and_its_comparison_is_drawn_as_it_was(tmp_path):
    gone = {**OLD, "id": "1", "completion_a": "gone"}
    (tmp_path / "judgements.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (OLD, gone)))
    (judgement,) = snapshots.read([tmp_path], {item.id: item.text for item in COMPLETIONS})
    assert (judgement.completions, judgement.texts) == (("c2", "c0"), ("a hen", "a dog"))
    assert (judgement.factuality.ranks, judgement.factuality.all_bad) == ((2, 1), False)
    assert (judgement.behaviour.ranks, judgement.behaviour.all_bad) == ((1, 1), True)
    assert judgement.errors == (("wrong_count",), ())
    assert (judgement.kind, judgement.annotator_kind) == ("choice", "person")
    assert (judgement.corrected, judgement.seconds, judgement.heard) == ("two dogs", 12.5, 0.9)
    for seed in range(5):
        (comparison,) = draw(
            COMPLETIONS,
            {"p": PROMPT},
            size=2,
            per_prompt=1,
            overlap=0.0,
            rates=Rates(0.0, 0.0),
            seed=seed,
            earlier=[judgement],
        )
        assert (comparison.id, comparison.texts) == (judgement.comparison, judgement.texts)


def test_a_line_that_is_not_json_is_named_with_its_file(tmp_path):
    (tmp_path / "judgements.jsonl").write_text(json.dumps(OLD) + '\n{"id": "torn')
    with pytest.raises(store.BadRecord, match=r"judgements\.jsonl:2: is not JSON"):
        snapshots.read([tmp_path], {item.id: item.text for item in COMPLETIONS})

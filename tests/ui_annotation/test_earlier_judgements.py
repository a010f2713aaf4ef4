"""Judgements from before there were rankings go on to count."""

import json

import pytest

from preference_data.preferences import snapshots
from preference_data.schema import Completion, Prompt
from preference_data.store import BadRecord
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


def line(**changed):
    return json.dumps({key: value for key, value in {**OLD, **changed}.items() if value != "none"}).encode()


@pytest.mark.parametrize(
    ("damaged", "message"),
    [
        (line()[:60], "is not JSON"),
        (line(corrected="\xe9").replace(b"\\u00e9", b"\xe9"), "is not UTF-8"),
        (b"null", "Judgement: the line"),
        (b"3", "Judgement: the line"),
        (line(prompt_id="none"), "prompt_id: Field required"),
        (line(completion_b="none"), "completion_b: Field required"),
        (line(completion_a=["c2"]), r"completion_a: .* \(got "),
        (line(factuality="c"), r"factuality: .* \(got 'c'\)"),
        (line(factuality="none"), "factuality: Field required"),
        (line(annotator=3), r"annotator: .* \(got '3'\)"),
        (line(heard=7), r"heard: .* \(got '7'\)"),
    ],
    ids=str,
)
def test_a_damaged_line_is_named_by_file_and_number(tmp_path, damaged, message):
    """Whatever form the line has; the one before it ends as Windows ends lines, after a byte-order mark."""
    file = tmp_path / "judgements.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + line() + b"\r\n\r\n" + damaged + b"\n")
    with pytest.raises(BadRecord, match=rf"judgements\.jsonl:3: .*{message}"):
        snapshots.read([tmp_path], {item.id: item.text for item in COMPLETIONS})
    file.write_bytes(b"\xef\xbb\xbf" + line() + b"\r\n\r\n")
    assert len(snapshots.read([tmp_path], {item.id: item.text for item in COMPLETIONS})) == 1

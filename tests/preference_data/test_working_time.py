"""How long annotators work: by hand."""

import pytest

from preference_data import store
from preference_data.preferences.working_time import (
    ASSUMED,
    ENOUGH,
    Pace,
    earlier_judgements,
    estimate,
    pace_of,
    working_time,
)
from preference_data.schema import Comparison, Judgement, Prompt

UNUSED = {"question": "?", "answer_gt": "", "meta_info": "{}", "task_name": "t"}
PROMPTS = {
    "short": Prompt(id="short", audios=("a.wav",), **UNUSED),
    "two": Prompt(id="two", audios=("a.wav", "b.wav"), **UNUSED),
}
LASTS = {"a.wav": 4.0, "b.wav": 26.0}


def compare(prompt_id, k, everyone):
    texts = tuple(f"text {i}" for i in range(k))
    name = f"{prompt_id}-{k}-{everyone}"
    return Comparison(id=name, prompt_id=prompt_id, completions=texts, texts=texts, everyone=everyone)


def judged(number, seconds, *, k=2, prompt_id="short", annotator_kind="person"):
    return Judgement(
        id=f"j{number}",
        comparison="c",
        prompt_id=prompt_id,
        completions=tuple(f"c{i}" for i in range(k)),
        texts=("text",) * k,
        kind="choice",
        annotator="ann",
        annotator_kind=annotator_kind,
        seconds=seconds,
    )


def test_everything_is_added_up_by_hand():
    """Three annotators: 3 judgements of 4 s and 2 completions, and 1 of 30 s and 4 completions."""
    comparisons = [compare("short", 2, True), compare("two", 4, False)]
    time = working_time(comparisons, PROMPTS, LASTS, annotators=3, pace=Pace(5.0))
    assert time[:3] == (4, 3 * 4 + 30, 3 * 10 + 20)
    assert time.hours == pytest.approx(92 / 3600)
    assert "4 judgements, 2 min of annotators' time" in str(time)
    assert str(time).endswith("5 s per completion to read and decide (assumed, not measured)")
    measured = working_time(comparisons * 100, PROMPTS, LASTS, annotators=3, pace=Pace(5.0, 1234))
    assert "400 judgements, 2.6 h of annotators' time: 1.2 h of clips" in str(measured)
    assert str(measured).endswith("(median of 1,234 earlier judgements)")


def test_what_is_expected_before_the_draw():
    """70 comparisons, 7 retests and 4 gold for one; 30, 3 and 2 for two: 81 + 70 judgements."""
    shares = {"overlap": 0.3, "retests": 0.1, "gold": 0.06, "annotators": 2}
    time = estimate(100, **shares, audio_s=3.0, completions=2, pace=ASSUMED)
    assert time[:3] == (151, 453.0, 151 * 2 * ASSUMED.per_completion_s)
    alone = estimate(100, **shares | {"overlap": 0.0}, audio_s=3.0, completions=4, pace=Pace(1.0))
    assert alone[:3] == (116, 348.0, 464.0)
    assert estimate(0, **shares, audio_s=3.0, completions=2, pace=ASSUMED).hours == 0


def test_the_pace_is_a_median_beside_the_clips_and_of_people_alone():
    """Of a clip of 4 s: 1 s a completion, and one of a thousand that a break does not move."""
    timed = [judged(i, 6.0) for i in range(ENOUGH - 2)]
    timed += [judged("slow", 804.0, k=4), judged("fast", 1.0)]
    assert pace_of(timed, PROMPTS, LASTS) == Pace(1.0, ENOUGH)
    others = [
        judged("first", None),
        judged("model", 60.0, annotator_kind="model"),
        judged("gone", 60.0, prompt_id="of an earlier draw"),
    ]
    assert pace_of(timed + others, PROMPTS, LASTS) == Pace(1.0, ENOUGH)
    assert pace_of(timed[1:] + others, PROMPTS, LASTS) == ASSUMED
    assert pace_of([], PROMPTS, LASTS) == ASSUMED
    two = [judged(i, 30.0 + 8.0, k=4, prompt_id="two") for i in range(ENOUGH)]
    assert pace_of(two, PROMPTS, LASTS).per_completion_s == 2.0


def test_earlier_judgements_are_those_of_all_snapshots_once(tmp_path, caplog):
    assert earlier_judgements(tmp_path / "snapshots") == []
    for number, judgements in enumerate(([judged(0, 5.0), judged(1, 5.0)], [judged(1, 7.0), judged(2, 5.0)])):
        store.write(tmp_path / f"snapshots/000{number + 1}-abc/judgements.jsonl", judgements)
    store.write_rows(tmp_path / "snapshots/0000-abc/judgements.jsonl", [{"id": "j0", "completion_a": "x"}])
    found = {item.id: item.seconds for item in earlier_judgements(tmp_path / "snapshots")}
    assert found == {"j0": 5.0, "j1": 7.0, "j2": 5.0}
    assert "estimated without" in caplog.text
    assert "0000-abc" in caplog.text

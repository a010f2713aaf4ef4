"""Records: what they refuse."""

import pytest
from pydantic import ValidationError

from preference_data import store
from preference_data.schema import Label

AUDIO = {"type": "audio"}


def says(role: str, *parts: dict | str) -> dict:
    content = [part if isinstance(part, dict) else {"type": "text", "text": part} for part in parts]
    return {"role": role, "content": content}


LABEL = {
    "id": "l",
    "prompt_id": "p",
    "prompt": [says("system", "Be brief."), says("user", AUDIO, "What is it?")],
    "completion": "Rain.",
    "audios": ["a.wav"],
    "label": False,
}


def test_a_label_is_written_and_read_again(tmp_path):
    label = Label.model_validate(LABEL)
    assert (label.weight, label.source) == (1.0, "imported")
    turns = [says("user", "Hello"), says("assistant", "Yes?"), says("user", AUDIO, AUDIO)]
    longer = Label.model_validate({**LABEL, "prompt": turns, "audios": ["a.wav", "b.wav"], "weight": 0.5})
    store.write(tmp_path / "labels.jsonl", [label, longer])
    assert store.read(tmp_path / "labels.jsonl", Label) == [label, longer]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"label": 1}, "valid boolean"),
        ({"label": "false"}, "valid boolean"),
        ({"weight": 0}, "greater than 0"),
        ({"weight": float("inf")}, "finite"),
        ({"completion": ""}, "at least 1 character"),
        ({"prompt": []}, "at least 1 item"),
        ({"prompt": [says("system", "x")], "audios": []}, "alternates from user to user, got system"),
        ({"prompt": [says("user", "a"), says("assistant", "b")], "audios": []}, "got user, assistant"),
        ({"prompt": [says("user", "a"), says("user", "b")], "audios": []}, "got user, user"),
        ({"audios": []}, "places for 1 clips, but there are 0"),
        ({"prompt": [says("user", {"type": "audio", "text": "x"})]}, "type 'audio' with text 'x'"),
        ({"prompt": [says("user", {"type": "text"})]}, "type 'text' with text None"),
    ],
)
def test_a_label_that_says_nothing_or_too_much_is_refused(change, problem):
    with pytest.raises(ValidationError, match=problem):
        Label.model_validate({**LABEL, **change})

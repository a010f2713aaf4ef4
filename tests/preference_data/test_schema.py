"""Records: what they refuse."""

import pytest
from pydantic import ValidationError

from preference_data import store
from preference_data.schema import Label, PreferencePair, Prompt, Turn

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


PROMPT = {"id": "p", "audios": ["a"], "question": "?", "answer_gt": "", "meta_info": "", "task_name": "t"}
PAIR = {
    **{"id": "p", "prompt_id": "q", "audios": ["a"], "question": "?", "chosen": "A", "rejected": "B"},
    **{"axis": "factuality", "agreement": 1.0},
}
EARLIER = {"question": "What?", "answer": "Rain.", "audios": ["a"]}


@pytest.mark.parametrize(("kind", "row"), [(Prompt, PROMPT), (PreferencePair, PAIR)])
def test_earlier_turns_bring_the_first_clips_and_the_question_the_rest(kind, row):
    single = kind.model_validate(row)
    assert single.audios_per_turn == (("a",),)
    assert "history" not in single.model_dump_json()  # files are as they were before there were turns
    later = {"question": "Sure?", "answer": "Yes."}
    several = kind.model_validate({**row, "audios": ["a", "b", "a"], "history": [EARLIER, later]})
    assert several.audios_per_turn == (("a",), (), ("b", "a"))
    assert kind.model_validate_json(several.model_dump_json()) == several
    assert several.history[1] == Turn(**later)
    roles = [(message.role, message.n_clips, message.text) for message in several.messages]
    assert roles == [
        ("user", 1, "What?"), ("assistant", 0, "Rain."), ("user", 0, "Sure?"), ("assistant", 0, "Yes."),
        ("user", 2, "?"),
    ]  # fmt: skip


@pytest.mark.parametrize(("kind", "row"), [(Prompt, PROMPT), (PreferencePair, PAIR)])
@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"audios": ["b", "a"], "history": [EARLIER]}, "are not those of the turns in order"),
        ({"audios": [], "history": [EARLIER]}, "are not those of the turns in order"),
        ({"history": [{"question": " ", "answer": "x"}]}, "turn 1 has neither a question nor a clip"),
        ({"history": [EARLIER], "question": ""}, "turn 2 has neither a question nor a clip"),
        ({"audios": [], "question": " "}, "turn 1 has neither a question nor a clip"),
    ],
)
def test_turns_whose_clips_do_not_add_up_are_refused(kind, row, change, problem):
    with pytest.raises(ValidationError, match=problem):
        kind.model_validate({**row, **change})


def test_a_prompts_line_is_what_it_was():
    assert Prompt.model_validate(PROMPT).model_dump_json() == (
        '{"id":"p","audios":["a"],"question":"?","answer_gt":"","meta_info":"","task_name":"t","choices":[]}'
    )

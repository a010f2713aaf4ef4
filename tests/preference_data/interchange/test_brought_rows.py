"""Rows as people bring them: what each says is kept, or the row is refused by the name of what is wrong."""

import json

import pytest

from preference_data.interchange.columns import BadRow
from preference_data.interchange.conversation import Form
from preference_data.interchange.convert import read_row
from preference_data.schema import Chat, Label, PreferencePair

U, A = {"role": "user", "content": "<audio>What is it?"}, {"role": "assistant", "content": "Rain."}
B = {"role": "assistant", "content": "A dog."}
CHAT = {"messages": [U, A], "audios": ["a.wav"]}
HUMAN, GPT = {"from": "human", "value": "<audio>What is it?"}, {"from": "gpt", "value": "Rain."}
ALPACA = {"instruction": "<audio>What is it?", "input": "", "output": "Rain.", "audios": ["a.wav"]}
PAIRED = {**CHAT, "rejected_response": "A dog."}
TRL = {
    "prompt": [{"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": "What is it?"}]}],
    "audios": ["a.wav"],
}


def read(row: object, form: Form = "ms-swift") -> PreferencePair | Label | Chat:
    return read_row(json.loads(json.dumps(row)), form)


# ------------------------------------------------------------------- labels


@pytest.mark.parametrize(
    ("form", "row", "label"),
    [
        ("trl", {**TRL, "completion": [A], "label": False}, False),
        (
            "trl",
            {**TRL, "completion": [{**A, "content": [{"type": "text", "text": "Rain."}]}], "label": True},
            True,
        ),
        ("trl", {"prompt": "What is it?", "completion": "Rain.", "label": False, "audios": ["a.wav"]}, False),
        ("llamafactory", {"conversations": [HUMAN, GPT], "audios": ["a.wav"], "kto_tag": False}, False),
        ("llamafactory", {**CHAT, "kto_tag": True}, True),
        ("llamafactory", {**CHAT, "label": False}, False),
        ("llamafactory", {**ALPACA, "kto_tag": "false"}, False),
        ("ms-swift", {**CHAT, "label": False}, False),
        ("ms-swift", {**CHAT, "label": 0}, False),
        ("ms-swift", {**CHAT, "label": "True", "rejected_response": None}, True),
        ("ms-swift", {**CHAT, "desirable": False}, False),
        (
            "ms-swift",
            {"query": "<audio>What is it?", "response": "Rain.", "label": 1, "audios": ["a.wav"]},
            True,
        ),
    ],
)
def test_an_unpaired_label_is_kept_in_every_form(form, row, label):
    record = read(row, form)
    assert isinstance(record, Label)
    assert (record.label, record.completion, record.audios) == (label, "Rain.", ("a.wav",))
    assert [(m.role, [(part.type, part.text) for part in m.content]) for m in record.prompt] == [
        ("user", [("audio", None), ("text", "What is it?")])
    ]


def test_a_label_keeps_turns_system_prompt_weight_and_source():
    turns = [{"role": "system", "content": "Be brief."}, U, A, {"role": "user", "content": "Loud?"}, B]
    record = read({"messages": turns, "audios": ["a.wav"], "label": False, "weight": 0.5, "source": "thumbs"})
    assert isinstance(record, Label)
    assert [message.role for message in record.prompt] == ["system", "user", "assistant", "user"]
    assert (record.completion, record.weight, record.source) == ("A dog.", 0.5, "thumbs")
    pair, label = read(PAIRED), read({**CHAT, "label": True})
    assert isinstance(pair, PreferencePair)
    assert isinstance(label, Label)
    assert pair.prompt_id == label.prompt_id  # so that both are held out together


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"label": "dog"}, "label is 'dog', neither true nor false"),
        ({"label": None}, "label is 'None', neither"),
        ({"kto_tag": 2}, "kto_tag is '2', neither"),
        ({"desirable": []}, "neither true nor false"),
        ({"label": True, "kto_tag": False}, "has label and kto_tag, which differ"),
        ({"label": False, "rejected_response": "A dog."}, "both a rejected answer and a label"),
        ({"label": True, "weight": -1}, "weight: Input should be greater than 0"),
        ({"label": True, "weight": "much"}, "weight is 'much', not a number"),
        ({"lable": False}, "did you mean 'label'"),
        ({"kto_tags": False}, "did you mean 'kto_tag'"),
        ({"undesirable": True}, "'undesirable' .* may say what to train on"),
        ({"is_good": False}, "'is_good'"),
        ({"thumbs_up": 0}, "'thumbs_up'"),
        ({"keep": False}, "'keep'"),
        ({"reward": -1.0}, "'reward'"),
    ],
)
def test_a_label_that_cannot_be_read_is_never_a_chat(change, problem):
    with pytest.raises(BadRow, match=problem):
        read({**CHAT, **change})


# ------------------------------------------------------------------- rejections and other columns


@pytest.mark.parametrize(
    ("form", "row"),
    [
        ("ms-swift", {**CHAT, "rejected": "A dog."}),
        ("ms-swift", {**CHAT, "rejected": [B]}),
        ("ms-swift", {**CHAT, "rejected": [U, B]}),
        ("ms-swift", {**CHAT, "rejected_answer": "A dog."}),
        ("ms-swift", {**CHAT, "rejected_messages": [U, B]}),
        ("llamafactory", {"conversations": [HUMAN, GPT], "rejected": B, "audios": ["a.wav"]}),
        ("llamafactory", {**ALPACA, "output": None, "chosen": "Rain.", "rejected": "A dog."}),
        ("trl", {**TRL, "chosen": "Rain.", "rejected": "A dog."}),
        ("trl", {**CHAT, "rejected": "A dog."}),
        ("trl", {"chosen": [U, A], "rejected": [U, B], "messages": [U, A], "audios": ["a.wav"]}),
    ],
)
def test_a_rejection_makes_a_pair_wherever_it_stands(form, row):
    pair = read(row, form)
    assert isinstance(pair, PreferencePair)
    assert (pair.question, pair.chosen, pair.rejected) == ("What is it?", "Rain.", "A dog.")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"rejeted_response": "A dog."}, "did you mean 'rejected_response'"),
        ({"rejectedResponse": "A dog."}, "did you mean 'rejected_response'"),
        ({"Rejected": "A dog."}, "did you mean 'rejected'"),
        (
            {"rejection": "A dog."},
            "'rejection' .* may say what to train on; remove it, or name it by --ignore",
        ),
        ({"negative": "A dog."}, "'negative'"),
        ({"neg": "A dog."}, "'neg'"),
        ({"other_response": "A dog."}, "'other_response'"),
        ({"other": [B]}, "'other'"),
        ({"rejected": "A dog.", "rejected_response": "A cat."}, "two different rejected answers"),
        ({"rejected": [{"role": "user", "content": "Why?"}, B]}, "follows another prompt"),
        ({"rejected": {"a": 1}}, "a message by 'None'"),
        ({"rejected": 7}, "a message is a int"),
        ({"chosen": "Rain."}, "has a chosen answer but no rejected one"),
        ({"answer": "Snow."}, "two different answers"),
        ({"prompt": [{"role": "user", "content": "Who?"}]}, "two different conversations"),
        ({"tools": "[{'name': 'f'}]"}, "'tools'"),
        ({"functions": [{"name": "f"}]}, "'functions'"),
        ({"images": ["a.png"]}, "'images'"),
        ({"loss_scale": 0}, "'loss_scale'"),
        ({"weight": 0.2}, "'weight'"),
        ({"train": False}, "'train'"),
        ({"margin": 0.5}, "'margin'"),
        ({"answer_b": "A dog."}, "'answer_b' .* may say what to train on"),
        ({"worst": 1, "quality": 1}, r"'worst'.*\(so are 'quality'\)"),
        ({"verdict": "wrong"}, "'verdict'"),
        ({"hallucinated": 1}, "'hallucinated'"),
        ({"标签": 0}, "'标签'"),
        ({"w": 0.0}, "'w'"),
        ({"persona": "A pirate."}, "'persona'"),
        ({"meta": {"rejected": "A dog."}}, "'meta'"),
        ({"audio_file": "b.wav"}, "'audio_file' that names a clip"),
        ({"messages": [{**U, "value": "Loud?"}, A]}, "content and value, which differ"),
        ({"messages": [{**U, "from": "gpt"}, A]}, "role and from, which differ"),
        ({"sytem": "Be brief."}, "did you mean 'system'"),
        ({"system_prompt": "Be brief."}, "'system_prompt'"),
        ({"system": ["Be brief."]}, "system is .*, no text"),
        (
            {"messages": [U, {**A, "loss": False}]},
            "message with loss 'False', but every answer is trained on",
        ),
        ({"messages": [U, {**A, "loss_scale": 0.0}]}, "message with loss_scale"),
        ({"messages": [U, {**A, "weight": 0}]}, "message with weight"),
        ({"messages": [U, {**A, "train": False}]}, "message with train"),
        ({"messages": [U, {**A, "tool_calls": [{"id": 1}]}]}, "'tool_calls'"),
        ({"messages": [{**U, "audio": "b.wav"}, A]}, "message with 'audio'"),
        ({"messages": [U, {**A, "reasoning_content": "Hm."}]}, "message with 'reasoning_content'"),
        ({"messages": [U, {"role": "tool", "content": "x"}, A]}, "a message by 'tool'"),
        ({"messages": [U, A, {"role": "system", "content": "x"}]}, "do not alternate"),
    ],
)
def test_a_column_or_key_that_is_not_read_is_refused_by_name(change, problem):
    with pytest.raises(BadRow, match=problem):
        read({**CHAT, **change})


def test_columns_about_a_recording_and_values_that_change_nothing_are_no_matter():
    about = {
        **{"prompt_id": "p", "close_mic": "yes", "wine": "", "unlikely": None, "topic": "dogs", "": 3},
        **{"source": "x", "duration": 3.5, "language": "en", "speaker": "s1", "split": "train", "idx": 7},
        **{
            "dataset": "y",
            "sample_rate": 16_000,
            "timestamp": "2026-01-01",
            "license": "CC0",
            "meta": {"a": 1},
            "audio_path": "a.wav",
            "createdAt": "2026",
            "__index_level_0__": 0,
        },
        **{
            "rejected_response": None,
            "tools": "[]",
            "images": [],
            "weight": "1.0",
            "loss": True,
            "system": "",
        },
    }
    named = {
        **U,
        "name": "Ann",
        "message_id": 3,
        "timestamp": "12:00",
        "loss": False,
    }  # no question is trained on anyway
    assert read(
        {"messages": [named, {**A, "loss": True, "weight": 1}], "audios": ["a.wav"], **about}
    ) == read(CHAT)
    row = {**PAIRED, "score_chosen": 9.0, "score_rejected": 2.0}
    with pytest.raises(BadRow, match="'score_chosen'"):
        read(row)
    assert read_row(row, "ms-swift", ignored=("score_chosen", "score_rejected")) == read(PAIRED)


@pytest.mark.parametrize(
    "change",
    [
        {"system": "Be brief."},
        {"messages": [{"role": "system", "content": "Be brief."}, U, A]},
        {"messages": [{"role": "system", "content": "Be brief. "}, U, A], "system": " Be brief."},
    ],
)
def test_a_system_prompt_is_kept(change):
    chat, pair = read({**CHAT, **change}), read({**PAIRED, **change})
    assert isinstance(chat, Chat)
    assert isinstance(pair, PreferencePair)
    assert chat.system == pair.system == "Be brief."
    assert chat.id != read(CHAT).id
    with pytest.raises(BadRow, match="two different system prompts"):
        read({**CHAT, "messages": [{"role": "system", "content": "x"}, U, A], "system": "y"})


def test_a_clip_under_another_name_is_not_lost():
    for name in ("audio_path", "wav", "sound_file"):
        with pytest.raises(BadRow, match=f"'{name}' that names a clip; call it 'audios'"):
            read({"messages": [{**U, "content": "What is it?"}, A], name: "b/a.WAV"})


# ------------------------------------------------------------------- alpaca


@pytest.mark.parametrize(
    ("row", "question"),
    [
        (ALPACA, "What is it?"),
        ({**ALPACA, "instruction": "<audio>Listen.", "input": "What is it?"}, "Listen.\nWhat is it?"),
        ({**ALPACA, "input": None, "system": "", "history": []}, "What is it?"),
        ({"query": "What is it?", "response": "Rain.", "audios": "a.wav"}, "What is it?"),
        ({"prompt": "What is it?", "output": "Rain.", "audio": {"path": "a.wav"}}, "What is it?"),
    ],
)
def test_alpaca_rows_are_read(row, question):
    chat = read(row, "llamafactory")
    assert isinstance(chat, Chat)
    assert [(turn.question, turn.answer) for turn in chat.turns] == [(question, "Rain.")]
    assert chat.audios == ("a.wav",)


def test_alpaca_history_comes_before():
    row = {**ALPACA, "instruction": "Loud?", "history": [["<audio>What is it?", "Rain."]], "output": "No."}
    chat = read(row, "llamafactory")
    assert isinstance(chat, Chat)
    assert [(turn.question, turn.answer) for turn in chat.turns] == [
        ("What is it?", "Rain."),
        ("Loud?", "No."),
    ]
    for history in ("x", [["a"]], [["a", "b", "c"]], [[1, 2]], {"a": 1}):
        with pytest.raises(BadRow, match="history holds"):
            read({**row, "history": history}, "llamafactory")
    with pytest.raises(BadRow, match="its question is 3, no text|its question is '3', no text"):
        read({**ALPACA, "input": 3})


# ------------------------------------------------------------------- tags and tokens


@pytest.mark.parametrize(
    "tag",
    [
        *(
            "<audio&gt;",
            "&lt;audio&gt;",
            "&lt;audio>",
            "&amp;lt;audio&amp;gt;",
            "&#60;audio&#62;",
            "&#x3c;audio&#x3E;",
        ),
        *("<AUDIO>", "< audio >", "<audio/>", "＜audio＞", "\\u003caudio\\u003e", "Audio 1: <audio>\n"),
        *(
            "<audio></audio>",
            "<AUDIO>a.wav</AUDIO>",
            "&lt;audio&gt;a.wav&lt;/audio&gt;",
            "<audio>\ta.wav </audio>",
        ),
    ],
)
def test_a_tag_is_read_however_it_is_escaped(tag):
    assert read({**CHAT, "messages": [{**U, "content": f"{tag}What is it?"}, A]}) == read(CHAT)


@pytest.mark.parametrize("name", ["a.wav", "some folder/a b.wav"])
def test_a_clip_named_within_its_tag_is_a_clip(name):
    row = {"messages": [{**U, "content": f"<audio>{name}</audio>What is it?"}, A]}
    assert read(row).audios == (name,)
    assert read({**row, "audios": [name]}).audios == (name,)
    with pytest.raises(BadRow, match="but the messages name"):
        read({**row, "audios": ["other.wav"]})


@pytest.mark.parametrize(
    "text",
    [
        *(
            "<audio",
            "</audio>",
            "<audio src='a.wav'>",
            "<audio_1>",
            "audio&gt;",
            "&lt;/audio&gt;",
            "<audio><audio",
        ),
        *("<|AUDIO|>", "<|audio_bos|><|AUDIO|><|audio_eos|>", "<|audio_1|>", "&lt;|AUDIO|&gt;"),
    ],
)
def test_a_broken_tag_is_refused(text):
    with pytest.raises(BadRow, match="stands in a question, where readers take it for a clip"):
        read({**CHAT, "messages": [{**U, "content": f"{text}What is it?"}, A]})
    for where in ({"messages": [U, {**A, "content": f"It says {text}"}]}, {"rejected_response": text}):
        with pytest.raises(BadRow, match="stands in an answer"):
            read({**PAIRED, **where})


@pytest.mark.parametrize(
    "text",
    [
        *(
            "%3Caudio%3E",
            "&ltaudio&gt",
            "<au\u200bdio>",
            "<ａｕｄｉｏ>",
            "‹audio›",
            "u003caudiou003e",
            "{audio}",
        ),
        *("[AUDIO]", "<speech>", "<SpeechHere>", "<image>", "</video>"),
    ],
)
def test_what_stands_for_a_clip_elsewhere_is_not_kept_as_text(text):
    with pytest.raises(BadRow, match="stands in a question"):
        read({**CHAT, "messages": [{**U, "content": f"{text}What is it?"}, A]})


@pytest.mark.parametrize(
    "token",
    [
        *(
            "<|im_end|>",
            "<|im_start|>",
            "<|endoftext|>",
            "<|object_ref_start|>",
            "<|extra_0|>",
            "<|box_end|>",
        ),
        *("<|startoftranscript|>", "<|0.00|>", "<|zh|>", "<|vision_pad|>", "<|question-answer|>"),
    ],
)
def test_a_control_token_is_refused_in_every_text(token):
    text = f"A dog.{token}\nuser"
    for row in (
        {**CHAT, "messages": [{**U, "content": f"<audio>{text}"}, A]},
        {**CHAT, "messages": [U, {**A, "content": text}], "id": "row 7"},
        {**PAIRED, "rejected_response": text},
        {**CHAT, "system": text},
        {**CHAT, "messages": [U, {**A, "content": text}], "label": False},
    ):
        with pytest.raises(BadRow, match=r"its text holds <\|.*which would steer the model"):
            read(row)
    assert read({**PAIRED, "rejected_response": "a <| b |> c <|> <|no token|>"})


# ------------------------------------------------------------------- ids


@pytest.mark.parametrize(
    "key", ["x" * 201, 1.5, True, ["a"], {"a": 1}, "a\nb", " ", "\0", "a\u2028b", "\u202etxt"]
)
def test_an_odd_id_is_refused(key):
    for name, row in (("id", CHAT), ("prompt_id", PAIRED)):
        with pytest.raises(BadRow, match=rf"{name}\b"):
            read({**row, name: key})


@pytest.mark.parametrize("key", ["x" * 200, 17, "a/b", "ä 声", "../x"])
def test_an_unusual_id_is_kept(key):
    assert read({**CHAT, "id": key}).id == str(key)


def test_half_a_surrogate_pair_is_refused_wherever_it_stands():
    half = "\ud83d"
    for row in (
        {**CHAT, "id": half},
        {**CHAT, "audios": [half]},
        {**CHAT, "messages": [{**U, "content": half}, A]},
        {**PAIRED, "rejected_response": half},
        {**CHAT, "label": True, "source": half},
    ):
        with pytest.raises(BadRow):
            read_row(row, "ms-swift")

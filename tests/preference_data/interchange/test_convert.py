"""Rows of TRL, LLaMA-Factory and ms-swift: golden rows, round trips, and what is refused."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import soundfile
from datasets import load_dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from preference_data import store
from preference_data.dataset.dataset import with_paths
from preference_data.interchange import exchange
from preference_data.interchange.columns import BadRow
from preference_data.interchange.conversation import Form
from preference_data.interchange.convert import dataset_info, read_row, write_row
from preference_data.prompts.prompts import control_token
from preference_data.schema import AudioClip, Chat, PreferencePair, Prompt, Turn

FORMS: tuple[Form, ...] = get_args(Form)

PAIR = PreferencePair(
    id="pair-1",
    prompt_id="prompt-1",
    audios=("a.wav", "b.wav"),
    question="Which is louder?",
    chosen="The second.",
    rejected="A dog barks.",
    axis="factuality",
    agreement=0.75,
)
CHAT = Chat(
    id="chat-1",
    audios=("a.wav",),
    turns=(Turn(question="What is it?", answer="Rain."), Turn(question="Loud?", answer="No.")),
)
KEPT = {"id": "pair-1", "prompt_id": "prompt-1", "axis": "factuality", "agreement": 0.75}

PAIR_ROWS: Mapping[Form, Any] = {
    "trl": {
        "prompt": [
            {
                "role": "user",
                "content": [
                    {"type": "audio"},
                    {"type": "audio"},
                    {"type": "text", "text": "Which is louder?"},
                ],
            }
        ],
        "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "The second."}]}],
        "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "A dog barks."}]}],
        "audios": ["/d/a.wav", "/d/b.wav"],
        **KEPT,
    },
    "llamafactory": {
        "conversations": [{"from": "human", "value": "<audio><audio>Which is louder?"}],
        "chosen": {"from": "gpt", "value": "The second."},
        "rejected": {"from": "gpt", "value": "A dog barks."},
        "audios": ["/d/a.wav", "/d/b.wav"],
        **KEPT,
    },
    "ms-swift": {
        "messages": [
            {"role": "user", "content": "<audio><audio>Which is louder?"},
            {"role": "assistant", "content": "The second."},
        ],
        "rejected_response": "A dog barks.",
        "audios": ["/d/a.wav", "/d/b.wav"],
        **KEPT,
    },
}
CHAT_ROWS: Mapping[Form, Any] = {
    "trl": {
        "messages": [
            {"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": "What is it?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "Rain."}]},
            {"role": "user", "content": [{"type": "text", "text": "Loud?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "No."}]},
        ],
        "audios": ["/d/a.wav"],
        "id": "chat-1",
    },
    "llamafactory": {
        "conversations": [
            {"from": "human", "value": "<audio>What is it?"},
            {"from": "gpt", "value": "Rain."},
            {"from": "human", "value": "Loud?"},
            {"from": "gpt", "value": "No."},
        ],
        "audios": ["/d/a.wav"],
        "id": "chat-1",
    },
    "ms-swift": {
        "messages": [
            {"role": "user", "content": "<audio>What is it?"},
            {"role": "assistant", "content": "Rain."},
            {"role": "user", "content": "Loud?"},
            {"role": "assistant", "content": "No."},
        ],
        "audios": ["/d/a.wav"],
        "id": "chat-1",
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_golden_rows(form):
    assert write_row(PAIR, ["/d/a.wav", "/d/b.wav"], form) == PAIR_ROWS[form]
    assert write_row(CHAT, ["/d/a.wav"], form) == CHAT_ROWS[form]


def test_dataset_info_is_what_llamafactory_asks_for():
    assert dataset_info("align_pairs", "pairs.jsonl", "pairs") == {
        "align_pairs": {
            "file_name": "pairs.jsonl",
            "ranking": True,
            "formatting": "sharegpt",
            "columns": {
                "messages": "conversations",
                "chosen": "chosen",
                "rejected": "rejected",
                "audios": "audios",
            },
        }
    }
    assert "ranking" not in dataset_info("c", "c.jsonl", "chats")["c"]


texts = (
    st.text(min_size=1, max_size=40)
    .map(str.strip)
    .filter(lambda text: text and "<audio>" not in text and not control_token(text))
)


@pytest.mark.parametrize("form", FORMS)
@settings(deadline=None)  # the machine may be busy
@given(
    texts, texts, texts, st.lists(st.just("a.wav"), max_size=3), st.sampled_from(["factuality", "behaviour"])
)
def test_a_pair_written_and_read_again_is_the_same(form, question, chosen, rejected, audios, axis):
    if chosen == rejected or question.startswith("Audio "):
        return
    pair = PAIR.model_copy(
        update={
            "question": question,
            "chosen": chosen,
            "rejected": rejected,
            "audios": tuple(audios),
            "axis": axis,
        }
    )
    row = json.loads(json.dumps(write_row(pair, pair.audios, form)))
    assert read_row(row, form) == pair


@pytest.mark.parametrize("form", FORMS)
@settings(deadline=None)  # the machine may be busy
@given(st.lists(st.tuples(texts, texts, st.integers(0, 2)), min_size=1, max_size=4))
def test_a_chat_written_and_read_again_is_the_same(form, said):
    paths = [[f"{turn}-{n}.wav" for n in range(clips)] for turn, (_, _, clips) in enumerate(said)]
    own = paths if any(paths[1:]) else [[]] * len(said)  # turns say theirs only where not all come first
    turns = tuple(
        Turn(question=question, answer=answer, audios=tuple(brought))
        for (question, answer, _), brought in zip(said, own, strict=True)
    )
    chat = Chat(id="c", audios=tuple(sum(paths, [])), turns=turns)
    assert read_row(json.loads(json.dumps(write_row(chat, chat.audios, form))), form) == chat


LONGER = PAIR.model_copy(
    update={
        "system": "Be brief.",
        "audios": ("a.wav", "b.wav", "a.wav"),
        "history": (
            Turn(question="", answer="Hello.", audios=("a.wav",)),
            Turn(question="Sure?", answer="Yes."),
        ),
    }
)
LONGER_ROWS: Mapping[Form, Any] = {
    "trl": {
        "prompt": [
            {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
            {"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": ""}]},
            {"role": "assistant", "content": [{"type": "text", "text": "Hello."}]},
            {"role": "user", "content": [{"type": "text", "text": "Sure?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]},
            *PAIR_ROWS["trl"]["prompt"],
        ],
    },
    "llamafactory": {
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "<audio>"},
            {"from": "gpt", "value": "Hello."},
            {"from": "human", "value": "Sure?"},
            {"from": "gpt", "value": "Yes."},
            *PAIR_ROWS["llamafactory"]["conversations"],
        ],
    },
    "ms-swift": {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "<audio>"},
            {"role": "assistant", "content": "Hello."},
            {"role": "user", "content": "Sure?"},
            {"role": "assistant", "content": "Yes."},
            *PAIR_ROWS["ms-swift"]["messages"],
        ],
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_golden_rows_of_a_pair_of_several_turns(form):
    audios = ["a.wav", "b.wav", "a.wav"]
    row = write_row(LONGER, audios, form)
    assert row == {**PAIR_ROWS[form], **LONGER_ROWS[form], "audios": audios}
    assert read_row(row, form) == LONGER
    if form != "trl":  # two conversations that differ in an earlier answer alone are two prompts
        del row["prompt_id"], row["id"]
        first = read_row(row, form)
        key = "conversations" if form == "llamafactory" else "messages"
        row[key][2] = {**row[key][2], **({"value": "No."} if key == "conversations" else {"content": "No."})}
        assert first.prompt_id != read_row(row, form).prompt_id


@pytest.mark.parametrize("form", FORMS)
@settings(deadline=None)  # the machine may be busy
@given(st.lists(st.tuples(texts, texts, st.integers(0, 2)), min_size=1, max_size=4), texts)
def test_a_pair_of_several_turns_written_and_read_again_is_the_same(form, said, rejected):
    paths = [tuple(f"{turn}-{n}.wav" for n in range(clips)) for turn, (_, _, clips) in enumerate(said)]
    turns = [
        Turn(question=question, answer=answer, audios=own)
        for (question, answer, _), own in zip(said, paths, strict=True)
    ]
    last = turns.pop()
    if last.answer == rejected:
        return
    update = {"history": tuple(turns), "audios": sum(paths, ()), "question": last.question}
    pair = PAIR.model_copy(update={**update, "chosen": last.answer, "rejected": rejected})
    row = json.loads(json.dumps(write_row(pair, pair.audios, form)))
    assert read_row(row, form) == pair


def test_a_conversation_that_ends_with_a_question_is_a_prompt():
    said = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "<audio>What is it?"},
        {"role": "assistant", "content": "Rain."},
        {"role": "user", "content": "<audio><audio>And these?"},
    ]
    row = {"messages": said, "audios": ["a.wav", "b.wav", "c.wav"]}
    prompt = read_row(row, "ms-swift")
    assert isinstance(prompt, Prompt)
    assert (prompt.system, prompt.question, prompt.audios) == (
        "Be brief.",
        "And these?",
        tuple(row["audios"]),
    )
    assert prompt.history == (Turn(question="What is it?", answer="Rain.", audios=("a.wav",)),)
    assert prompt.audios_per_turn == (("a.wav",), ("b.wav", "c.wav"))
    assert (prompt.answer_gt, prompt.meta_info, prompt.task_name) == ("", "", "chat")
    about = {"answer_gt": "Thunder.", "meta_info": "thunder", "task_name": "sound_QA"}
    assert read_row({**row, **about}, "ms-swift") == prompt.model_copy(update=about)
    answered = read_row(
        {**row, "messages": [*said, {"role": "assistant", "content": "A"}], "rejected_response": "B"},
        "ms-swift",
    )
    assert answered.prompt_id == prompt.id  # the pair is about this prompt
    moved = Prompt.model_validate(with_paths(prompt.model_dump(), lambda path: f"x/{path}"))
    assert moved.audios_per_turn == (("x/a.wav",), ("x/b.wav", "x/c.wav"))
    untagged = [{**m, "content": m["content"].replace("<audio>", "")} for m in said]
    assert read_row({**row, "messages": untagged}, "ms-swift").audios_per_turn == (tuple(row["audios"]), ())
    columns = {"query": "Loud?", "history": [["<audio>What is it?", "Rain."]], "audios": ["a.wav"]}
    assert read_row(columns, "ms-swift").history == prompt.history
    for change, problem in (
        ({"answer_gt": 7}, "answer_gt or meta_info is '7', no text"),
        ({"messages": [*said[:3], {"role": "user", "content": " "}], "audios": ["a"]}, "neither a question"),
        ({"messages": [*said[:2], {"role": "assistant", "content": "<|im_end|>"}, said[3]]}, "would steer"),
    ):
        with pytest.raises(BadRow, match=problem):
            read_row({**row, **change}, "ms-swift")


def test_rows_of_others_as_they_are_found():
    """Spellings that the documentations allow, and that say the same pair."""
    said = {"role": "user", "content": "Audio 1: <audio>\nWhat is it?"}
    good, bad = {"role": "assistant", "content": "Rain."}, {"role": "assistant", "content": "A dog."}
    system = {"role": "system", "content": "You are a helpful assistant."}
    rows: list[tuple[Form, Any]] = [
        ("ms-swift", {"messages": [system, said, good], "rejected_response": "A dog.", "audios": ["a.wav"]}),
        ("ms-swift", {"messages": [said, good], "rejected_response": [bad], "audios": "a.wav"}),
        (
            "ms-swift",
            {"messages": [said, good], "rejected_messages": [said, bad], "audios": [{"path": "a.wav"}]},
        ),
        (
            "llamafactory",
            {
                "conversations": [{"from": "human", "value": "What is it?\n<audio>"}],
                "chosen": {"from": "gpt", "value": "Rain."},
                "rejected": {"from": "gpt", "value": "A dog."},
                "audios": ["a.wav"],
            },
        ),
        ("llamafactory", {"messages": [said], "chosen": good, "rejected": bad, "audios": ["a.wav"]}),
        (
            "trl",
            {
                "chosen": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "audio", "path": "a.wav"},
                            {"type": "text", "text": "What is it?"},
                        ],
                    },
                    good,
                ],
                "rejected": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "audio", "path": "a.wav"},
                            {"type": "text", "text": "What is it?"},
                        ],
                    },
                    bad,
                ],
            },
        ),
        (
            "trl",
            {
                "prompt": [{"role": "user", "content": "What is it?"}],
                "chosen": [good],
                "rejected": [bad],
                "audios": ["a.wav"],
            },
        ),
    ]
    found = [read_row(row, form) for form, row in rows]
    assert {(one.audios, one.question, one.chosen, one.rejected) for one in found} == {
        (("a.wav",), "What is it?", "Rain.", "A dog.")
    }
    assert len({one.id for one in found}) == 1  # made from what it says
    assert {(one.axis, one.agreement) for one in found} == {("factuality", 1.0)}


def test_clips_come_with_their_turn_and_may_do_the_asking():
    messages = [
        {"role": "user", "content": "<audio>"},
        {"role": "assistant", "content": "Hello to you."},
        {"role": "user", "content": "<audio>And this?"},
        {"role": "assistant", "content": "Rain."},
    ]
    chat = read_row({"messages": messages, "audios": ["hello.wav", "rain.wav"]}, "ms-swift")
    assert isinstance(chat, Chat)
    assert chat.turns == (
        Turn(question="", answer="Hello to you.", audios=("hello.wav",)),
        Turn(question="And this?", answer="Rain.", audios=("rain.wav",)),
    )
    moved = Chat.model_validate(with_paths(chat.model_dump(), lambda path: f"a/{path}"))
    assert moved.audios_per_turn == (("a/hello.wav",), ("a/rain.wav",))
    with pytest.raises(BadRow, match="a turn has neither a question nor a clip"):
        read_row({"messages": [{"role": "user", "content": " "}, messages[1]], "audios": []}, "ms-swift")


SWIFT = {
    "messages": [{"role": "user", "content": "<audio>Q"}, {"role": "assistant", "content": "A"}],
    "rejected_response": "B",
    "audios": ["a.wav"],
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"audios": []}, "has 1 <audio> but 0 audios; they must be as many"),
        ({"audios": ["a", "b"]}, "has 1 <audio> but 2 audios"),
        ({"audios": [None]}, "an audio is 'None', not a path"),
        ({"rejected_response": "A"}, "chosen and rejected are the same"),
        ({"rejected_response": " "}, "the rejected answer is empty"),
        ({"rejected_response": "<audio>B"}, "<audio> stands in an answer"),
        ({"rejected_audios": ["b.wav"]}, "rejected_audios differ from audios"),
        (
            {
                "rejected_messages": [
                    {"role": "user", "content": "<audio>Q"},
                    {"role": "assistant", "content": "B"},
                ],
                "rejected_audios": ["b.wav"],
            },
            "rejected_audios differ from audios",
        ),
        ({"messages": []}, "has no list of messages"),
        (
            {"messages": [{"role": "user", "content": "<audio>Q"}]},
            "has a rejected answer but no answer to its last question",
        ),
        (
            {"messages": SWIFT["messages"][:1], "rejected_response": None, "label": True},
            "has a label but no answer to its last question",
        ),
        (
            {"messages": [SWIFT["messages"][0]] * 2},
            "questions and answers do not alternate: user, user",
        ),
        ({"messages": [{"role": "tool", "content": "x"}]}, "a message by 'tool'; known: human, user"),
        (
            {"messages": [*SWIFT["messages"], *SWIFT["messages"]]},
            "has 2 <audio> but 1 audios",
        ),
        (
            {"messages": [{"role": "user", "content": "In <audio> who speaks?"}, SWIFT["messages"][1]]},
            "in the middle",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}, SWIFT["messages"][1]]},
            "neither audio nor text",
        ),
        ({"axis": "taste"}, "makes no record"),
        ({"agreement": 7}, "makes no record"),
    ],
)
def test_what_a_record_cannot_hold_is_refused(change, message):
    with pytest.raises(BadRow, match=message):
        read_row({**SWIFT, **change}, "ms-swift")


def test_a_text_that_readers_would_take_for_a_clip_is_not_written():
    with pytest.raises(BadRow, match="<audio> stands in a text, where readers take it for a clip"):
        write_row(PAIR.model_copy(update={"chosen": "It says <audio>."}), [], "trl")


# -------------------------------------------------------------------- files


@pytest.fixture
def corpus(tmp_path) -> Path:
    root = tmp_path / "corpus"
    root.mkdir()
    for number, name in enumerate("ab"):
        wave = 0.3 * np.sin(2 * np.pi * (300 + 100 * number) * np.arange(8000) / 16_000)
        soundfile.write(root / f"{name}.wav", wave, 16_000)
    store.write(root / "pairs.jsonl", [PAIR, PAIR.model_copy(update={"id": "pair-2", "axis": "behaviour"})])
    store.write(root / "sft.jsonl", [CHAT])
    return root


@pytest.mark.parametrize("form", FORMS)
def test_files_go_out_and_come_back_with_their_audio(corpus, tmp_path, form):
    told = exchange.write_rows(corpus / "pairs.jsonl", form, corpus, tmp_path / "rows")
    assert (told.kind, told.written, told.path) == ("pairs", 2, tmp_path / "rows/pairs.jsonl")
    loaded = load_dataset("json", data_files=str(told.path), split="train", cache_dir=str(tmp_path / "cache"))
    for path, name in zip(loaded[0]["audios"], ("a.wav", "b.wav"), strict=True):
        assert (told.path.parent / path).read_bytes() == (corpus / name).read_bytes()
        assert path.startswith("audio/")  # the folder can move as a whole
    told = told._replace(path=(tmp_path / "rows").rename(tmp_path / "rows moved") / "pairs.jsonl")
    back = exchange.read_rows(told.path, form, tmp_path / "back", audio_root=told.path.parent)
    assert (back.pairs, back.chats, back.clips, back.n_refused) == (2, 0, 2, 0)
    pairs = store.read(tmp_path / "back/pairs.jsonl", PreferencePair)
    clips = {clip.path: clip for clip in store.stream(tmp_path / "back/clips.jsonl", AudioClip)}
    assert [one.model_copy(update={"audios": PAIR.audios}) for one in pairs] == store.read(
        corpus / "pairs.jsonl", PreferencePair
    )
    for path, original in zip(pairs[0].audios, ("a.wav", "b.wav"), strict=True):
        assert (tmp_path / "back" / path).read_bytes() == (corpus / original).read_bytes()
        assert clips[path].duration_s == 0.5
    moved = (tmp_path / "back").rename(tmp_path / "moved")
    assert exchange.write_rows(moved / "pairs.jsonl", form, moved, tmp_path / "again").written == 2


def test_a_file_of_prompts_and_pairs_of_several_turns_comes_in_with_its_clips(corpus, tmp_path):
    said = [{"role": "user", "content": "<audio>Q"}, {"role": "assistant", "content": "A"}]
    rows = [
        {"messages": [*said, said[0]], "audios": ["a.wav", "b.wav"]},
        {"messages": said * 2, "rejected_response": "B", "audios": ["b.wav", "a.wav"]},
    ]
    (corpus / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = exchange.read_rows(corpus / "rows.jsonl", "ms-swift", tmp_path / "in", audio_root=corpus)
    assert (told.questions, told.pairs, told.clips, told.n_refused) == (1, 1, 2, 0)
    (prompt,) = store.read(tmp_path / "in/prompts.jsonl", Prompt)
    (pair,) = store.read(tmp_path / "in/pairs.jsonl", PreferencePair)
    assert prompt.audios_per_turn == pair.audios_per_turn[::-1]
    for path, name in zip(prompt.audios, ("a.wav", "b.wav"), strict=True):
        assert (tmp_path / "in" / path).read_bytes() == (corpus / name).read_bytes()
    out = exchange.write_rows(tmp_path / "in/pairs.jsonl", "ms-swift", tmp_path / "in", tmp_path / "out")
    (row,) = [json.loads(line) for line in out.path.read_text().splitlines()]
    assert (row["messages"], row["rejected_response"]) == (said * 2, "B")


def test_llamafactory_gets_its_entry_and_keeps_others(corpus, tmp_path):
    out = tmp_path / "rows"
    exchange.write_rows(corpus / "pairs.jsonl", "llamafactory", corpus, out)
    exchange.write_rows(corpus / "sft.jsonl", "llamafactory", corpus, out)
    info = json.loads((out / "dataset_info.json").read_text())
    assert list(info) == ["align_pairs", "align_sft"]
    assert all((out / entry["file_name"]).is_file() for entry in info.values())


def test_rows_that_cannot_be_used_are_left_out_with_their_number_and_reason(corpus, tmp_path):
    (corpus / "broken.wav").write_bytes(b"RIFF")
    rows = [
        {
            **SWIFT,
            "messages": [{"role": "user", "content": f"<audio>Q{n}"}, {"role": "assistant", "content": "A"}],
        }
        for n in range(6)
    ]
    rows[1]["audios"] = ["gone.wav"]
    rows[2]["audios"] = ["../corpus/../../etc/passwd"]
    rows[3]["audios"] = ["/etc/hostname"]
    rows[4]["audios"] = ["broken.wav"]
    del rows[5]["rejected_response"]
    (corpus / "rows.json").write_text(json.dumps([*rows, rows[0], 7]))  # a list, as LLaMA-Factory's demos are
    told = exchange.read_rows(corpus / "rows.json", "ms-swift", tmp_path / "out", audio_root=corpus)
    assert (told.pairs, told.chats, told.clips, told.n_refused) == (1, 1, 1, 6)
    reasons = [json.loads(line) for line in (tmp_path / "out/quarantine.jsonl").read_text().splitlines()]
    assert [reason["id"] for reason in reasons] == [f"row-{n}" for n in (2, 3, 4, 5, 7, 8)]
    wanted = [
        "missing",
        "outside_root",
        "lies outside",
        "unreadable",
        "comes more than once",
        "is a int, not an",
    ]
    assert all(text in reason["detail"] for text, reason in zip(wanted, reasons, strict=True))
    assert len(list((tmp_path / "out/audio").iterdir())) == 1
    (corpus / "one.jsonl").write_text(json.dumps(rows[1]) + "\n")
    with pytest.raises(BadRow, match=r"none of its 1 rows can be used: row 1: audio .*missing"):
        exchange.read_rows(corpus / "one.jsonl", "ms-swift", tmp_path / "other", audio_root=corpus)
    assert store.read(tmp_path / "out/pairs.jsonl", PreferencePair)  # what was there stays
    (corpus / "bad.jsonl").write_text("{}\n{nonsense\n")
    with pytest.raises(BadRow, match=r"none of its 2 rows can be used: row 1: .*; row 2: is not JSON"):
        exchange.read_rows(corpus / "bad.jsonl", "ms-swift", tmp_path / "other", audio_root=corpus)


def test_a_clip_that_is_not_there_is_not_exported(corpus, tmp_path):
    (corpus / "b.wav").unlink()
    with pytest.raises(BadRow, match="record 'pair-1': no file .*b.wav; is .* the folder of its corpus"):
        exchange.write_rows(corpus / "pairs.jsonl", "trl", corpus, tmp_path / "rows")
    assert not (tmp_path / "rows/pairs.jsonl").exists()

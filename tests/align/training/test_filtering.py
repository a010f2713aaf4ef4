"""Chats left out before SFT: by reason, and because nobody needs to listen to answer them."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch

from align.models.features import ClipFeatures
from align.models.qwen2_audio import model as qwen2_audio
from align.models.qwen2_audio.packed import pack
from align.run_folder.artifacts import StageFolder
from align.training.collate import SFTCollator, chat_row
from align.training.filtering import audio_effects, keep, mean_logps, saved_effects
from preference_data.dataset.filters import Limits
from preference_data.schema import Chat, Turn


def chat(name, answer, *clips):
    turns = (Turn(question="Is the tone high or low?", answer=answer),)
    return Chat(id=name, audios=clips, turns=turns)


HIGH, LOW = ("0.wav", "2.wav"), ("1.wav", "3.wav")
HEARD = [chat(f"heard{c}", "The tone is high.", c) for c in HIGH] + [
    chat(f"heard{c}", "The tone is low.", c) for c in LOW
]
"""Only who listens can say which."""
UNHEARD = [chat(f"unheard{c}", "system", c) for c in (*HIGH, *LOW)]
"""The same for every clip."""


@pytest.fixture
def out(tmp_path):
    folder = StageFolder(tmp_path, "2_sft", "x")
    folder.open()
    return folder


@pytest.fixture(scope="module")
def listener(tiny):
    """A policy that has learned both: to tell tones apart, and to say the same of every clip."""
    model, processor = qwen2_audio.load_model(tiny.policy), qwen2_audio.load_processor(tiny.policy)
    collator = SFTCollator(processor, ClipFeatures(processor, tiny.audio))
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    question = "Which words come first?"
    turns = (Turn(question=question, answer="system"),)
    unheard = [one.model_copy(update={"turns": turns}) for one in UNHEARD]
    rows = [chat_row(one) for one in [*HEARD, *unheard]]
    batch = collator([{**row, "draw": 0} for row in rows])
    for _ in range(60):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.05
    return model, collator, rows


def test_the_clip_is_worth_something_where_it_decides_and_nothing_where_not(listener):
    model, collator, rows = listener
    effects = audio_effects(model.eval(), collator, rows)
    heard, unheard = effects[:4], effects[4:]
    assert sum(heard) / 4 > 0.1  # "high" or "low" is one of some seven tokens; silence cannot tell
    assert max(map(abs, unheard)) < 0.05
    assert min(heard[:2]) > max(unheard) or min(heard[2:]) > max(unheard)


def test_the_score_is_the_mean_log_probability_of_the_labels(listener):
    model, collator, rows = listener
    batch = collator([{**row, "draw": 0} for row in rows])
    with torch.no_grad():
        logps = mean_logps(model.eval(), batch)
    for logp, row in zip(logps, rows, strict=True):
        with torch.no_grad():
            loss = model(**collator([{**row, "draw": 0}])).loss
        assert float(logp) == pytest.approx(-float(loss), abs=1e-4)


def test_packed_the_effects_are_those_of_padded_rows(listener):
    """Each clip on its true length against all of them on the longest that the model takes."""
    model, collator, rows = listener
    padded = audio_effects(model.eval(), collator, rows)
    packed = audio_effects(pack(copy.deepcopy(model)), replace(collator, packed=True), rows)
    assert packed == pytest.approx(padded, abs=2e-3)


def test_a_bad_clip_stays_to_give_way_in_training(listener):
    model, collator, rows = listener
    effects = audio_effects(model, collator, [rows[0], {**rows[1], "audios": ["none.wav"]}, rows[2]])
    assert math.isnan(effects[1])
    assert effects[::2] == pytest.approx(audio_effects(model, collator, rows[:3])[::2], abs=1e-4)


def test_text_alone_has_no_clip_to_need(listener):
    model, collator, rows = listener
    text = chat_row(chat("text", "The tone is low."))
    assert audio_effects(model, collator, [text]) == [0.0]
    mixed = audio_effects(model, collator, [text, rows[0]])
    assert mixed[0] == 0.0
    assert mixed[1] == pytest.approx(audio_effects(model, collator, [rows[0]])[0], abs=1e-4)


def test_effects_are_saved_and_a_second_time_is_read(listener, tmp_path):
    model, collator, rows = listener
    many = rows * 9  # two chunks
    first = saved_effects(model, collator, many, tmp_path, 8)
    assert len(list(tmp_path.glob("*.json"))) == 2
    assert first == pytest.approx(audio_effects(model, collator, rows) * 9, abs=1e-4)
    (tmp_path / "000000.json").write_text(json.dumps([7.0] * 64))
    again = saved_effects(model, collator, many, tmp_path, 8)
    assert again == [7.0] * 64 + first[64:]


def test_everything_left_out_is_counted_and_listed(out):
    chats = [*HEARD, chat("short", "x", "0.wav"), chat("text", "The tone is low."), HEARD[0]]
    asked = []

    def effects(some):
        asked.extend(one.id for one in some)
        return [0.0 if one.id == "heard1.wav" else 1.0 for one in some]

    kept = keep(chats, Limits(min_answer_chars=3, max_similarity=1), out, 0.1, effects)
    assert kept.numbers == [0, 1, 3, 5]
    assert kept.counts == {
        "chats": 7.0,
        "chats_kept": 4.0,
        "left_out_too_short": 1.0,
        "left_out_repetition": 1.0,
        "left_out_needs_no_audio": 1.0,
    }
    assert asked == [one.id for one in HEARD]  # not about text, nor about what is out already
    listed = [json.loads(line) for line in (out.path / "left_out.jsonl").read_text().splitlines()]
    assert {"id": "heard1.wav", "reason": "needs_no_audio"} in listed
    assert len(listed) == 3


def test_filters_that_leave_nothing_are_an_error(out):
    with pytest.raises(ValueError, match=r"leave none of 4 chats: \{'too_short': 4\}"):
        keep(HEARD, Limits(min_answer_chars=100), out)


def test_effects_are_not_asked_for_unless_wanted(out):
    kept = keep(HEARD, Limits(), out, None, lambda chats: pytest.fail("asked"))
    assert kept.numbers == [0, 1, 2, 3]

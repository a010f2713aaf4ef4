"""Text piece by piece equals the text of the whole, whatever the tokens are and however they come."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from align.generation.engine import Request, completion_text
from align.models.qwen2_audio.model import build_processor
from align.serving.answer_text import AnswerText
from tests.conftest import TEXTS

TOKENIZER = build_processor(TEXTS * 20, vocab_size=400, mel_bins=32, hop_length=320, clip_s=1).tokenizer
STEPS = st.lists(st.lists(st.integers(0, len(TOKENIZER) - 1), min_size=1, max_size=3), max_size=30)
"""Any tokens: halves of characters, white space, tags and ends among them."""

ON_A_BUSY_MACHINE = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def pieces(steps, **options):
    answer, said = AnswerText(TOKENIZER, **options), []
    for tokens in steps:
        said.append(answer.add(tokens))
        if answer.is_stopped:
            break
    return [*said, answer.finish()]


@ON_A_BUSY_MACHINE
@given(STEPS, st.booleans())
def test_pieces_make_the_whole_text(steps, is_plain):
    tokens = [token for step in steps for token in step]
    whole = completion_text(TOKENIZER, tokens, Request("", (), plain=is_plain))
    assert "".join(pieces(steps, is_plain=is_plain)) == whole


@ON_A_BUSY_MACHINE
@given(st.text("ab \n", max_size=30), st.lists(st.text("ab ", min_size=1, max_size=4), max_size=3))
def test_the_stop_text_that_is_complete_first_cuts(text, stops):
    """Character by character against a search in the whole text."""
    steps = [TOKENIZER(character, add_special_tokens=False)["input_ids"] for character in text]
    said = "".join(pieces(steps, stops=stops))
    text = text.lstrip()
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    assert said == text[: min(ends)[1] if ends else None].rstrip()


def test_a_character_of_several_tokens_comes_whole():
    steps = [[token] for token in TOKENIZER("é😀!", add_special_tokens=False)["input_ids"]]
    assert len(steps) == 7  # bytes
    said = pieces(steps)
    assert "".join(said) == "é😀!"
    assert all(piece in ("", "é", "😀", "!") for piece in said)


@pytest.mark.parametrize("stops", [["never"], ["x"]])
def test_what_may_become_a_stop_text_is_held_back_but_not_lost(stops):
    assert (
        "".join(pieces([TOKENIZER("so nev", add_special_tokens=False)["input_ids"]], stops=stops)) == "so nev"
    )

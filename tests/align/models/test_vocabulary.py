"""Every tag is one token, whichever tokenizer the model started with."""

import pytest
import torch

from align.models.qwen2_audio import model as qwen2_audio
from align.models.qwen2_audio.vocabulary import add_tags, fit_embeddings
from preference_data.prompts.prompts import Tagset, all_tags, pretraining_prompt
from preference_data.prompts.time_stamps import stamps_to
from tests.conftest import TEXTS

LINE = "<|0.00|><|sil|><|0.54|>hello<|0.86|><|30.00|>"


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.fixture
def policy(tiny):
    return qwen2_audio.load_processor(tiny.policy).tokenizer, qwen2_audio.load_model(tiny.policy)


@pytest.mark.parametrize("prompt_format", ["sentences", "tags_paper", "tags_released"])
def test_a_trained_tokenizer_learns_every_tag_and_forgets_nothing(policy, prompt_format):
    tokenizer, _ = policy
    before = tokenizer.get_vocab()
    tags = all_tags(prompt_format)
    new = add_tags(tokenizer, tags)
    assert set(new) == {*tags.prompt, *tags.answer} - set(before)
    assert len(new) > 3001
    assert all(len(ids(tokenizer, tag)) == 1 for tag in (*tags.prompt, *tags.answer))
    assert before.items() <= tokenizer.get_vocab().items()
    assert add_tags(tokenizer, tags) == []


def test_what_a_model_says_in_stamps_survives_decoding_and_saving(policy, tmp_path):
    tokenizer, _ = policy
    add_tags(tokenizer, all_tags("tags_released"))
    tokenizer.save_pretrained(tmp_path)
    for one in (tokenizer, type(tokenizer).from_pretrained(tmp_path)):
        said = ids(one, pretraining_prompt("transcribe_words", 0, "tags_released") + LINE + "<|im_end|>")
        assert one.decode(said, skip_special_tokens=True) == "<|0.00|>" + LINE
        assert len(ids(one, LINE)) == 5 + len(ids(one, "hello"))


def test_embeddings_grow_and_what_was_learned_stays(policy):
    tokenizer, model = policy
    old_in = model.get_input_embeddings().weight.detach().clone()
    old_out = model.get_output_embeddings().weight.detach().clone()
    added = add_tags(tokenizer, Tagset(("<|timestamps|>",), tuple(stamps_to(1))))
    assert fit_embeddings(model, tokenizer, added) == 102
    assert fit_embeddings(model, tokenizer, []) == 0
    assert model.config.text_config.vocab_size == len(tokenizer)
    for new, old in ((model.get_input_embeddings(), old_in), (model.get_output_embeddings(), old_out)):
        assert new.weight.shape[0] == len(tokenizer)
        assert torch.equal(new.weight[: len(old)], old)
        assert len(new.weight[len(old) :].unique(dim=0)) == 102  # 0.45 is not 0.54


def test_a_new_row_is_made_of_those_its_name_is_written_with(policy):
    tokenizer, model = policy
    spelled = ids(tokenizer, "0.54")
    assert len(spelled) == 4
    old = model.get_output_embeddings().weight.detach().clone()
    fit_embeddings(model, tokenizer, add_tags(tokenizer, Tagset((), ("<|0.54|>",))))
    row = model.get_output_embeddings().weight[tokenizer.convert_tokens_to_ids("<|0.54|>")]
    zero, point, five, four = old[spelled]
    torch.testing.assert_close(row, (12 * zero + 6 * point + 4 * five + 3 * four) / 25)


def test_spare_rows_of_a_released_model_are_used_not_cut(policy):
    tokenizer, model = policy
    model.resize_token_embeddings(len(tokenizer) + 50)
    before = model.get_input_embeddings().weight.detach().clone()
    added = add_tags(tokenizer, Tagset((), tuple(stamps_to(0.2))))
    assert fit_embeddings(model, tokenizer, added) == 0
    changed = (model.get_input_embeddings().weight != before).any(dim=1).nonzero().flatten().tolist()
    assert changed == tokenizer.convert_tokens_to_ids(added)
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer) + 50 - 21


def test_a_small_vocabulary_holds_only_what_its_corpus_needs():
    def size(tags):
        return len(
            qwen2_audio.build_processor(
                TEXTS * 20, vocab_size=400, mel_bins=32, hop_length=320, clip_s=1, tags=tags
            ).tokenizer
        )

    small = size(qwen2_audio.SMALL_TAGS)
    assert small <= 400
    assert size(Tagset(("<|timestamps|>",), tuple(stamps_to(1)))) == small + 102


def test_the_small_tags_are_those_of_the_demos_tasks():
    asked = [pretraining_prompt(task, 0, "tags_released") for task in ("transcribe", "caption")]
    tags = {piece + "|>" for prompt in asked for piece in prompt.split("|>") if piece}
    assert qwen2_audio.SMALL_TAGS == Tagset(tuple(sorted(tags)), ())

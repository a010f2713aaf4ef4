"""A judge in this process: its replies depend on the prompt and its files, on nothing beside them."""

import json
import shutil

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from align.evaluation.benchmarks.air_bench import Item
from align.evaluation.judges.chat_model import PARAMETERS, open_chat_model
from align.evaluation.judges.local_model import LocalModel
from align.evaluation.judges.prompt import Official

ITEM = Item("q1", "1.wav", "What is heard?", "A dog barks.", "a dog", "sound_QA", "made")
WORDS = ["<unk>", "<end>", "<bot>", *"abcdefghijklmnop"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random chat model of a few thousand parameters."""
    to = tmp_path_factory.mktemp("judge") / "judge"
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}<bot>"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.5,
        eos_token_id=1,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(to)
    tokenizer.save_pretrained(to)
    return to


PROMPTS = [
    [{"role": "user", "content": " ".join(WORDS[3:][(i * j) % 16] for j in range(i + 1))}] for i in range(20)
]


def replies(model, prompts):
    found = {}
    model.reply(prompts, found.__setitem__)
    return [found[i] for i in range(len(prompts))]


def changed(folder, to, name, **settings):
    shutil.copytree(folder, to)
    path = to / name
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return to


def test_replies_equal_stock_generate_and_do_not_depend_on_company(folder):
    model = LocalModel(folder, max_new_tokens=12)
    together = replies(model, PROMPTS)
    assert together == [replies(model, [prompt])[0] for prompt in PROMPTS]
    stock = LlamaForCausalLM.from_pretrained(folder)
    stock.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=1)
    for prompt, reply in zip(PROMPTS, together, strict=True):
        ids = torch.tensor([model._encode(model._render(prompt))])
        out = stock.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
        assert reply.text == model.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        assert (reply.finish_reason == "stop") == (int(out[0, -1]) == 1)
        assert reply.prompt_tokens == ids.shape[1]
    assert len({reply.text for reply in together}) > 3


@pytest.mark.parametrize(
    "setting",
    [{"repetition_penalty": 9.0}, {"no_repeat_ngram_size": 1}, {"num_beams": 3}, {"min_new_tokens": 9}],
)
def test_nothing_of_the_generation_config_leaks(folder, tmp_path, setting):
    other = LocalModel(changed(folder, tmp_path / "judge", "generation_config.json", **setting), 12)
    model = LocalModel(folder, 12)
    assert replies(other, PROMPTS) == replies(model, PROMPTS)
    assert other.identity == model.identity


def test_the_cache_key_knows_what_decides(folder, tmp_path):
    identity = LocalModel(folder, 12).identity
    assert LocalModel(folder, 13).identity != identity
    stops = LocalModel(changed(folder, tmp_path / "a", "generation_config.json", eos_token_id=[1, 5]), 12)
    assert stops.identity != identity
    rope = LocalModel(changed(folder, tmp_path / "b", "config.json", rms_norm_eps=0.1), 12)
    assert rope.identity != identity
    template = tmp_path / "c"
    shutil.copytree(folder, template)
    (template / "chat_template.jinja").write_text("{{ messages[0].content }}<bot>")
    assert LocalModel(template, 12).identity != identity


def test_a_thought_that_the_template_began_is_marked_and_special_tokens_are_kept(folder, tmp_path):
    to = tmp_path / "thinker"
    shutil.copytree(folder, to)
    template = "{% for m in messages %}{{ m.content }} {% endfor %}<bot><think>\n"
    (to / "chat_template.jinja").write_text(template)
    [reply] = replies(LocalModel(to, 4), PROMPTS[:1])
    assert reply.text.startswith("<think>")
    assert (
        Official().read(Official().write(ITEM, "x", "reference_first"), reply.text, "stop").state == "invalid"
    )


def test_the_one_parameter_of_a_local_judge(folder):
    assert open_chat_model(str(folder), None, {"max_tokens": 7}).parameters["max_tokens"] == 7
    assert open_chat_model(str(folder), None, {}).parameters == PARAMETERS
    for wrong in ({"temperature": 0.7}, {"top_p": 1}, {"max_tokens": None}, {"max_tokens": "many"}, {"n": 2}):
        with pytest.raises(ValueError, match=f"judge parameter.*{next(iter(wrong))}"):
            open_chat_model(str(folder), None, wrong)

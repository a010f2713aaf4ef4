"""Completions depend on the seed and the request, not on what ran before or how it was batched in time."""

from align.generation.generate import Decoding, Request, Sampler, batch_seed, complete_all, flatten

REQUESTS = [Request("Is the tone high or low?", (f"{i % 4}.wav",)) for i in range(6)]
DRAWN = Decoding(max_new_tokens=8, temperature=1.0, completions=3)


def test_the_same_seed_draws_the_same_and_another_differs(tiny):
    sampler = Sampler(tiny.policy, tiny.audio)
    first = complete_all(sampler, REQUESTS, DRAWN, seed=0, batch_size=4)
    again = complete_all(Sampler(tiny.policy, tiny.audio), REQUESTS, DRAWN, seed=0, batch_size=4)
    other = complete_all(sampler, REQUESTS, DRAWN, seed=1, batch_size=4)
    assert first == again != other
    assert [len(group) for group in first] == [3] * 6


def test_a_later_batch_does_not_need_the_earlier_one(tiny):
    sampler = Sampler(tiny.policy, tiny.audio)
    whole = complete_all(sampler, REQUESTS, DRAWN, seed=0, batch_size=4)
    assert sampler.complete(REQUESTS[4:], DRAWN, batch_seed(0, 1)) == whole[4:]


def test_greedy_answers_do_not_depend_on_padding_or_company(tiny):
    sampler = Sampler(tiny.policy, tiny.audio)
    greedy = Decoding(max_new_tokens=8)
    together = flatten(complete_all(sampler, REQUESTS, greedy, seed=0, batch_size=6))
    alone = flatten(complete_all(sampler, REQUESTS, greedy, seed=0, batch_size=1))
    assert together == alone


def test_a_plain_text_is_continued_without_a_chat_around_it(tiny):
    sampler = Sampler(tiny.policy, tiny.audio)
    plain = Request("<|audio_bos|><|AUDIO|><|audio_eos|>Generate the caption in English:", ("0.wav",), True)
    batch = sampler._batch([plain])
    text = sampler.processor.tokenizer.decode(batch["input_ids"][0])
    assert text.startswith("<|audio_bos|>")
    assert "<|im_start|>" not in text

"""The engine against stock transformers, request by request, and what company and configs must not change."""

import pytest

from align.generation.decoding import uniforms
from align.generation.engine import Completion, Decoding, Request
from align.generation.transformers_engine import TransformersEngine
from align.models.features import ClipFeatures
from align.models.qwen2_audio.model import load_processor
from preference_data.schema import Turn
from tests.align.generation.toy_policy import QUESTIONS, Stock, with_generation_config

PLAIN = "<|audio_bos|><|AUDIO|><|audio_eos|>"
DRAWN = Decoding(max_new_tokens=12, temperature=1.0, completions=3)
GREEDY = Decoding(max_new_tokens=12)


def requests(n):
    """Chats with one clip, two clips or none, or of several turns, and plain texts, of many lengths."""
    asked = list(QUESTIONS)
    found = []
    for i in range(n):
        text = asked[i % 3] + " low" * (i % 7) + " high" * (i % 11)
        clips = (f"{i % 4}.wav", f"{(i + 1 + i // 4) % 4}.wav")
        match i % 5:
            case 0 | 1:
                found.append(Request(text, clips[:1]))
            case 2:
                found.append(Request(text, clips))
            case 3:
                found.append(Request(PLAIN + text, clips[:1], plain=True))
            case 4 if i % 2:  # two turns, with a clip in each, in the first alone, or in none
                n_earlier, n = [(1, 2), (1, 1), (0, 0)][i // 10 % 3]
                earlier = Turn(
                    question=asked[(i + 1) % 3], answer="high " * (i % 4), audios=clips[:n_earlier]
                )
                brief = "Say low." if i % 3 == 0 else None
                found.append(Request(text, clips[:n], system=brief, history=(earlier,)))
            case _:
                found.append(Request(text, ()))
    return found


@pytest.fixture(scope="module")
def engine(toy, tiny):
    return engine_of(toy, tiny)


def engine_of(policy, tiny):
    return TransformersEngine(policy, ClipFeatures(load_processor(policy), tiny.audio))


def completed(engine, numbered, decoding, seed=0):
    found = dict(engine.complete(numbered, decoding, seed))
    assert list(found) == list(numbered)
    return found


def close(first, second):
    """The same tokens and texts, log-probs but for rounding."""
    assert first.token_ids == second.token_ids
    assert first.logps == pytest.approx(second.logps, abs=2e-5)
    return True


def test_greedy_equals_stock_transformers_on_200_requests(engine, toy, tiny):
    stock = Stock(toy, tiny.audio)
    asked = requests(200)
    numbered = dict(enumerate(asked))
    found = {}
    for start in range(0, 200, 50):
        found |= completed(engine, {i: numbered[i] for i in range(start, start + 50)}, GREEDY)
    ends = 0
    for number, request in numbered.items():
        (ours,), theirs = found[number], stock.complete(request, GREEDY.max_new_tokens)
        assert close(ours, theirs)
        if not request.plain:
            assert ours.text == theirs.text.strip()
        ends += ours.token_ids[-1] in engine.stops
    assert 50 < ends < 200  # some end their turn, some are cut
    assert found[0][0].text == "The tone is high."


def test_two_clips_stay_with_their_prompt_for_every_completion(engine, toy, tiny):
    """`num_return_sequences` made rows hear [a, a], [b, b] instead of [a, b], [a, b]."""
    stock = Stock(toy, tiny.audio)
    pairs = [("0.wav", "1.wav"), ("1.wav", "0.wav"), ("2.wav", "3.wav")]
    asked = {i: Request("Is the tone high or low?", clips) for i, clips in enumerate(pairs)}
    found = completed(engine, asked, GREEDY._replace(completions=2))
    for number, request in asked.items():
        theirs = stock.complete(request, 12)
        assert all(close(ours, theirs) for ours in found[number])
    assert found[0][0].logps != found[1][0].logps


def test_what_was_said_before_is_heard(engine):
    """Earlier clips, answers and the system prompt each change what follows."""
    earlier = Turn(question="high?", answer="high", audios=("0.wav",))
    whole = Request("Is the tone high or low?", ("0.wav", "1.wav"), system="Say.", history=(earlier,))
    others = [
        whole._replace(system=None),
        whole._replace(history=(earlier.model_copy(update={"answer": "low"}),)),
        whole._replace(
            history=(earlier.model_copy(update={"audios": ("2.wav",)}),), audios=("2.wav", "1.wav")
        ),
        whole._replace(history=(earlier.model_copy(update={"audios": ("0.wav", "1.wav")}),)),
    ]
    found = completed(engine, dict(enumerate([whole, *others])), GREEDY)
    assert len({tuple(group[0].logps) for group in found.values()}) == 5


def test_company_and_order_do_not_change_what_is_drawn(engine):
    numbered = {10 * i: request for i, request in enumerate(requests(12))}
    together = completed(engine, numbered, DRAWN, seed=3)
    alone = {}
    for number in reversed(numbered):
        alone |= completed(engine, {number: numbered[number]}, DRAWN, seed=3)
    for number, group in together.items():
        assert all(close(*both) for both in zip(group, alone[number], strict=True))
    few = completed(engine, numbered, DRAWN._replace(completions=1, max_new_tokens=5), seed=3)
    for number, (first,) in few.items():
        assert first.token_ids == together[number][0].token_ids[:5]


def test_draws_differ_by_seed_number_and_completion(engine):
    same = Request("Generate the caption in English: low", ("0.wav",))
    hot = DRAWN._replace(temperature=2.0)
    found = completed(engine, {0: same, 1: same}, hot)
    assert completed(engine, {0: same}, hot, seed=1)[0] != found[0]
    drawn = [tuple(completion.token_ids) for group in found.values() for completion in group]
    assert len(set(drawn)) == 6


LEAKS = {
    "repetition_penalty": 5.0,
    "no_repeat_ngram_size": 1,
    "num_beams": 3,
    "min_new_tokens": 10,
    "min_length": 200,
    "min_p": 0.9,
    "typical_p": 0.1,
    "epsilon_cutoff": 0.5,
    "eta_cutoff": 0.5,
    "top_k": 1,
    "top_p": 0.1,
    "temperature": 5.0,
    "do_sample": True,
    "max_length": 3,
    "max_new_tokens": 2,
    "suppress_tokens": list(range(5, 200)),
    "begin_suppress_tokens": list(range(5, 200)),
    "bad_words_ids": [[i] for i in range(5, 200)],
    "forced_bos_token_id": 7,
    "forced_eos_token_id": 7,
    "exponential_decay_length_penalty": [0, 10.0],
    "encoder_repetition_penalty": 5.0,
    "length_penalty": 9.0,
}


@pytest.mark.parametrize("setting", LEAKS)
def test_nothing_of_the_generation_config_leaks(engine, toy, tiny, tmp_path, setting):
    other = engine_of(with_generation_config(toy, tmp_path / "p", **{setting: LEAKS[setting]}), tiny)
    asked = dict(enumerate(requests(6)))
    for decoding in (GREEDY, DRAWN):
        assert completed(other, asked, decoding) == completed(engine, asked, decoding)


def test_stop_tokens_of_the_generation_config_are_kept(engine, toy, tiny, tmp_path):
    request = {0: Request("Is the tone high or low?", ("0.wav",))}
    whole = completed(engine, request, GREEDY)[0][0].token_ids
    ends = [engine.stops[0], whole[2]]
    other = engine_of(with_generation_config(toy, tmp_path / "p", eos_token_id=ends), tiny)
    assert completed(other, request, GREEDY)[0][0].token_ids == whole[:3]


def test_one_tower_pass_and_one_prefill_for_four_completions(engine):
    """Counted by hooks; the second request is about the same clip."""
    counts = {"tower": [], "prefill": 0}
    inner = engine.model.model

    def tower(module, args):
        counts["tower"].append(tuple(args[0].shape))

    def language(module, args, kwargs):
        rows = kwargs.get("inputs_embeds")
        counts["prefill"] += rows is not None and rows.shape[1] > 1

    hooks = [
        inner.audio_tower.conv1.register_forward_pre_hook(tower),
        inner.language_model.register_forward_pre_hook(language, with_kwargs=True),
    ]
    asked = {0: Request("high?", ("0.wav",)), 1: Request("Is the tone high or low?", ("0.wav",))}
    try:
        completed(engine, asked, DRAWN._replace(completions=4))
    finally:
        for hook in hooks:
            hook.remove()
    frames = engine.clips(["0.wav"])[0].n_frames
    assert counts == {"tower": [(1, 32, frames + 2)], "prefill": 1}


def test_logps_are_those_before_temperature_and_top_p(engine):
    request = {0: Request("Is the tone high or low?", ("1.wav",))}
    greedy = completed(engine, request, GREEDY)[0][0]
    cold = completed(engine, request, Decoding(12, temperature=0.01, top_p=0.5))[0][0]
    assert close(greedy, cold)


def test_loaded_weights_count_and_a_failed_load_changes_nothing(toy, tiny):
    engine = engine_of(tiny.policy, tiny)
    asked = dict(enumerate(requests(5)))
    untrained = completed(engine, asked, GREEDY)
    with pytest.raises(OSError):
        engine.load(tiny.audio)
    assert completed(engine, asked, GREEDY) == untrained
    engine.load(toy)
    assert completed(engine, asked, GREEDY) == completed(engine_of(toy, tiny), asked, GREEDY)
    engine.close()


def test_a_plain_text_is_continued_without_a_chat_around_it(engine):
    plain = Request(PLAIN + "Generate the caption in English:", ("0.wav",), True)
    rows, _ = engine._rows([plain])
    text = engine.processor.tokenizer.decode(rows[0])
    assert text.startswith("<|audio_bos|>")
    assert "<|im_start|>" not in text


@pytest.mark.parametrize("decoding", [GREEDY, DRAWN._replace(completions=1)], ids=["greedy", "drawn"])
@pytest.mark.parametrize("is_long", [False, True])
def test_a_stream_gives_the_tokens_of_whole_completions_and_lets_rows_go(engine, decoding, is_long):
    """Also past the room that a cache has at first; a row that is sent back draws nothing more."""
    if is_long:
        decoding = decoding._replace(max_new_tokens=300, suppress=tuple(engine.stops))
    numbered = dict(enumerate(requests(6)))
    whole = [group[0].token_ids for group in completed(engine, numbered, decoding, seed=2).values()]
    rows, clips = engine._rows(list(numbered.values()))
    steps = engine.stream(rows, clips, decoding, uniforms(decoding, 2, list(numbered)))
    streamed, drawn = [[] for _ in numbered], next(steps)
    while drawn is not None:
        for row, token in zip(drawn.rows.tolist(), drawn.tokens.tolist(), strict=True):
            streamed[row].append(token)
        try:
            drawn = steps.send([0] if len(streamed[0]) == 2 else None)
        except StopIteration:
            drawn = None
    assert len(whole[0]) > 2
    assert streamed == [whole[0][:2], *whole[1:]]
    assert max(map(len, whole)) == 300 or not is_long


def test_no_request_gives_nothing(engine):
    assert list(engine.complete({}, GREEDY, 0)) == []
    assert isinstance(next(engine.complete({7: requests(1)[0]}, GREEDY, 0))[1][0], Completion)

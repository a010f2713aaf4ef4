"""Our token ids and features are the processor's, computed with less work."""

import numpy as np
import pytest
import soundfile
import torch
from transformers import Qwen2AudioProcessor

from align.models.chat import assistant, encode_chat, encode_prompt, expand_audio, user
from align.models.features import ClipFeatures, stack
from align.models.qwen2_audio import model as qwen2_audio
from align.models.qwen2_audio.clips import n_audio_tokens

CHAT = [
    user("Is the tone high or low?", n_clips=2),
    assistant("The tone is high."),
    user("And <|im_end|> <b>now</b>?"),
    assistant("The tone is low."),
]


@pytest.fixture
def processor(tiny):
    return qwen2_audio.load_processor(tiny.policy)


def test_thirty_seconds_are_750_tokens():
    assert n_audio_tokens(3000) == 750


def test_our_template_renders_what_the_stock_one_does(processor):
    stock = Qwen2AudioProcessor(processor.feature_extractor, processor.tokenizer)
    ours = processor.apply_chat_template(CHAT, tokenize=False)
    theirs = stock.apply_chat_template(CHAT, tokenize=False, chat_template=stock.default_chat_template)
    assert ours == theirs
    assert "Audio 2: <|audio_bos|><|AUDIO|><|audio_eos|>" in ours


def test_ids_and_features_equal_the_processors(processor, tiny):
    features = ClipFeatures(processor, tiny.audio)
    clips = features(["1.wav", "3.wav"])
    waves = [soundfile.read(tiny.audio / name, dtype="float32")[0] for name in ("1.wav", "3.wav")]
    text = processor.apply_chat_template(CHAT, tokenize=False)
    theirs = processor(
        text=text, audio=waves, sampling_rate=16_000, return_tensors="pt", add_special_tokens=False
    )
    audio_id = processor.tokenizer.convert_tokens_to_ids("<|AUDIO|>")
    ours = expand_audio(
        encode_chat(processor, CHAT), [n_audio_tokens(clip.n_frames) for clip in clips], audio_id
    )
    assert ours.ids == theirs["input_ids"][0].tolist()
    stacked = stack(clips)
    torch.testing.assert_close(stacked["input_features"], theirs["input_features"], rtol=0, atol=1e-6)
    assert torch.equal(stacked["feature_attention_mask"], theirs["feature_attention_mask"].long())


def test_only_the_assistant_is_masked_in(processor):
    encoded = encode_chat(processor, CHAT)
    spoken = [token for token, mask in zip(encoded.ids, encoded.mask, strict=True) if mask]
    assert processor.tokenizer.decode(spoken) == "The tone is high.<|im_end|>The tone is low.<|im_end|>"


def test_a_prompt_is_the_beginning_of_its_chat(processor):
    prompt = encode_prompt(processor, CHAT[:1]).ids
    assert encode_chat(processor, CHAT).ids[: len(prompt)] == prompt


def test_a_missing_clip_is_an_error(processor):
    audio_id = processor.tokenizer.convert_tokens_to_ids("<|AUDIO|>")
    with pytest.raises(ValueError, match="names 2 clips but 1 were given"):
        expand_audio(encode_chat(processor, CHAT), [5], audio_id)


def test_each_clip_is_read_once_and_memory_is_bounded(processor, tiny):
    one = ClipFeatures(processor, tiny.audio)(["0.wav"])[0].mel.nbytes
    features = ClipFeatures(processor, tiny.audio, cache_bytes=2 * one)
    first = features(["0.wav", "1.wav", "0.wav"])
    assert first[0].mel is first[2].mel
    assert features(["1.wav"])[0].mel is first[1].mel
    features(["2.wav", "3.wav"])
    assert features._bytes <= 2 * one


def test_the_least_recently_used_clip_goes_first(processor, tiny):
    names = ["0.wav", "1.wav", "2.wav"]
    sizes = [clip.mel.nbytes for clip in ClipFeatures(processor, tiny.audio)(names)]
    features = ClipFeatures(processor, tiny.audio, cache_bytes=sum(sizes) - 1)
    first, second = features(names[:2])
    assert features(["0.wav"])[0].mel is first.mel
    features(["2.wav"])
    assert features(["0.wav"])[0].mel is first.mel
    assert features(["1.wav"])[0].mel is not second.mel


def test_a_very_short_clip_still_has_tokens(processor, tmp_path):
    soundfile.write(tmp_path / "x.wav", np.full(320, 0.1, dtype=np.float32), 16_000)
    assert ClipFeatures(processor, tmp_path)(["x.wav"])[0].n_frames >= 3

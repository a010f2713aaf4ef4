"""What pre-training starts from, where parts of the model are random."""

from pathlib import Path

import pytest
import torch

from align.models.features import mel_features, stack
from align.models.qwen2_audio.clips import n_audio_tokens
from align.recipe.config.training import PretrainConfig
from align.stages import pretrain
from preference_data import store
from preference_data.audio.decode import SAMPLE_RATE
from preference_data.corpora.catalog import phrasebook_of
from preference_data.schema import TaskExample

ENCODER = Path(__file__).parents[4] / "shared" / "data" / "whisper-base-encoder"
"""Whisper base's encoder, beside the checkout; elsewhere the test that needs it is skipped."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "phrasebook.yaml").write_bytes(phrasebook_of("spoken_digits", None).read_bytes())
    with (folder / "pretrain.jsonl").open("w") as file:
        example = TaskExample(id="a", audios=("a.wav",), task="transcribe", text=" one two")
        file.write(example.model_dump_json() + "\n")
    assert list(store.stream(folder / "pretrain.jsonl", TaskExample))
    return folder


def start(corpus, out, **model):
    config = PretrainConfig(
        stage="pretrain", corpus="0_corpus", model=model, steps=1, batch_size=1, learning_rate=1e-3
    )
    out.mkdir()
    return pretrain._start(config, {"0_corpus": corpus, "encoder": ENCODER}, out / "assembled")


TEXT = {"d_model": 32, "heads": 2, "layers": 1}


def test_random_parts_speak_the_corpus_and_no_tags_that_it_does_not_need(corpus, tmp_path):
    audio = {"d_model": 32, "heads": 2, "layers": 1, "mel_bins": 16}
    processor, model = start(corpus, tmp_path / "a", audio=audio, text=TEXT, clip_s=4)
    assert processor.feature_extractor.n_samples == 4 * SAMPLE_RATE
    assert model.config.audio_config.max_source_positions == 200
    names = processor.tokenizer.get_vocab()
    assert len(names) <= 640
    assert "<|zh|>" not in names
    assert not [name for name in names if name.startswith("<|0.")]
    words = processor.tokenizer("Which digit is said first?")["input_ids"]
    assert len(words) == 6
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["assembled", "assembly.json"]
    again = start(corpus, tmp_path / "b", audio=audio, text=TEXT, clip_s=4)[1]
    assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))


@pytest.mark.skipif(not ENCODER.is_dir(), reason=f"{ENCODER} is not here: Whisper base's encoder")
def test_a_window_of_whisper_hears_what_all_of_it_hears(corpus, tmp_path):
    """30 s of positions against 4 s, on a clip of 1 s: logits of the stock model."""
    wave = 0.1 * torch.randn(SAMPLE_RATE, generator=torch.Generator().manual_seed(0)).numpy()
    logits = []
    for clip_s in (4, None):
        processor, model = start(corpus, tmp_path / str(clip_s), audio="encoder", text=TEXT, clip_s=clip_s)
        [clip] = mel_features(processor.feature_extractor, [wave])
        audio_id = processor.tokenizer.convert_tokens_to_ids("<|AUDIO|>")
        ids = torch.tensor([[audio_id] * n_audio_tokens(clip.n_frames) + [300, 301]])
        with torch.no_grad():
            mask = torch.ones_like(ids)
            logits.append(model.eval()(input_ids=ids, attention_mask=mask, **stack([clip])).logits)
    torch.testing.assert_close(*logits, rtol=0, atol=1e-4)
    assert logits[0].std() > 0.01

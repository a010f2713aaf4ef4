"""Log-mel from the un-padded waveform against the stock extractor, which pads every clip first."""

import numpy as np
import pytest
import soundfile
import torch

from align.models.features import ClipFeatures, SilentClips, stack
from align.models.qwen2_audio import model as qwen2_audio
from align.models.qwen2_audio.clips import n_audio_tokens, pack_rows, stack_unpadded

RATE = 16_000


def extractor(hop_length):
    return qwen2_audio.build_processor(
        ["a b"] * 20, vocab_size=300, mel_bins=40, hop_length=hop_length, clip_s=2
    )


def speech(n, seed=0):
    """Noise of changing loudness that ends abruptly: whatever is mirrored at its end shows."""
    draw = np.random.default_rng(seed)
    return (0.3 * draw.standard_normal(n) * np.linspace(0.2, 1, n)).astype(np.float32)


@pytest.fixture
def folder(tmp_path):
    for i, n in enumerate((16_000, 16_001, 7_999, 1_700, 31_999, 32_000, 31_700, 160 * 101)):
        soundfile.write(tmp_path / f"{i}.wav", speech(n, i), RATE, subtype="FLOAT")
    soundfile.write(tmp_path / "9.wav", speech(40_000, 9), RATE, subtype="FLOAT")
    soundfile.write(tmp_path / "8.wav", np.zeros(9_000, np.float32), RATE, subtype="FLOAT")
    return tmp_path


@pytest.mark.parametrize("hop_length", [80, 160, 320])
def test_features_equal_the_stock_ones(folder, hop_length):
    """Bit for bit where the matrix product rounds alike, else within one unit in the last place of 1."""
    processor = extractor(hop_length)
    features = ClipFeatures(processor, folder, longest_s=3)  # of the last one the model hears 2 s
    names = [f"{i}.wav" for i in range(10)]
    waves = [soundfile.read(folder / name, dtype="float32")[0] for name in names]
    stock = processor.feature_extractor(waves, sampling_rate=RATE, return_attention_mask=True)
    together = features(names)
    alone = [ClipFeatures(processor, folder, longest_s=3)([name])[0] for name in names]
    for i, (one, other) in enumerate(zip(together, alone, strict=True)):
        assert one.n_frames == other.n_frames == stock["attention_mask"][i].sum()
        for clip in (one, other):
            expected = torch.tensor(stock["input_features"][i])
            assert (clip.padded().mel - expected).abs().max() <= 1.2e-7
            assert clip.mel.shape[-1] <= clip.n_frames + 400 // 2 // hop_length + 2


def test_stacking_pads_for_the_stock_model_only(folder):
    clips = ClipFeatures(extractor(160), folder)(["0.wav", "2.wav"])
    assert [clip.n_frames for clip in clips] == [100, 50]
    assert stack(clips)["input_features"].shape == (2, 40, 200)
    assert stack(clips)["feature_attention_mask"].sum(-1).tolist() == [100, 50]
    short = stack_unpadded(clips)["input_features"]
    assert short.shape == (2, 40, 102)
    assert torch.equal(short[1, :, :52], clips[1].mel[:, :52])


def test_a_naive_cut_is_wrong(folder):
    """Negative control: without silence after it, the transform mirrors the clip at its end."""
    processor = extractor(160)
    wave = soundfile.read(folder / "0.wav", dtype="float32")[0]
    cut = processor.feature_extractor(wave, sampling_rate=RATE, padding="do_not_pad", truncation=False)
    right = ClipFeatures(processor, folder)(["0.wav"])[0]
    assert np.abs(cut["input_features"][0] - right.mel[:, :100].numpy()).max() > 1e-3


def test_a_clip_of_the_full_length_has_nothing_after_it(folder):
    full = ClipFeatures(extractor(160), folder)(["5.wav"])[0]
    assert full.n_frames == full.n_padded == full.mel.shape[-1] == 200
    assert full.padded().mel.shape[-1] == 200
    packed = pack_rows([torch.tensor([9] * n_audio_tokens(full.n_frames))], [[0]], [full.n_frames], 9)
    assert packed.clips is not None
    assert len(packed.clips.position) == 100


def test_silence_is_as_long_as_the_clip_and_says_nothing_of_it(folder):
    processor, names = extractor(160), ["0.wav", "2.wav", "4.wav"]
    clips, silent = ClipFeatures(processor, folder), SilentClips(processor, folder, cache_bytes=0)
    assert [len(silent.wave(name)) for name in names] == [len(clips.wave(name)) for name in names]
    assert not any(silent.wave(name).any() for name in names)
    for clip, own in zip(silent(names), clips(names), strict=True):
        assert (clip.n_frames, clip.n_padded) == (own.n_frames, own.n_padded)
        assert clip.mel.std() == 0
        assert own.mel.std() > 0.1

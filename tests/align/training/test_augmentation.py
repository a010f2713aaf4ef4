"""Augmentation is a pure function of its seed, and does what it says."""

import pytest
import torch

from align.training.augmentation import (
    POLICIES,
    Augmentation,
    SpecAugment,
    augment,
    augmentation_of,
    mask,
    warp_frequency,
)

FULL = Augmentation(gain=0.2, time_mask=10, frequency_mask=6, vocal_tract=0.1, channel=0.1, floor=0.3)


def mel():
    return torch.randn(64, 150, generator=torch.Generator().manual_seed(0))


def test_same_seed_same_features_and_the_original_is_untouched():
    x = mel()
    first, second, other = augment(x, 150, FULL, 7), augment(x, 150, FULL, 7), augment(x, 150, FULL, 8)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(x, mel())


def test_gain_is_one_number_within_its_bound():
    change = augment(mel(), 150, Augmentation(gain=0.2), 3) - mel()
    assert change.std() < 1e-6
    assert 0 < change.abs().max() <= 0.2


def test_a_time_mask_blanks_whole_frames_and_no_more_than_asked():
    masked = augment(mel(), 150, Augmentation(time_mask=10), 1)
    frames = (masked != mel()).all(dim=0)
    assert 0 < frames.sum() < 10
    assert torch.equal(masked[:, ~frames], mel()[:, ~frames])


@pytest.mark.parametrize("seed", range(8))
def test_a_clip_behind_which_silence_follows_is_masked_within_itself(seed):
    """A window of 30 s must not take the masks from a clip of one."""
    silence = torch.full((64, 3), -1.0)
    x = torch.cat([mel()[:, :20], silence], dim=1)
    changed = augment(x, 20, Augmentation(gain=0.2, time_mask=10), seed)
    gain = changed[0, -1] - x[0, -1]
    assert torch.allclose(changed[:, 20:], silence + gain)
    masked = ~torch.isclose(changed, x + gain).all(dim=0)
    assert masked[:20].sum() == masked.sum() <= 10


def test_a_ratio_of_one_warps_nothing():
    torch.testing.assert_close(warp_frequency(mel(), 1.0), mel(), rtol=0, atol=1e-4)


def test_a_larger_ratio_reads_from_higher_bins():
    ramp = torch.arange(64.0)[:, None].expand(64, 5)
    assert (warp_frequency(ramp, 1.1)[5:60] > ramp[5:60]).all()


def test_librispeech_basic_is_the_papers_policy():
    policy = augmentation_of("librispeech_basic")
    assert policy == POLICIES["librispeech_basic"] == SpecAugment(27, 1, 100, 1, 1.0)
    assert augmentation_of(policy=None, gain=0.2) == Augmentation(gain=0.2)


@pytest.mark.parametrize("seed", range(8))
def test_its_masks_are_one_band_and_one_stretch_within_the_clip(seed):
    x = mel()
    masked = mask(x, 120, POLICIES["librispeech_basic"], seed)
    assert torch.equal(masked, mask(x, 120, POLICIES["librispeech_basic"], seed))
    assert torch.equal(masked[:, 120:], x[:, 120:])  # padding stays padding
    changed = masked[:, :120] != x[:, :120]
    frames, bins = changed.all(dim=0), changed.all(dim=1)
    assert frames.sum() <= 100
    assert bins.sum() <= 27
    assert not changed[~bins][:, ~frames].any()
    for line in (frames, bins):
        assert (line.int().diff().abs()).sum() <= 2  # in one piece
    assert (masked[:, :120][changed] == x[:, :120].mean()).all()


def test_masks_reach_the_policys_width_and_both_ends():
    blank = torch.zeros(80, 120)
    blank[0, 0] = 1  # so that the mean is not the masked value
    policy = POLICIES["librispeech_basic"]
    changed = [mask(blank, 120, policy, seed) != blank for seed in range(600)]
    widths = {int(one.all(dim=0).sum()) for one in changed}
    assert min(widths) == 0
    assert 95 <= max(widths) <= 100
    assert any(one[:, 0].all() for one in changed)
    assert any(one[:, -1].all() for one in changed)


def test_a_clip_shorter_than_the_mask_and_a_share_of_it():
    x = mel()
    assert torch.isfinite(mask(x, 1, POLICIES["librispeech_basic"], 0)).all()
    half = SpecAugment(0, 0, 100, 1, 0.5)
    widths = [int((mask(x, 40, half, seed) != x).all(dim=0).sum()) for seed in range(100)]
    assert 15 <= max(widths) <= 20

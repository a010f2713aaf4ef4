"""Augmentation is a pure function of its seed, and does what it says."""

import torch

from align.training.augment import Augmentation, augment, warp_frequency

FULL = Augmentation(gain=0.2, time_mask=10, frequency_mask=6, vocal_tract=0.1, channel=0.1, floor=0.3)


def mel():
    return torch.randn(64, 150, generator=torch.Generator().manual_seed(0))


def test_same_seed_same_features_and_the_original_is_untouched():
    x = mel()
    first, second, other = augment(x, FULL, 7), augment(x, FULL, 7), augment(x, FULL, 8)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(x, mel())


def test_gain_is_one_number_within_its_bound():
    change = augment(mel(), Augmentation(gain=0.2), 3) - mel()
    assert change.std() < 1e-6
    assert 0 < change.abs().max() <= 0.2


def test_a_time_mask_blanks_whole_frames_and_no_more_than_asked():
    masked = augment(mel(), Augmentation(time_mask=10), 1)
    frames = (masked != mel()).all(dim=0)
    assert 0 < frames.sum() < 10
    assert torch.equal(masked[:, ~frames], mel()[:, ~frames])


def test_a_ratio_of_one_warps_nothing():
    torch.testing.assert_close(warp_frequency(mel(), 1.0), mel(), rtol=0, atol=1e-4)


def test_a_larger_ratio_reads_from_higher_bins():
    ramp = torch.arange(64.0)[:, None].expand(64, 5)
    assert (warp_frequency(ramp, 1.1)[5:60] > ramp[5:60]).all()

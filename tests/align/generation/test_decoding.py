"""Drawing tokens: transformers' nucleus, the right frequencies, numbers that depend on nothing else."""

import numpy as np
import pytest
import torch
from transformers import TopPLogitsWarper

from align.generation.decoding import draw, nucleus, uniforms
from align.generation.engine import Decoding, request_seed

LOGITS = torch.randn(150, 50, generator=torch.Generator().manual_seed(0)) * 3


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
def test_the_nucleus_is_that_of_transformers(top_p):
    warped = TopPLogitsWarper(top_p)(None, LOGITS)
    kept = nucleus(LOGITS.softmax(-1), top_p)
    assert torch.equal(kept > 0, warped > -torch.inf)
    assert (kept > 0).any(-1).all()
    assert torch.equal(kept[kept > 0], LOGITS.softmax(-1)[kept > 0])


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.8)])
def test_tokens_are_drawn_as_often_as_they_are_likely(temperature, top_p):
    n = 40_000
    logits = LOGITS[:1].expand(n, -1)
    decoding = Decoding(temperature=temperature, top_p=top_p)
    numbers = torch.from_numpy(np.random.default_rng(0).random(n))
    found = torch.bincount(draw(logits, decoding, numbers), minlength=50) / n
    warped = TopPLogitsWarper(top_p)(None, LOGITS[:1] / temperature).softmax(-1)[0]
    assert (found - warped).abs().max() < 0.01
    assert found[warped == 0].sum() == 0


def test_the_ends_of_the_interval_draw_tokens_that_are_possible():
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]])
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert draw(logits.expand(2, -1), Decoding(temperature=1.0), ends).tolist() == [1, 2]


def test_numbers_depend_on_seed_request_and_completion_alone():
    decoding = Decoding(8, temperature=1.0, completions=2)
    numbers = uniforms(decoding, 0, [5, 6])
    assert numbers.shape == (4, 8)
    assert np.array_equal(numbers[2:], uniforms(decoding, 0, [6]))
    longer = uniforms(decoding._replace(max_new_tokens=20, completions=1), 0, [6])
    assert np.array_equal(longer[0, :8], numbers[2])
    assert len(np.unique(numbers)) == 32
    assert uniforms(Decoding(), 0, [5]) is None


def test_seeds_stay_the_same_for_ever():
    """A changed seed would change every finished run."""
    assert request_seed(0, 1) == 0x28959EB248AA7B9A
    assert len({request_seed(s, n, i) for s in range(9) for n in range(9) for i in range(9)}) == 9**3

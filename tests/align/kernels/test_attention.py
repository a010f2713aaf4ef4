"""Every back end against the dense oracle, values and gradients; the oracle against a loop by hand."""

import math

import numpy as np
import pytest
import torch

from align.kernels.attention import BACKENDS, Ragged, dense, split, varlen
from align.kernels.choice import agrees, choose
from align.kernels.prefix_tree import clips_apart, prefix_tree


def tree(causal=True):
    draw = np.random.default_rng(0)
    prompt = draw.integers(0, 50, 11)
    rows = [np.concatenate([prompt, draw.integers(50, 99, n)]) for n in (5, 1, 8)]
    rows += [np.concatenate([rows[0], draw.integers(0, 50, 6)]), draw.integers(0, 50, 7)]
    return Ragged.of(prefix_tree(rows).segments, causal=causal)


def states(length, heads=4, key_heads=4, seed=0, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)
    return [
        torch.randn(1, n, length, 8, generator=draw, dtype=dtype, requires_grad=True)
        for n in (heads, key_heads, key_heads)
    ]


def slow_varlen(query, key, value, query_bounds, key_bounds, max_q, max_k, *, scale, window_size, **_):
    """What torch's varlen_attn computes on CUDA, segment by segment and query by query."""
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    outputs = []
    for (a, b), (c, d) in zip(_pairs(query_bounds), _pairs(key_bounds), strict=True):
        assert b - a <= max_q
        assert d - c <= max_k
        for i in range(b - a):
            last = d - c if window_size == (-1, -1) else d - c - (b - a) + i + 1
            weights = torch.einsum("hd,khd->hk", query[a + i], key[c : c + last]) * scale
            outputs.append(torch.einsum("hk,khd->hd", weights.softmax(-1), value[c : c + last]))
    return torch.stack(outputs)


def _pairs(bounds):
    return list(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True))


def values_and_gradients(attend, sees, heads, key_heads):
    length = sees.segments[-1].end
    inputs = states(length, heads, key_heads)
    output = attend(*inputs, sees, 0.3)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (output * weights).sum().backward()
    return [output.detach(), *(x.grad for x in inputs)]


def by_varlen(query, key, value, sees, scale):
    return varlen(query, key, value, sees, scale, kernel=slow_varlen)


@pytest.mark.parametrize("attend", [split, by_varlen])
@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("kind", ["tree", "clips"])
def test_back_ends_equal_the_oracle(attend, key_heads, kind):
    sees = tree() if kind == "tree" else Ragged.of(clips_apart([5, 1, 9]), causal=False)
    ours = values_and_gradients(attend, sees, 4, key_heads)
    oracle = values_and_gradients(dense, sees, 4, key_heads)
    for ours_one, oracle_one in zip(ours, oracle, strict=True):
        torch.testing.assert_close(ours_one, oracle_one, rtol=0, atol=1e-13)


def test_the_oracle_sees_a_row_as_it_would_alone():
    """Row 1 2 3 and row 1 2 4 packed as 1 2 3 4: the 4 (place 3) sees places 0, 1 and itself."""
    sees = Ragged.of(prefix_tree([np.array([1, 2, 3]), np.array([1, 2, 4])], 1).segments, causal=True)
    assert sees.mask(4).int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 1]]
    assert sees.n_pairs() == 1 + 2 + 3 + 3
    query, key, value = states(4)
    out = dense(query, key, value, sees, 1 / math.sqrt(8))
    row = [0, 1, 3]
    alone = torch.nn.functional.scaled_dot_product_attention(
        query[:, :, row], key[:, :, row], value[:, :, row], is_causal=True
    )
    torch.testing.assert_close(out[:, :, row], alone)


def test_autocast_decides_the_type_of_varlen():
    """torch's kernel is not known to autocast; RoPE leaves queries and keys in float32, values are not."""
    sees = tree()
    query, key, value = states(sees.segments[-1].end, dtype=torch.float32)
    got = []

    def kernel(*args, **kwargs):
        got.extend(x.dtype for x in args[:3])
        return slow_varlen(*args, **kwargs)

    with torch.autocast("cpu", torch.bfloat16):
        varlen(query, key, value.bfloat16(), sees, 0.3, kernel=kernel)
    assert got == [torch.bfloat16] * 3


def test_dropping_the_tree_changes_the_result():
    """Negative control: plain causal attention over the packed row is something else."""
    sees = tree()
    length = sees.segments[-1].end
    inputs = states(length)
    one_row = Ragged.of(clips_apart([length]), causal=True)
    gap = (dense(*inputs, sees, 0.3) - dense(*inputs, one_row, 0.3)).abs().max()
    assert gap > 0.1


def test_a_cpu_always_takes_split():
    """A choice by the clock would make a resumed run differ from an unbroken one in its last bits."""
    assert choose(torch.device("cpu"), torch.float32, 4, 8) == "split"


def test_a_back_end_with_other_results_is_found_out(monkeypatch):
    """Queries aligned to the first key instead of the last: what a kernel may do without saying so."""

    def upper_left(query, key, value, sees, scale):
        outputs = []
        for segment in sees.segments:
            keys, values = (torch.cat([x[:, :, a:b] for a, b in segment.keys], 2) for x in (key, value))
            queries = query[:, :, segment.start : segment.end]
            mask = torch.ones(segment.n_queries, segment.n_keys, dtype=torch.bool).tril()
            outputs.append(torch.nn.functional.scaled_dot_product_attention(queries, keys, values, mask))
        return torch.cat(outputs, dim=2)

    here = (torch.device("cpu"), torch.float32, 1, 8)
    assert agrees("split", *here)
    monkeypatch.setitem(BACKENDS, "varlen", upper_left)
    assert not agrees("varlen", *here)


def test_a_back_end_that_the_device_lacks_fails_when_it_is_tried():
    assert set(BACKENDS) == {"dense", "split", "varlen"}
    with pytest.raises(NotImplementedError):
        agrees("varlen", torch.device("cpu"), torch.bfloat16, 1, 8)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="varlen_attn exists on CUDA only")
def test_varlen_on_the_gpu_equals_the_oracle():
    sees = tree()
    inputs = [x.detach().to("cuda", torch.bfloat16) for x in states(sees.segments[-1].end)]
    ours = varlen(*inputs, sees.to("cuda"), 0.3)
    exact = dense(*[x.double().cpu() for x in inputs], sees, 0.3)
    assert (ours.double().cpu() - exact).abs().max() < 0.03

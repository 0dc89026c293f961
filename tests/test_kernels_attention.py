"""Attention partials against a softmax in float64, however the keys are split and merged."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ebbtide.kernels.attention import BLOCK_ROWS, UNSEEN, Partial, attend, finish, merge

# float32 rounding of scores (|q.k| of a few tens, 2**-24 each) passes through exp as a relative
# error, and the weighted mean of values near 1 keeps it: a few 1e-6. Tight enough to catch any use
# of bfloat16 or float16.
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def tensors(seed: int, heads: int, num_rows: int, n: int, dim: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn((heads, num_rows, dim), generator=generator) * (3 / math.sqrt(dim))
    k, v = torch.randn((2, heads, n, dim), generator=generator)
    return q, k, v


def softmax64(q, k, v, mask=None, softcap=0.0) -> torch.Tensor:
    scores = q.double() @ k.double().transpose(1, 2)
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    if mask is not None:
        scores.masked_fill_(~mask.repeat(q.shape[1] // len(mask), 1), -torch.inf)
    return scores.softmax(-1) @ v.double()


@pytest.mark.parametrize(
    ("heads", "groups", "rows", "n", "dim"),
    [
        (1, 1, 1, 1, 8),
        (2, 4, 1, 300, 64),  # decode
        (3, 1, 1, 17, 80),
        (2, 7, 32, 128, 64),
        (1, 4, 200, 96, 112),  # more rows than one block, which ends within a group
        (1, 3, BLOCK_ROWS, 64, 16),
        (8, 1, 65, 40, 256),
    ],
)
@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_softmax(heads, groups, rows, n, dim, masked, kernels):
    q, k, v = tensors(n, heads, groups * rows, n, dim)
    mask = None
    if masked:
        mask = torch.rand((rows, n), generator=torch.Generator().manual_seed(rows)) < 0.5
        mask[:, n // 2] = True
    before = [t.clone() for t in (q, k, v)]
    p = attend(q, k, v, mask)
    assert p.max.shape == p.sum.shape == (heads, groups * rows) and p.out.shape == q.shape
    torch.testing.assert_close(finish(p).double(), softmax64(q, k, v, mask), **CLOSE)
    for one, other in zip(before, (q, k, v), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("groups", [2, 400])  # the few rows of decode, the blocks of prefill
def test_a_soft_cap_bounds_scores_before_the_mask(groups, kernels):
    q, k, v = tensors(13, 2, groups * 2, 40, 32)
    mask = torch.ones((2, 40), dtype=torch.bool)
    mask[:, 25:] = False
    for softcap in (2.0, 50.0):
        p = attend(q, k, v, mask, softcap)
        torch.testing.assert_close(finish(p).double(), softmax64(q, k, v, mask, softcap), **CLOSE)
        assert float(p.max.max()) <= softcap
    uncapped = softmax64(q, k, v, mask)
    assert (finish(attend(q, k, v, mask, 2.0)) - uncapped).abs().max() > 0.1


def test_the_parts_of_a_partial(kernels):
    q = torch.tensor([[[1.0, 0, 0, 0, 0, 0, 0, 0]]])
    k = torch.zeros(1, 2, 8)
    k[0, :, 0] = torch.tensor([2.0, 5.0])
    v = torch.stack((torch.ones(8), torch.full((8,), 2.0)))[None]
    p = attend(q, k, v)
    small = math.exp(-3)
    assert float(p.max) == 5
    assert float(p.sum) == pytest.approx(1 + small, rel=1e-6)
    torch.testing.assert_close(p.out[0, 0], torch.full((8,), 2 + small))


@settings(max_examples=30)
@given(st.data())
def test_any_tree_of_merges_gives_the_same(data):
    n, dim = data.draw(st.integers(1, 60)), 16
    q, k, v = tensors(data.draw(st.integers(0, 999)), 2, 6, n, dim)
    # Usual; one key takes it all; all keys alike.
    q *= data.draw(st.sampled_from([1.0, 20.0, 0.0]))
    mask = torch.rand((3, n), generator=torch.Generator().manual_seed(n)) < 0.6
    mask[:, data.draw(st.integers(0, n - 1))] = True
    cuts = sorted({0, n, *data.draw(st.lists(st.integers(0, n), max_size=6))})
    parts = [attend(q, k[:, a:b], v[:, a:b], mask[:, a:b]) for a, b in itertools.pairwise(cuts)]
    while len(parts) > 1:
        first = parts.pop(data.draw(st.integers(0, len(parts) - 1)))
        second = parts.pop(data.draw(st.integers(0, len(parts) - 1)))
        joined = merge(first, second)
        other = merge(second, first)
        assert all(torch.equal(x, y) for x, y in zip(joined, other, strict=True))
        parts.append(joined)
    # Scores up to some hundreds: their own float32 rounding is 1e-5, which exp turns into a
    # relative error.
    torch.testing.assert_close(
        finish(parts[0]).double(), softmax64(q, k, v, mask), atol=2e-4, rtol=1e-4
    )


@pytest.mark.parametrize("groups", [1, 400])  # the few rows of decode, the blocks of prefill
def test_a_row_that_sees_nothing_is_neutral(groups, kernels):
    q, k, v = tensors(3, 2, groups * 2, 30, 16)
    mask = torch.ones((2, 30), dtype=torch.bool)
    mask[1] = False
    p = attend(q, k, v, mask)
    blind = slice(1, None, 2)
    assert bool((p.max[:, blind] == UNSEEN).all())
    assert not bool(p.sum[:, blind].any()) and not bool(p.out[:, blind].any())
    seen = attend(q, k, v)
    for left, right in ((p, seen), (seen, p)):
        joined = merge(left, right)
        for one, other in zip(joined, seen, strict=True):
            assert torch.equal(one[:, blind], other[:, blind])
    nothing = attend(q, k[:, :0], v[:, :0])
    for one, other in zip(merge(seen, nothing), seen, strict=True):
        assert torch.equal(one, other)
    assert all(bool(torch.isfinite(part).all()) for part in merge(nothing, nothing))


@pytest.mark.parametrize("groups", [2, 400])
def test_hidden_keys_leave_no_trace(groups, kernels):
    """A slot that was never written may hold anything finite."""
    q, k, v = tensors(5, 2, groups * 2, 40, 32)
    mask = torch.ones((2, 40), dtype=torch.bool)
    mask[:, 25:] = False
    first = attend(q, k, v, mask)
    k[:, 25:], v[:, 25:] = 50.0, -1e6
    for one, other in zip(first, attend(q, k, v, mask), strict=True):
        assert torch.equal(one, other)
    whole = attend(q, k, v, torch.ones((2, 40), dtype=torch.bool))
    for one, other in zip(whole, attend(q, k, v), strict=True):
        assert torch.equal(one, other)


def test_scores_far_apart_neither_overflow_nor_vanish(kernels):
    q, k, v = tensors(7, 1, 2, 50, 16)
    p = attend(q * 300, k * 10, v)
    assert all(bool(torch.isfinite(part).all()) for part in p)
    best = (q.double() @ k.double().transpose(1, 2)).argmax(-1)[0]
    torch.testing.assert_close(finish(p)[0], v[0, best], atol=1e-6, rtol=1e-6)
    low = Partial(p.max - 5000, p.sum, p.out * 9)
    for one, other in zip(merge(p, low), p, strict=True):
        assert torch.equal(one, other)


def test_equal_calls_give_equal_bits(kernels):
    q, k, v = tensors(11, 2, 600, 100, 64)
    for one, other in zip(attend(q, k, v), attend(q.clone(), k.clone(), v.clone()), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dim", [24, 64])
@pytest.mark.parametrize("masked", [False, True])
def test_a_row_has_the_same_bits_alone_and_on_any_number_of_threads(kernels, dim, masked):
    """Pieces of a prompt would change the answer otherwise."""
    if kernels == "reference":
        pytest.skip("torch adds in another order for other shapes")
    q, k, v = tensors(12, 2, 3 * 61, 170, dim)
    mask = None
    if masked:  # causal, and some rows that see little
        mask = torch.ones((61, 170), dtype=torch.bool).tril(20)
        mask[5, 1:] = False
    whole = attend(q, k, v, mask, 30.0)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        for one, other in zip(attend(q, k, v, mask, 30.0), whole, strict=True):
            assert torch.equal(one, other)
    torch.set_num_threads(1)
    for row in (0, 5, 47, 48, 60, 61, 182):
        alone = attend(q[:, row : row + 1], k, v, mask[None, row % 61] if masked else None, 30.0)
        for one, other in zip(alone, whole, strict=True):
            assert torch.equal(one[:, 0], other[:, row])


def test_other_floats_than_float32_are_torchs(kernels):
    q, k, v = (x.double() for x in tensors(13, 2, 40, 30, 16))
    torch.testing.assert_close(finish(attend(q, k, v)), softmax64(q, k, v), atol=1e-12, rtol=0)


def test_shapes_that_do_not_fit_are_refused(kernels):
    q, k, v = tensors(1, 2, 4, 10, 16)
    with pytest.raises(ValueError, match="keys and values must be"):
        attend(q, k[:1], v[:1])
    with pytest.raises(ValueError, match="keys and values must be"):
        attend(q, k, v[:, :5])
    with pytest.raises(ValueError, match="mask is"):
        attend(q, k, v, torch.ones((3, 10), dtype=torch.bool))
    with pytest.raises(ValueError, match="mask is"):
        attend(q, k, v, torch.ones((2, 9), dtype=torch.bool))
    with pytest.raises(ValueError, match="must be bool"):
        attend(q, k, v, torch.ones((2, 10), dtype=torch.uint8))

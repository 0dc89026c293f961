"""Decode attention over sealed pages against unpacking them and a softmax in float64."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from ebbtide.kernels import pages
from ebbtide.kernels.attention import UNSEEN, attend, finish, merge
from ebbtide.kernels.layout import PageLayout
from ebbtide.kernels.paged_attention import FEW_ROWS, attend_pages

LAYOUTS = {
    "usual": PageLayout(2, 64, 32, 4, key_bits=5, value_bits=4, near_bits=1),
    "one head": PageLayout(1, 128, 64, 2, key_bits=6, value_bits=4, near_bits=2),
    "80": PageLayout(3, 80, 16, 3, key_bits=4, value_bits=3, near_bits=1),
    "tiny": PageLayout(1, 8, 16, 1, key_bits=3, value_bits=2, near_bits=1),
    "256": PageLayout(1, 256, 256, 1, key_bits=8, value_bits=8, near_bits=0),
    "pages of 20": PageLayout(2, 24, 20, 3, key_bits=7, value_bits=5, near_bits=4),
    "pages of 10": PageLayout(2, 64, 10, 2, key_bits=7, value_bits=5, near_bits=4),
    "full bf16": PageLayout(2, 64, 32, 2, codec="full"),
    "full f16": PageLayout(3, 88, 16, 1, codec="full", raw_dtype=torch.float16),
    "full f32": PageLayout(1, 112, 16, 2, codec="full", raw_dtype=torch.float32),
}
LAYOUTS["near in record"] = dataclasses.replace(LAYOUTS["usual"], near_resident=False)
LAYOUTS["rotated"] = dataclasses.replace(LAYOUTS["usual"], rotate=True)


@pytest.fixture(params=LAYOUTS)
def layout(request) -> PageLayout:
    return LAYOUTS[request.param]


def sealed(layout: PageLayout, num_records: int = 4):
    """(near, records, k, v): pages, and what they hold as (kv_heads, num_tokens, d)."""
    generator = torch.Generator().manual_seed(layout.head_dim)
    shape = (num_records * layout.record_tokens, layout.kv_heads, layout.head_dim)
    k, v = torch.randn((2, *shape), generator=generator)
    k[..., 3] += 5
    near, records = pages.seal(k, v, layout)
    k, v = torch.empty((2, shape[1], shape[0], shape[2]))
    pages.unpack(near, records, layout, k, v)
    return near, records, k, v


def queries(layout: PageLayout, rows: int) -> torch.Tensor:
    shape = (layout.kv_heads, rows, layout.head_dim)
    q = torch.randn(shape, generator=torch.Generator().manual_seed(rows))
    return q * (2 / math.sqrt(layout.head_dim))


def check(p, q, k, v, visible, bias=None, softcap=0.0) -> None:
    """As in test_kernels_attention.py: float32 rounding of scores, passed through exp."""
    seen = slice(*visible)
    scores = q.double() @ k[:, seen].double().transpose(1, 2)
    if bias is not None:
        scores += bias[..., seen].double()
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    tolerance = {"atol": 2e-5, "rtol": 2e-5}
    want = scores.softmax(-1) @ v[:, seen].double()
    torch.testing.assert_close(finish(p).double(), want, **tolerance)
    # The parts too, since they are merged with those of other spans.
    torch.testing.assert_close(p.max.double(), scores.amax(-1), **tolerance)
    log_mass = p.max.double() + p.sum.double().log()
    torch.testing.assert_close(log_mass, scores.logsumexp(-1), **tolerance)


@pytest.mark.parametrize("rows", [1, 2, 7, FEW_ROWS, FEW_ROWS + 1])
def test_attention_over_pages_is_softmax(layout, rows, kernels):
    near, records, k, v = sealed(layout)
    q = queries(layout, rows)
    n = k.shape[1]
    check(attend_pages(q, near, records, layout), q, k, v, (0, n))


@pytest.mark.parametrize("rows", [1, 5])
def test_only_visible_tokens_count(layout, rows, kernels):
    near, records, k, v = sealed(layout)
    q = queries(layout, rows)
    n, one = k.shape[1], layout.record_tokens
    for visible in ((3, n), (0, n - 5), (one, 2 * one), (one - 1, one + 1), (n - 1, n), (0, 1)):
        check(attend_pages(q, near, records, layout, visible), q, k, v, visible)
    check(attend_pages(q, near, records, layout, (-5, n + 5)), q, k, v, (0, n))
    for nothing in ((4, 4), (n, n), (7, 3)):
        p = attend_pages(q, near, records, layout, nothing)
        assert bool((p.max == UNSEEN).all())
        assert not bool(p.sum.any()) and not bool(p.out.any())


def test_a_bias_is_added_to_scores(layout, kernels):
    near, records, k, v = sealed(layout)
    q = queries(layout, 6)
    n = k.shape[1]
    key_bias = torch.randn(k.shape, generator=torch.Generator().manual_seed(5))
    bias = q @ key_bias.transpose(1, 2)
    check(attend_pages(q, near, records, layout, (2, n), bias), q, k, v, (2, n), bias)
    check(attend_pages(q, near, records, layout, (2, n), bias), q, k + key_bias, v, (2, n))


@pytest.mark.parametrize("softcap", [2.0, 50.0])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_a_soft_cap_bounds_scores_and_their_bias(layout, kernels, softcap, scale):
    """Gemma 2's 50, and a cap that every score feels; scores of a thousand sit at the cap."""
    near, records, k, v = sealed(layout)
    q = queries(layout, 6) * scale
    n = k.shape[1]
    bias = torch.randn((layout.kv_heads, 6, n), generator=torch.Generator().manual_seed(7))
    p = attend_pages(q, near, records, layout, (2, n - 1), bias, softcap)
    # A score's own rounding, 2**-24 of a thousand, is flattened by the cap wherever it is far.
    check(p, q, k, v, (2, n - 1), bias, softcap)


def test_spans_merge_to_the_whole(kernels):
    layout = LAYOUTS["usual"]
    near, records, k, v = sealed(layout)
    q = queries(layout, 4)
    parts = [attend_pages(q, near[i : i + 2], records[i : i + 2], layout) for i in (0, 2)]
    check(merge(*parts), q, k, v, (0, k.shape[1]))
    raw = attend(q, k[:, :50], v[:, :50])
    rest = attend_pages(q, near, records, layout, (50, k.shape[1]))
    check(merge(raw, rest), q, k, v, (0, k.shape[1]))


@pytest.mark.parametrize("kernels", ["portable", "avx2", "avx512"], indirect=True)
@pytest.mark.parametrize("name", ["usual", "80", "full bf16"])
def test_neither_threads_nor_other_rows_change_a_bit(name, kernels):
    layout = LAYOUTS[name]
    near, records, *_ = sealed(layout, 8)
    q = queries(layout, 6)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(attend_pages(q, near, records, layout, (5, 300)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))
    alone = attend_pages(q[:, 2:3], near, records, layout, (5, 300))
    assert all(torch.equal(x[:, 2:3], y) for x, y in zip(results[0], alone, strict=True))


@pytest.mark.parametrize("scale", [0.0, 1e-20, 100.0, 1e4])
def test_scores_of_any_size_stay_finite(scale, kernels):
    layout = LAYOUTS["usual"]
    near, records, k, v = sealed(layout)
    q = queries(layout, 3) * scale
    p = attend_pages(q, near, records, layout)
    assert all(bool(torch.isfinite(part).all()) for part in p)
    if scale < 1:
        mean = v.mean(1, keepdim=True).expand_as(q)
        torch.testing.assert_close(finish(p), mean, atol=1e-5, rtol=0)
    else:
        # Scores are rounded by 2**-24 of some hundreds of thousands at most: keys whose scores are
        # closer than that to the best may share the mass with it, others may not.
        scores = q.double() @ k.double().transpose(1, 2)
        slack = float(scores.abs().max()) * 2**-18 + 1e-6
        near_best = scores > scores.amax(-1, keepdim=True) - slack - 30
        low = v.unsqueeze(1).masked_fill(~near_best.unsqueeze(-1), torch.inf).amin(2)
        high = v.unsqueeze(1).masked_fill(~near_best.unsqueeze(-1), -torch.inf).amax(2)
        assert bool((finish(p) >= low - 1e-4).all()) and bool((finish(p) <= high + 1e-4).all())


def test_shapes_that_do_not_fit_are_refused(kernels):
    layout = LAYOUTS["usual"]
    near, records, *_ = sealed(layout)
    q = queries(layout, 2)
    with pytest.raises(ValueError, match="queries are"):
        attend_pages(q[:1], near, records, layout)
    with pytest.raises(ValueError, match="queries are"):
        attend_pages(q.double(), near, records, layout)
    with pytest.raises(ValueError, match="score_bias is"):
        attend_pages(q, near, records, layout, None, torch.zeros(2, 2, 7))
    with pytest.raises(ValueError, match="records is"):
        attend_pages(q, near, records[:, 1:], layout)
    assert attend_pages(q[:, :0], near, records, layout).out.shape == (2, 0, 64)
    assert attend_pages(q, near[:0], records[:0], layout).out.shape == (2, 2, 64)

"""Decode attention over sealed pages against unpacking them and a softmax in float64."""

from __future__ import annotations

import pytest
import torch
from instruction_sets import COMPILED
from sealed_pages import LAYOUTS, check, queries, sealed, tolerance

from ebbtide.kernels import dispatch
from ebbtide.kernels.attention import UNSEEN, attend, empty_parts, finish, merge
from ebbtide.kernels.layer_attention import Records, attend_spans
from ebbtide.kernels.layout import PageLayout
from ebbtide.kernels.paged_attention import FEW_ROWS, attend_pages


@pytest.fixture(params=LAYOUTS)
def layout(request) -> PageLayout:
    return LAYOUTS[request.param]


@pytest.mark.parametrize("rows", [1, 2, 7, FEW_ROWS, FEW_ROWS + 1, 200])
def test_attention_over_pages_is_softmax(layout, rows, kernels):
    near, records, k, v = sealed(layout)
    q = queries(layout, rows)
    n = k.shape[1]
    check(
        attend_pages(q, near, records, layout), q, k, v, (0, n), within=tolerance(kernels, layout)
    )


@pytest.mark.parametrize("rows", [1, 5])
def test_only_visible_tokens_count(layout, rows, kernels):
    near, records, k, v = sealed(layout)
    q = queries(layout, rows)
    n, one = k.shape[1], layout.record_tokens
    for visible in ((3, n), (0, n - 5), (one, 2 * one), (one - 1, one + 1), (n - 1, n), (0, 1)):
        check(
            attend_pages(q, near, records, layout, visible),
            q,
            k,
            v,
            visible,
            within=tolerance(kernels, layout),
        )
    check(
        attend_pages(q, near, records, layout, (-5, n + 5)),
        q,
        k,
        v,
        (0, n),
        within=tolerance(kernels, layout),
    )
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
    check(
        attend_pages(q, near, records, layout, (2, n), bias),
        q,
        k,
        v,
        (2, n),
        bias,
        within=tolerance(kernels, layout),
    )
    check(
        attend_pages(q, near, records, layout, (2, n), bias),
        q,
        k + key_bias,
        v,
        (2, n),
        within=tolerance(kernels, layout),
    )


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
    check(p, q, k, v, (2, n - 1), bias, softcap, within=tolerance(kernels, layout))


def test_spans_merge_to_the_whole(kernels):
    layout = LAYOUTS["usual"]
    near, records, k, v = sealed(layout)
    q = queries(layout, 4)
    parts = [attend_pages(q, near[i : i + 2], records[i : i + 2], layout) for i in (0, 2)]
    check(merge(*parts), q, k, v, (0, k.shape[1]), within=tolerance(kernels, layout))
    raw = attend(q, k[:, :50], v[:, :50])
    rest = attend_pages(q, near, records, layout, (50, k.shape[1]))
    check(merge(raw, rest), q, k, v, (0, k.shape[1]), within=tolerance(kernels, layout))


@pytest.mark.parametrize("kernels", COMPILED, indirect=True)
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


@pytest.mark.parametrize("kernels", COMPILED, indirect=True)
@pytest.mark.parametrize("name", ["usual", "80", "64, 8 bits", "128, two near bits", "full bf16"])
@pytest.mark.parametrize("is_biased", [False, True])
def test_a_row_has_its_bits_among_hundreds(name, is_biased, kernels):
    layout, num_rows = LAYOUTS[name], 150  # two whole blocks of rows, and a part of one
    near, records, *_ = sealed(layout, 6)
    q, n = queries(layout, num_rows), 6 * layout.record_tokens
    bias = torch.randn((layout.kv_heads, num_rows, n)) if is_biased else None
    at = (dispatch.addresses(plane, torch.arange(6)) for plane in (near, records))
    given = Records(*at, 2, (3, n - 2), bias)
    parts = empty_parts(3, q)
    attend_spans(q, given, layout, 0.0, parts)
    for first, stop in ((0, 1), (62, 66), (127, 130), (149, 150)):
        few = q[:, first:stop].contiguous()
        alone = empty_parts(3, few)
        if is_biased:
            given = given._replace(score_bias=bias[:, first:stop].contiguous())
        attend_spans(few, given, layout, 0.0, alone)
        for of_all, one in zip(parts, alone, strict=True):
            assert torch.equal(of_all[:, :, first:stop], one)


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

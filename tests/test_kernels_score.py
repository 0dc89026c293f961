"""The near plane's estimate of every page against the same estimate in float64."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from instruction_sets import COMPILED

from ebbtide.kernels import pages
from ebbtide.kernels.layout import PageLayout
from ebbtide.kernels.score import score_pages

LAYOUTS = {
    "usual": PageLayout(2, 64, 64, 2, key_bits=8, value_bits=8, near_bits=2, value_means=True),
    "128": PageLayout(1, 128, 64, 1, key_bits=6, value_bits=6, near_bits=2, value_means=True),
    "80": PageLayout(3, 80, 16, 3, key_bits=5, value_bits=4, near_bits=1),
    "eight heads": PageLayout(8, 64, 32, 4, key_bits=5, value_bits=4, near_bits=1),
    "256": PageLayout(1, 256, 128, 1, key_bits=8, value_bits=8, near_bits=4),
    "96, three bits": PageLayout(2, 96, 16, 2, key_bits=5, value_bits=4, near_bits=3),
    "128, three bits": PageLayout(1, 128, 32, 1, key_bits=6, value_bits=4, near_bits=3),
    "64, four bits": PageLayout(2, 64, 32, 4, key_bits=8, value_bits=4, near_bits=4),
    "no codes": PageLayout(2, 64, 16, 2, key_bits=4, value_bits=4, near_bits=0),
    "tiny": PageLayout(1, 8, 16, 1, key_bits=3, value_bits=2, near_bits=1),
    "pages of 10": PageLayout(2, 24, 10, 3, key_bits=7, value_bits=5, near_bits=2),
}
LAYOUTS |= {
    f"96, {bits} bits": PageLayout(1, 96, 16, 1, key_bits=5, value_bits=4, near_bits=bits)
    for bits in (1, 2, 4)
}
LAYOUTS["320"] = PageLayout(1, 320, 32, 1, key_bits=8, value_bits=8, near_bits=2)
LAYOUTS["rotated"] = dataclasses.replace(LAYOUTS["usual"], rotate=True)


ALL_SETS = pytest.mark.parametrize("kernels", ["reference", *COMPILED], indirect=True)


@pytest.fixture(params=LAYOUTS)
def layout(request) -> PageLayout:
    return LAYOUTS[request.param]


def near_plane(layout: PageLayout, num_frames: int = 6) -> torch.Tensor:
    """An arena of near records, whose keys have a large channel, a constant one and a shift."""
    generator = torch.Generator().manual_seed(layout.head_dim)
    shape = (num_frames * layout.record_tokens, layout.kv_heads, layout.head_dim)
    k = torch.randn(shape, generator=generator)
    k[..., 1] *= 6
    k[..., 2] = 0.3
    k[..., 3] += 9
    return pages.seal(k, k, layout)[0]


def queries(layout: PageLayout, num_rows: int, scale: float = 2.0) -> torch.Tensor:
    shape = (layout.kv_heads, num_rows, layout.head_dim)
    q = torch.randn(shape, generator=torch.Generator().manual_seed(num_rows))
    return q * (scale / math.sqrt(layout.head_dim))


def in_steps(x: torch.Tensor) -> torch.Tensor:
    """x (..., d) float32, rounded to whole steps of a 127th of its greatest; float64."""
    greatest = x.abs().amax(-1, keepdim=True)
    steps = (x * (greatest.reciprocal() * 127)).round()
    return torch.where(greatest > 0, steps.double() * (greatest.double() / 127), 0.0)


def brute_force(q, near, rows, layout, softcap=0.0, score_bias=None, rounded=True):
    """(log_mass, unevenness) in float64, page by page. rounded=False: queries as they are."""
    arena = near[rows]
    keys = pages.near_keys(arena, layout).double()
    lo, hi = pages.key_box(arena, layout)
    scale = pages.near_codes(arena, layout)[1]
    results = []
    for page in range(len(lo)):
        at = slice(page * layout.page_tokens, (page + 1) * layout.page_tokens)
        middle = (lo[page].double() + hi[page].double()).unsqueeze(1) / 2
        width = scale[page] * 2**layout.far_key_bits
        in_bins = q * width
        offset = (keys[:, at] - middle) / torch.where(width > 0, width, 1.0)
        in_bins = in_steps(in_bins) if rounded else in_bins.double()
        scores = q.double() @ middle.transpose(1, 2) + in_bins @ offset.transpose(1, 2)
        if score_bias is not None:
            scores += score_bias[..., at].double()
        if softcap:
            scores = softcap * (scores / softcap).tanh()
        weights = scores.softmax(-1)
        uneven = (weights - 1 / layout.page_tokens).abs().sum(-1) / 2
        results.append((scores.logsumexp(-1), uneven))
    return tuple(torch.stack(parts, -1) for parts in zip(*results, strict=True))


def check(got, want) -> None:
    """float32 rounding of scores of a few tens, 2**-24 each, times the hundred terms of a sum."""
    for one, other in zip(got, want, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one.double(), other, atol=3e-5, rtol=1e-6)


@ALL_SETS
@pytest.mark.parametrize("num_rows", [1, 2, 7, 8])
def test_every_page_is_estimated_from_its_near_codes(layout, num_rows, kernels):
    near, q = near_plane(layout), queries(layout, num_rows)
    rows = torch.tensor([4, 0, 5, 1])  # scattered frames, in an order of their own
    got = score_pages(q, near, rows, layout)
    assert got.log_mass.shape == (layout.kv_heads, num_rows, 4 * layout.pages_per_record)
    check(got, brute_force(q, near, rows, layout))


@pytest.mark.parametrize("softcap", [0.0, 5.0, 50.0])
def test_bias_and_soft_cap(layout, softcap, kernels):
    near, q = near_plane(layout), queries(layout, 5)
    rows = torch.tensor([2, 3, 0])
    shape = (layout.kv_heads, 5, 3 * layout.record_tokens)
    bias = torch.randn(shape, generator=torch.Generator().manual_seed(9)) * 2
    got = score_pages(q, near, rows, layout, softcap, bias)
    check(got, brute_force(q, near, rows, layout, softcap, bias))


def test_whole_queries_are_far_finer_than_the_codes():
    """Rounding queries must not add visibly to what dropping the far bits costs anyway."""
    for name in ("usual", "128", "80", "64, four bits", "rotated"):
        layout = LAYOUTS[name]
        near, q, rows = near_plane(layout), queries(layout, 8), torch.arange(6)
        rounded, plain = (
            brute_force(q, near, rows, layout, rounded=rounded)[0] for rounded in (True, False)
        )
        lo, hi = pages.key_box(near, layout)
        width = (hi - lo) * 2**layout.far_key_bits / (2**layout.key_bits - 1)
        of_codes = torch.bmm(q.square(), width.square().permute(1, 2, 0)) / 12  # of one score
        # Rounding is off by step / sqrt(12) in each channel, codes by |q_c w_c| / sqrt(12): a tenth
        # of the error is a hundredth of the variance.
        assert float((rounded - plain).square().mean()) < 0.01 * float(of_codes.mean())


@given(st.data())
def test_a_pages_scores_depend_on_nothing_else(data):
    name = data.draw(st.sampled_from(["usual", "128, three bits", "pages of 10", "eight heads"]))
    layout = LAYOUTS[name]
    near, q = near_plane(layout), queries(layout, 7)
    want = score_pages(q, near, torch.arange(6), layout, 30.0)
    rows = torch.tensor(data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=9)))
    cut = data.draw(st.integers(0, 6))  # some query rows, of some frames, in memory elsewhere
    shifted = torch.cat((near.flip(0)[:1], near.clone()))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(data.draw(st.integers(1, 3)))
        got = score_pages(q[:, cut:], shifted, rows + 1, layout, 30.0)
    finally:
        torch.set_num_threads(before)
    at = (
        rows.unsqueeze(1) * layout.pages_per_record + torch.arange(layout.pages_per_record)
    ).flatten()
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other[:, cut:, at])


@pytest.mark.parametrize("kernels", COMPILED, indirect=True)
@pytest.mark.parametrize("name", ["usual", "80", "128, three bits"])
def test_threads_change_no_bit(name, kernels):
    layout = LAYOUTS[name]
    near, q = near_plane(layout, 120), queries(layout, 6)
    assert near.nbytes > 3 << 16  # enough for three threads to share
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(score_pages(q, near, torch.arange(120), layout))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@pytest.mark.parametrize("scale", [0.0, 1e-38, 1e-20, 300.0, 1e4])
def test_scores_of_any_size_stay_finite(layout, scale, kernels):
    near, q, rows = near_plane(layout), queries(layout, 3) * scale, torch.arange(6)
    got = score_pages(q, near, rows, layout)
    assert all(bool(torch.isfinite(part).all()) for part in got)
    if scale < 1:  # all tokens weigh the same
        even = torch.full_like(got.log_mass, math.log(layout.page_tokens))
        torch.testing.assert_close(got.log_mass, even, atol=1e-6, rtol=0)
        assert float(got.unevenness.abs().max()) < 1e-6
    else:
        assert float(got.unevenness.max()) <= 1 - 1 / layout.page_tokens + 1e-6
        want = brute_force(q, near, rows, layout)[0]
        # The terms of q.m are some tens times the scale and rounded by 2**-24 each.
        torch.testing.assert_close(got.log_mass.double(), want, rtol=0, atol=scale * 5e-6)


def test_what_has_no_near_codes_or_does_not_fit_is_refused(kernels):
    layout = LAYOUTS["usual"]
    near, q, rows = near_plane(layout), queries(layout, 2), torch.arange(3)
    for other in (
        dataclasses.replace(layout, near_resident=False),
        PageLayout(2, 64, 64, 2, codec="full"),
    ):
        with pytest.raises(ValueError, match="only quantised pages"):
            score_pages(q, near, rows, other)
    with pytest.raises(ValueError, match="queries are"):
        score_pages(q[:1], near, rows, layout)
    with pytest.raises(ValueError, match="near is"):
        score_pages(q, near[:, 1:], rows, layout)
    with pytest.raises(ValueError, match="rows of near are"):
        score_pages(q, near, rows.int(), layout)
    for bad in (-1, 6):
        with pytest.raises(ValueError, match="it has 6 frames"):
            score_pages(q, near, torch.tensor([0, bad]), layout)
    with pytest.raises(ValueError, match="score_bias is"):
        score_pages(q, near, rows, layout, 0.0, torch.zeros(2, 2, 7))
    assert score_pages(q, near, rows[:0], layout).log_mass.shape == (2, 2, 0)
    assert score_pages(q[:, :0], near, rows, layout).unevenness.shape == (2, 0, 6)

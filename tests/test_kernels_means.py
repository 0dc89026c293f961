"""Attention over pages as single tokens, against a softmax in float64 over the mean values."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ebbtide.kernels import pages
from ebbtide.kernels.attention import UNSEEN, finish
from ebbtide.kernels.layout import PageLayout
from ebbtide.kernels.means import attend_means

LAYOUTS = {
    "usual": PageLayout(2, 64, 16, 2, key_bits=8, value_bits=8, near_bits=2, value_means=True),
    "one head": PageLayout(1, 128, 16, 1, key_bits=6, value_bits=4, near_bits=1, value_means=True),
    "80": PageLayout(3, 80, 8, 3, key_bits=5, value_bits=4, near_bits=3, value_means=True),
    "24": PageLayout(8, 24, 8, 1, key_bits=5, value_bits=4, near_bits=0, value_means=True),
}


@pytest.fixture(params=LAYOUTS)
def layout(request) -> PageLayout:
    return LAYOUTS[request.param]


def near_plane(layout: PageLayout, num_frames: int = 90) -> torch.Tensor:
    generator = torch.Generator().manual_seed(layout.head_dim)
    shape = (num_frames * layout.record_tokens, layout.kv_heads, layout.head_dim)
    k, v = torch.randn((2, *shape), generator=generator)
    return pages.seal(k, v, layout)[0]


def masses(layout: PageLayout, num_rows: int, num_records: int) -> torch.Tensor:
    """Log masses some tens apart, a third of the pages left out."""
    generator = torch.Generator().manual_seed(num_rows)
    shape = (layout.kv_heads, num_rows, num_records * layout.pages_per_record)
    log_mass = torch.randn(shape, generator=generator) * 5 - 20
    return log_mass.masked_fill_(torch.rand(shape[-1], generator=generator) < 1 / 3, -torch.inf)


@pytest.mark.parametrize("num_rows", [1, 3, 8])
@pytest.mark.parametrize("num_records", [1, 5, 64, 83])
def test_pages_count_with_their_mass_and_mean(layout, num_rows, num_records, kernels):
    near, log_mass = near_plane(layout), masses(layout, num_rows, num_records)
    log_mass[..., 0] = -3  # some page is seen
    rows = torch.randperm(90, generator=torch.Generator().manual_seed(4))[:num_records]
    p = attend_means(log_mass, near, rows, layout)
    means = pages.value_means(near, rows, layout).double()
    # As in test_kernels_attention.py: float32 rounding of scores, passed through exp.
    tolerance = {"atol": 2e-5, "rtol": 2e-5}
    want = log_mass.double().softmax(-1) @ means
    torch.testing.assert_close(finish(p).double(), want, **tolerance)
    total = p.max.double() + p.sum.double().log()
    torch.testing.assert_close(total, log_mass.double().logsumexp(-1), **tolerance)


def test_where_no_page_is_seen_nothing_is_left_behind(layout, kernels):
    near, rows = near_plane(layout), torch.arange(70)
    log_mass = masses(layout, 4, 70)
    log_mass[:, 1], log_mass[:, 2] = -torch.inf, UNSEEN
    p = attend_means(log_mass, near, rows, layout)
    for row in (1, 2):
        assert bool((p.max[:, row] == UNSEEN).all())
        assert not bool(p.sum[:, row].any()) and not bool(p.out[:, row].any())
    assert bool((p.sum[:, 0] > 0).all())
    nothing = attend_means(log_mass[..., :0], near, rows[:0], layout)
    assert bool((nothing.max == UNSEEN).all()) and not bool(nothing.sum.any())
    assert nothing.out.shape == p.out.shape


def test_equal_tokens_are_attended_exactly():
    """Values are all the same within a page: its mean is what full attention gives."""
    layout = LAYOUTS["usual"]
    v = (
        torch.randn((6, 1, 2, 64), generator=torch.Generator().manual_seed(2))
        .expand(6, 32, 2, 64)
        .reshape(-1, 2, 64)
    )
    near, _ = pages.seal(torch.zeros_like(v), v, layout)
    log_mass = torch.zeros(2, 1, 12)
    got = finish(attend_means(log_mass, near, torch.arange(6), layout))
    # Eight bits of a range of six, and float16's rounding of the mean.
    torch.testing.assert_close(got[:, 0], v.mean(0), atol=0.03, rtol=0)


@pytest.mark.parametrize("kernels", ["portable", "avx2", "avx512"], indirect=True)
def test_neither_threads_nor_places_change_a_bit(kernels):
    layout = dataclasses.replace(LAYOUTS["usual"], kv_heads=8)
    near, log_mass = near_plane(layout, 200), masses(layout, 3, 200)
    assert log_mass.shape[2] * 8 * 64 * 2 > 3 << 16  # enough for three threads to share
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    elsewhere = torch.empty_like(near)
    elsewhere[order] = near
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(attend_means(log_mass, near, torch.arange(200), layout))
            results.append(attend_means(log_mass, elsewhere, order, layout))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def test_what_does_not_fit_is_refused(kernels):
    layout = LAYOUTS["usual"]
    near, rows, log_mass = near_plane(layout, 3), torch.arange(3), masses(layout, 2, 3)
    for change in ({"value_means": False}, {"near_resident": False}):
        with pytest.raises(ValueError, match="has value_means"):
            attend_means(log_mass, near, rows, dataclasses.replace(layout, **change))
    with pytest.raises(ValueError, match="log_mass is"):
        attend_means(log_mass[..., :5], near, rows, layout)
    with pytest.raises(ValueError, match="it has 3 frames"):
        attend_means(log_mass, near, rows + 1, layout)

"""Attention over pages as single tokens, against a softmax in float64 over the mean values."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from instruction_sets import COMPILED

from ebbtide.kernels import pages
from ebbtide.kernels.attention import finish
from ebbtide.kernels.layout import PageLayout
from ebbtide.kernels.means import attend_left_out
from ebbtide.kernels.selection import Shares, page_shares

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


def estimates(layout: PageLayout, num_rows: int, num_records: int) -> tuple[Shares, torch.Tensor]:
    """Shares of pages whose log masses lie some tens apart, a third of them not there; and
    unevenness."""
    generator = torch.Generator().manual_seed(num_rows)
    shape = (layout.kv_heads, num_rows, num_records * layout.pages_per_record)
    log_mass = torch.randn(shape, generator=generator) * 5 - 20
    log_mass.masked_fill_(torch.rand(shape[-1], generator=generator) < 1 / 3, -torch.inf)
    raw_log_mass = torch.randn(shape[:2], generator=generator) - 15
    return page_shares(log_mass, raw_log_mass), torch.rand(shape, generator=generator)


@pytest.mark.parametrize("num_rows", [1, 3, 8])
@pytest.mark.parametrize("num_records", [1, 5, 64, 83])
def test_pages_count_with_their_share_and_mean(layout, num_rows, num_records, kernels):
    near = near_plane(layout)
    shares, unevenness = estimates(layout, num_rows, num_records)
    before = shares.shares.clone()
    rows = torch.randperm(90, generator=torch.Generator().manual_seed(4))[:num_records]
    chosen = torch.arange(num_records)[1::3]
    part, left = attend_left_out(shares, unevenness, chosen, near, rows, layout)
    assert torch.equal(shares.shares, before), "what is given stays as it is"
    want = shares.shares.double()
    want.unflatten(-1, (num_records, -1))[:, :, chosen] = 0.0
    # As in test_kernels_attention.py: float32 rounding of sums.
    tolerance = {"atol": 2e-5, "rtol": 2e-5}
    means = pages.value_means(near, rows, layout).double()
    torch.testing.assert_close(part.out.double(), want @ means, **tolerance)
    assert torch.equal(part.max, shares.log_total) and torch.equal(part.sum, left.missed)
    assert torch.equal(left.shares.double(), want)
    torch.testing.assert_close(left.missed.double(), want.sum(-1), **tolerance)
    misplaced = (want * unevenness.double()).sum(-1)
    torch.testing.assert_close(left.misplaced.double(), misplaced, **tolerance)


def test_where_all_are_chosen_nothing_is_left_behind(layout, kernels):
    near, rows = near_plane(layout), torch.arange(70)
    shares, unevenness = estimates(layout, 4, 70)
    part, left = attend_left_out(shares, unevenness, rows, near, rows, layout)
    assert not any(bool(one.any()) for one in (part.sum, part.out, *left))
    none = Shares(shares.shares[..., :0], shares.log_total)
    part, left = attend_left_out(none, unevenness[..., :0], rows[:0], near, rows[:0], layout)
    assert not bool(part.sum.any()) and part.out.shape == (layout.kv_heads, 4, layout.head_dim)


def test_equal_tokens_are_attended_exactly():
    """Values are all the same within a page: its mean is what full attention gives."""
    layout = LAYOUTS["usual"]
    v = (
        torch.randn((6, 1, 2, 64), generator=torch.Generator().manual_seed(2))
        .expand(6, 32, 2, 64)
        .reshape(-1, 2, 64)
    )
    near, _ = pages.seal(torch.zeros_like(v), v, layout)
    shares = page_shares(torch.zeros(2, 1, 12), torch.full((2, 1), -torch.inf))
    rows, none = torch.arange(6), torch.arange(0)
    part, _ = attend_left_out(shares, torch.zeros(2, 1, 12), none, near, rows, layout)
    # Eight bits of a range of six, and float16's rounding of the mean.
    torch.testing.assert_close(finish(part)[:, 0], v.mean(0), atol=0.03, rtol=0)


@pytest.mark.parametrize("kernels", COMPILED, indirect=True)
def test_neither_threads_nor_places_change_a_bit(kernels):
    layout = dataclasses.replace(LAYOUTS["usual"], kv_heads=8)
    near = near_plane(layout, 200)
    shares, unevenness = estimates(layout, 3, 200)
    assert shares.shares.shape[2] * 8 * 64 * 2 > 3 << 16  # enough for three threads to share
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    elsewhere, chosen = torch.empty_like(near), torch.tensor([3, 77])
    elsewhere[order] = near
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for arena, rows in ((near, torch.arange(200)), (elsewhere, order)):
                results.append(attend_left_out(shares, unevenness, chosen, arena, rows, layout))
    finally:
        torch.set_num_threads(before)
    for part, left in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0][0], part, strict=True))
        assert all(torch.equal(x, y) for x, y in zip(results[0][1], left, strict=True))


def test_what_does_not_fit_is_refused(kernels):
    layout = LAYOUTS["usual"]
    near, rows, none = near_plane(layout, 3), torch.arange(3), torch.arange(0)
    shares, unevenness = estimates(layout, 2, 3)
    for change in ({"value_means": False}, {"near_resident": False}):
        other = dataclasses.replace(layout, **change)
        with pytest.raises(ValueError, match="has value_means"):
            attend_left_out(shares, unevenness, none, near, rows, other)
    with pytest.raises(ValueError, match="unevenness is"):
        attend_left_out(shares, unevenness[..., :5], none, near, rows, layout)
    with pytest.raises(ValueError, match="it has 3 frames"):
        attend_left_out(shares, unevenness, none, near, rows + 1, layout)

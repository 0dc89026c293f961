"""The near plane's estimate of every page against the same estimate in float64."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

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
LAYOUTS["rotated"] = dataclasses.replace(LAYOUTS["usual"], rotate=True)


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


def brute_force(q, near, rows, layout, softcap=0.0, score_bias=None, corrected=True):
    """(log_mass, unevenness) in float64, page by page."""
    arena = near[rows]
    keys = pages.near_keys(arena, layout).double()
    lo, hi = (x.double() for x in pages.key_box(arena, layout))
    bins = 2**layout.key_bits / (2**layout.key_bits - 1)  # the box, as the codes' bins cover it
    width = (hi - lo) * bins / 2**layout.near_bits
    results = []
    for page in range(len(lo)):
        at = slice(page * layout.page_tokens, (page + 1) * layout.page_tokens)
        scores = q.double() @ keys[:, at].transpose(1, 2)
        if score_bias is not None:
            scores += score_bias[..., at].double()
        if corrected:
            scores -= ((q.double() * width[page].unsqueeze(1)) ** 2).sum(-1, keepdim=True) / 24
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


@pytest.mark.parametrize("num_rows", [1, 2, 7, 8])
@pytest.mark.parametrize("corrected", [True, False])
def test_every_page_is_estimated_from_its_near_codes(layout, num_rows, corrected):
    near, q = near_plane(layout), queries(layout, num_rows)
    rows = torch.tensor([4, 0, 5, 1])  # scattered frames, in an order of their own
    got = score_pages(q, near, rows, layout, corrected=corrected)
    assert got.log_mass.shape == (layout.kv_heads, num_rows, 4 * layout.pages_per_record)
    check(got, brute_force(q, near, rows, layout, corrected=corrected))


@pytest.mark.parametrize("softcap", [0.0, 5.0, 50.0])
def test_bias_and_soft_cap(layout, softcap):
    near, q = near_plane(layout), queries(layout, 5)
    rows = torch.tensor([2, 3, 0])
    shape = (layout.kv_heads, 5, 3 * layout.record_tokens)
    bias = torch.randn(shape, generator=torch.Generator().manual_seed(9)) * 2
    got = score_pages(q, near, rows, layout, softcap, bias)
    check(got, brute_force(q, near, rows, layout, softcap, bias))


def test_what_has_no_near_codes_or_does_not_fit_is_refused():
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

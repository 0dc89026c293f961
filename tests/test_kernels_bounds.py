"""Bounds of pages' scores against the same bounds in float64, and against true scores."""

from __future__ import annotations

import pytest
import torch
from test_kernels_score import LAYOUTS, near_plane, queries

from ebbtide.kernels import pages
from ebbtide.kernels.bounds import bound_pages
from ebbtide.kernels.layout import PageLayout


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("num_rows", [1, 3, 4, 9])
def test_the_greater_of_both_ends_in_each_channel(layout, num_rows, kernels):
    near, q, rows = near_plane(layout), queries(layout, num_rows), torch.tensor([4, 0, 5, 1])
    least, greatest = (box.double() for box in pages.key_box(near[rows], layout))
    query = q.double().unsqueeze(2)  # (kv_heads, num_rows, 1, head_dim)
    ends = (query * box.transpose(0, 1).unsqueeze(1) for box in (least, greatest))
    want = torch.maximum(*ends).sum(-1)
    got = bound_pages(q, near, rows, layout)
    # Rounding of float32, 2**-24 each, of sums of a few hundred terms of up to 40.
    torch.testing.assert_close(got.double(), want, atol=1e-4, rtol=1e-6)


def test_no_key_of_the_page_scores_above_it(kernels):
    layout = LAYOUTS["usual"]
    generator = torch.Generator().manual_seed(2)
    k = torch.randn((3 * layout.record_tokens, 2, 64), generator=generator) * 3
    near, records = pages.seal(k, k, layout)
    q = queries(layout, 4)
    held = torch.empty((2, 2, len(k), 64))
    pages.unpack(near, records, layout, held[0], held[1])
    scores = torch.bmm(q.double(), held[0].double().transpose(1, 2)).unflatten(-1, (-1, 64))
    bounds = bound_pages(q, near, torch.arange(3), layout)
    assert bool((scores.amax(-1) <= bounds.double() + 1e-4).all())


def test_threads_and_strides_do_not_matter(kernels):
    layout = LAYOUTS["eight heads"]
    near, q = near_plane(layout, 40), queries(layout, 4)
    rows, results = torch.arange(40), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(bound_pages(q, near, rows, layout))
    torch.set_num_threads(1)
    turned = q.transpose(0, 1).contiguous().transpose(0, 1)
    results.append(bound_pages(turned, near, rows, layout))
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_what_does_not_fit_is_refused():
    layout = LAYOUTS["usual"]
    near, q, rows = near_plane(layout), queries(layout, 2), torch.arange(6)
    with pytest.raises(ValueError, match="near plane is resident"):
        bound_pages(q, near, rows, PageLayout(2, 64, 64, 2, codec="full"))
    with pytest.raises(ValueError, match="queries are"):
        bound_pages(q[:1], near, rows, layout)
    with pytest.raises(ValueError, match="it has 6 frames"):
        bound_pages(q, near, torch.tensor([0, 6]), layout)
    assert bound_pages(q, near, rows[:0], layout).shape == (2, 2, 0)

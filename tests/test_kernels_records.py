"""Attention over records wherever they lie: each record's partial, and their merging."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from instruction_sets import COMPILED
from sealed_pages import LAYOUTS, check, queries, sealed, tolerance

from ebbtide.kernels.attention import UNSEEN, Partial, finish
from ebbtide.kernels.layout import PageLayout
from ebbtide.kernels.paged_attention import (
    FEW_ROWS,
    Source,
    attend_records,
    merge_records,
)

MEANS = PageLayout(8, 64, 32, 1, key_bits=8, value_bits=8, near_bits=2, value_means=True)
MATRIX = LAYOUTS | {"value means": MEANS}


@pytest.fixture(params=MATRIX)
def layout(request) -> PageLayout:
    return MATRIX[request.param]


def scattered(layout: PageLayout, near, records, order, seed: int = 0):
    """(near arena, near rows, sources): the records `order`, near and far, each somewhere."""
    generator = torch.Generator().manual_seed(seed)
    num_frames = len(order) + 3

    def place(data):
        rows = torch.randperm(num_frames, generator=generator)[: len(data)]
        frames = torch.full((num_frames, data.shape[1]), 255, dtype=torch.uint8)
        frames[rows] = data
        return frames, rows

    arena, near_rows = place(near[order])
    lies_in = torch.randint(0, 3, (len(order),), generator=generator)
    sources = []
    for index in range(3):
        positions = (lies_in == index).nonzero().flatten()
        positions = positions[torch.randperm(len(positions), generator=generator)]
        sources.append(Source(*place(records[order][positions]), positions))
    return arena, near_rows, sources


def tokens(layout: PageLayout, order) -> torch.Tensor:
    """The tokens of the records `order`, as indices of what `sealed` holds."""
    first = torch.as_tensor(order).unsqueeze(1) * layout.record_tokens
    return (first + torch.arange(layout.record_tokens)).flatten()


@pytest.mark.parametrize("rows", [1, 2, 7, 8, FEW_ROWS + 1])
def test_each_record_has_a_partial_and_together_they_are_softmax(layout, rows, kernels):
    near, records, k, v = sealed(layout, 6)
    q, order = queries(layout, rows), [5, 0, 3, 2]
    p = attend_records(q, *scattered(layout, near, records, order), layout)
    assert p.max.shape == p.sum.shape == (4, layout.kv_heads, rows)
    assert p.out.shape == (4, layout.kv_heads, rows, layout.head_dim)
    n = layout.record_tokens
    for i, record in enumerate(order):
        at = tokens(layout, [record])
        check(
            Partial(*(part[i] for part in p)),
            q,
            k[:, at],
            v[:, at],
            (0, n),
            within=tolerance(kernels, layout),
        )
    at = tokens(layout, order)
    check(merge_records(p), q, k[:, at], v[:, at], (0, 4 * n), within=tolerance(kernels, layout))


@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_the_sink_is_passed_over_and_bias_is_added(layout, softcap, kernels):
    near, records, k, v = sealed(layout, 6)
    q, order = queries(layout, 6), [1, 4, 5]
    shape = (layout.kv_heads, 6, 3 * layout.record_tokens)
    bias = torch.randn(shape, generator=torch.Generator().manual_seed(7))
    where = scattered(layout, near, records, order)
    at, n = tokens(layout, order), 3 * layout.record_tokens
    for skip in (1, layout.page_tokens - 3, layout.record_tokens - 1, layout.record_tokens):
        p = attend_records(q, *where, layout, skip, softcap, bias)
        check(
            merge_records(p),
            q,
            k[:, at],
            v[:, at],
            (skip, n),
            bias,
            softcap,
            within=tolerance(kernels, layout),
        )
    assert bool((p.max[0] == UNSEEN).all())
    assert not bool(p.sum[0].any()) and not bool(p.out[0].any())


@given(st.data())
def test_a_records_partial_depends_on_nothing_else(data):
    layout = LAYOUTS[data.draw(st.sampled_from(["usual", "80", "near in record", "pages of 10"]))]
    near, records, *_ = sealed(layout, 6)
    q = queries(layout, 5)
    want = attend_records(q, *scattered(layout, near, records, list(range(6))), layout)
    order = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=6, unique=True))
    where = scattered(layout, near, records, order, data.draw(st.integers(0, 99)))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(data.draw(st.integers(1, 3)))
        got = attend_records(q, *where, layout)
        joined = merge_records(got)
    finally:
        torch.set_num_threads(before)
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other[order])
    again = merge_records(Partial(*(part[order] for part in want)))
    assert all(torch.equal(x, y) for x, y in zip(joined, again, strict=True))


@pytest.mark.parametrize("kernels", COMPILED, indirect=True)
@pytest.mark.parametrize("name", ["usual", "full bf16", "value means"])
def test_threads_change_no_bit(name, kernels):
    layout = MATRIX[name]
    near, records, *_ = sealed(layout, 24)
    where = scattered(layout, near, records, list(range(24)))
    assert records.nbytes > 3 << 16  # enough for three threads to share
    q = queries(layout, 6)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            got = attend_records(q, *where, layout, 5)
            results.append((*got, *merge_records(got)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def test_a_part_that_saw_nothing_changes_nothing(kernels):
    layout = LAYOUTS["usual"]
    near, records, *_ = sealed(layout)
    q = queries(layout, 3)
    p = attend_records(q, *scattered(layout, near, records, [0, 2]), layout)
    blind = Partial(torch.full_like(p.max[:1], UNSEEN), p.sum[:1] * 0, p.out[:1] * 0)
    with_blind = Partial(*(torch.cat((a, b)) for a, b in zip(blind, p, strict=True)))
    for one, other in zip(merge_records(with_blind), merge_records(p), strict=True):
        assert torch.equal(one, other)
    nothing = merge_records(Partial(*(part[:0] for part in p)))
    assert bool((nothing.max == UNSEEN).all()) and not bool(nothing.sum.any())
    # Parts far apart: the lower one vanishes.
    low = Partial(p.max - torch.tensor([0.0, 5000.0]).view(2, 1, 1), p.sum, p.out)
    torch.testing.assert_close(
        finish(merge_records(low)), finish(Partial(*(x[0] for x in p))), rtol=1e-6, atol=1e-6
    )


def test_sources_that_do_not_fit_are_refused(kernels):
    layout = LAYOUTS["usual"]
    near, records, *_ = sealed(layout)
    q, rows = queries(layout, 2), torch.arange(4)
    whole = [(records, rows, rows)]
    attend_records(q, near, rows, whole, layout)
    for sources in (
        [],
        [(records, rows[:3], rows[:3])],
        [*whole, (records, rows[:1], rows[:1])],
        [(records, rows, rows + 1)],
        [(records, rows[:3], rows)],
    ):
        with pytest.raises(ValueError, match="each of the 4 records once"):
            attend_records(q, near, rows, sources, layout)
    with pytest.raises(ValueError, match="it has 4 frames"):
        attend_records(q, near, rows, [(records, rows + 1, rows)], layout)
    with pytest.raises(ValueError, match="it has 4 frames"):
        attend_records(q, near, rows - 1, whole, layout)
    with pytest.raises(ValueError, match="frames is"):
        attend_records(q, near, rows, [(records[:, 1:], rows, rows)], layout)
    with pytest.raises(ValueError, match="near is"):
        attend_records(q, near[:, 1:], rows, whole, layout)
    with pytest.raises(ValueError, match="queries are"):
        attend_records(q.double(), near, rows, whole, layout)
    with pytest.raises(ValueError, match="score_bias is"):
        attend_records(q, near, rows, whole, layout, 0, 0.0, torch.zeros(2, 2, 7))
    empty = attend_records(q, near, rows[:0], [], layout)
    assert empty.out.shape == (0, 2, 2, 64)

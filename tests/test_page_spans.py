"""How many spans a request has, counted quickly and one by one."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st
from plans_under_test import model

from ebbtide.offload.pages.geometry import choose_geometry
from ebbtide.offload.planning.page_spans import PageSpans, _floor_sum


@given(*[st.integers(0, 60)] * 2, st.integers(1, 40), st.integers(0, 90))
def test_sums_of_quotients(count, step, divisor, start):
    each = [(start + i * step) // divisor for i in range(count)]
    assert _floor_sum(count, divisor, step, start) == sum(each)


WINDOWS = {"none": (None,) * 4, "some": (None, 300, 5000, 300), "all": (700,) * 4}


@given(st.integers(1, 300_000), st.integers(1, 40), st.sampled_from([*WINDOWS]))
def test_what_sweeps_walk_is_what_each_of_them_sees(context, sweep, windows):
    config = replace(model(), windows=WINDOWS[windows])
    geometry = choose_geometry(config, "8")
    spans = PageSpans(config, geometry, context, 1)
    ends = range(0, context, sweep * geometry.cell_tokens)
    assert spans.walked(sweep) == sum(spans._seen(spans._kinds, end) for end in ends)

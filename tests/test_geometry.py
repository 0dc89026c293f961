"""Cells, spans and pages: which sizes go together, and what stays raw."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plans_under_test import MODELS
from small_llm import small_geometry

from ebbtide.offload.errors import InputError
from ebbtide.offload.pages.geometry import choose_geometry


def test_what_a_span_cannot_hold_is_refused(checkpoint):
    with pytest.raises(InputError, match="whole cells"):
        small_geometry(checkpoint("llama2"), cell_tokens=96, span_tokens=128)


@settings(max_examples=20)
@given(st.integers(1, 100_000))
def test_sealed_tokens_leave_one_to_two_cells_raw(length):
    geometry = choose_geometry(MODELS["small"])
    raw = length - geometry.sealed_tokens(length)
    assert 0 < raw <= 2 * geometry.cell_tokens
    assert length <= 2 * geometry.cell_tokens or raw > geometry.cell_tokens

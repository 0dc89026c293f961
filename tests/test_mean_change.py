"""What is usually added to the residual is added in advance."""

from __future__ import annotations

from unittest import mock

import torch

from ebbtide.offload.layers.selected_attention import SelectedAttention
from ebbtide.prefetch.foresight import make_foresight
from ebbtide.prefetch.mean_change import OVER_TOKENS, MeanChange
from ebbtide.prefetch.registry import make_selector


def test_nothing_is_added_before_anything_is_known():
    x = torch.randn(1, 8)
    assert MeanChange().add_to((1, True), x) is x


def test_what_is_always_added_is_expected_in_full():
    means, change, x = MeanChange(), torch.randn(1, 8), torch.randn(1, 8)
    means.note("a", change)
    assert torch.allclose(means.add_to("a", x), x + change / 2), "one token may be like no other"
    for _ in range(9 * OVER_TOKENS):
        means.note("a", change)
    assert torch.allclose(means.add_to("a", x), x + change, atol=1e-4)  # exp(-9) is left
    assert means.add_to("b", x) is x


def test_noise_is_averaged_out_and_a_new_text_replaces_an_old_one():
    means, draw = MeanChange(), torch.Generator().manual_seed(1)
    for sign in (1.0, -1.0):
        for _ in range(8 * OVER_TOKENS):
            means.note(0, sign + torch.randn(1, 256, generator=draw))
        mean = means.add_to(0, torch.zeros(1, 256))
        # The mean of 2 * OVER_TOKENS tokens, as it were: 1 / 11 of one token's noise.
        assert (mean - sign).square().mean().sqrt() < 0.12


def selected_by(selector: str) -> SelectedAttention:
    records = mock.Mock()
    records.any_on_disk.return_value = True
    return SelectedAttention(
        None, records, make_selector(selector), make_foresight("rehearsal"), {}, []
    )


def test_early_and_late_rehearsals_each_expect_what_is_added_after_them():
    selected, (before, between, x) = selected_by("top_p"), torch.randn(3, 1, 8)
    for _ in range(9 * OVER_TOKENS):
        selected.note_changes(2, mock.Mock(), before, between, x)
    for residual, early in ((before, True), (between, False)):
        found = selected.expected(2, residual, early=early)
        assert torch.allclose(found, x, atol=1e-3)  # exp(-9) of what is added is left
        assert selected.expected(3, residual, early=early) is residual


def test_a_selector_that_chooses_by_the_rehearsed_query_sees_no_means():
    selected, (before, between, x) = selected_by("infinigen"), torch.randn(3, 1, 8)
    selected.note_changes(2, mock.Mock(), before, between, x)
    assert selected.expected(2, before, early=True) is before

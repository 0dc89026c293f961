"""The check of the missed mass: records drawn by their estimate, the ratio without bias."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ebbtide.prefetch import audit


def made(seed: int, num_records: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    """Estimated and true shares, (2, 3, num_records); some records are attended: no share."""
    generator = torch.Generator().manual_seed(seed)
    estimated = torch.rand((2, 3, num_records), generator=generator) ** 4
    estimated[..., ::7] = 0
    return estimated, estimated * torch.rand(estimated.shape, generator=generator) * 3


def looked_at(shares, true_shares, positions) -> audit.Audit:
    found = audit.Audit()
    for position in positions:
        drawn, counts = audit.draw(shares, position)
        found.note(shares, true_shares.permute(2, 0, 1)[drawn], drawn, counts)
    return found


def test_the_ratio_is_unbiased():
    estimated, true = made(1)
    looks = 4000
    found = looked_at(estimated, true, range(looks))
    assert found.num_drawn == looks * audit.NUM_DRAWS
    wanted = float(true.sum() / estimated.sum())
    # The variance of one draw's ratio; the mean of all draws lies within five deviations.
    weight = (estimated.sum((0, 1)) / estimated.sum()).double()
    ratio = (true.sum((0, 1)) / estimated.sum((0, 1))).nan_to_num(0.0).double()
    deviation = float((weight * (ratio - wanted) ** 2).sum().sqrt())
    assert abs(found.true_over_estimated() - wanted) < 5 * deviation / math.sqrt(found.num_drawn)


@given(seed=st.integers(0, 100), factor=st.floats(0.01, 100))
def test_an_estimate_that_is_wrong_by_a_factor_is_found_so_by_any_draw(seed, factor):
    estimated, _ = made(seed)
    found = looked_at(estimated, estimated * factor, [seed])
    # Two float32 sums of six terms each, and their quotient.
    assert found.true_over_estimated() == pytest.approx(factor, rel=1e-5)


def test_what_was_attended_is_never_drawn():
    estimated, _ = made(2)
    drawn = torch.cat([audit.draw(estimated, position)[0] for position in range(200)])
    assert not (drawn % 7 == 0).any()


def test_nothing_is_drawn_where_nothing_was_left_out():
    drawn, counts = audit.draw(torch.zeros(2, 3, 8), 5)
    assert len(drawn) == len(counts) == 0
    assert audit.Audit().true_over_estimated() is None


def test_each_layer_has_its_turn():
    due = [audit.layer_due(3, position) for position in range(3 * audit.EVERY_TOKENS)]
    assert [layer for layer in due if layer is not None] == [0, 1, 2]

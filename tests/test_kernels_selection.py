"""Pages' shares, the choice of records and what a layer knows before it, against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import COMPILED

from ebbtide.kernels import dispatch
from ebbtide.kernels.effect import head_effect, stand, value_spread
from ebbtide.kernels.layer_attention import Raw
from ebbtide.kernels.layout import PageLayout
from ebbtide.kernels.selection import choose_records, page_shares

# Float32 sums of up to a hundred shares, next to 1.
ROUNDING = 2e-6
SHAPES = [(1, 1, 1, 1), (2, 3, 17, 1), (3, 2, 36, 4), (8, 4, 100, 2)]  # the last: pages of a record


def masses(heads: int, rows: int, pages: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Log masses of pages, some of which are not there, and of raw keys."""
    generator = torch.Generator().manual_seed(seed)
    log_mass = torch.randn((heads, rows, pages), generator=generator) * 8
    log_mass.masked_fill_(torch.rand(pages, generator=generator) < 0.2, -torch.inf)
    return log_mass, torch.randn((heads, rows), generator=generator) * 3


@pytest.mark.parametrize("shape", SHAPES)
def test_shares_are_a_softmax_with_the_raw_keys(shape, kernels):
    log_mass, raw = masses(*shape[:3])
    got = page_shares(log_mass, raw)
    every = torch.cat([log_mass, raw.unsqueeze(-1)], -1).double()
    want = every.softmax(-1)[..., :-1]
    torch.testing.assert_close(got.shares.double(), want, atol=ROUNDING, rtol=1e-5)
    torch.testing.assert_close(got.log_total.double(), every.logsumexp(-1), atol=1e-5, rtol=1e-6)
    assert not bool(got.shares[log_mass == -torch.inf].any())


@pytest.mark.parametrize("far", [1e4, 3e38])
def test_shares_of_masses_however_far_apart(far, kernels):
    log_mass = torch.tensor([[[-far, 0.0, far, -torch.inf]]])
    got = page_shares(log_mass, torch.tensor([[-far]]))
    assert (
        got.shares.tolist() == [[[0.0, 0.0, 1.0, 0.0]]] and got.log_total[0, 0] == log_mass[0, 0, 2]
    )


def test_where_nothing_is_there_nothing_has_a_share(kernels):
    nothing = torch.full((2, 1, 5), -torch.inf)
    got = page_shares(nothing, nothing[..., 0])
    assert not bool(got.shares.any()) and bool((got.log_total == -torch.inf).all())
    assert not len(choose_records(got.shares, got.shares, None, 1, 0.0))


def wrong(costs: torch.Tensor, chosen: torch.Tensor) -> float:
    """What all heads get wrong without the records that are not chosen."""
    left = costs.clone()
    left[:, chosen] = 0.0
    return left.sum(-1).square().sum().sqrt().item()


@given(
    shape=st.sampled_from(SHAPES),
    epsilon=st.sampled_from([0.0, 0.001, 0.02, 0.1, 0.5, 1.0]),
    uses=st.tuples(st.booleans(), st.booleans()),
    seed=st.integers(0, 1000),
)
@settings(deadline=None)
def test_the_fewest_records_keep_within_epsilon(shape, epsilon, uses, seed):
    heads, rows, pages, each = shape
    shares = page_shares(*masses(heads, rows, pages, seed)).shares
    generator = torch.Generator().manual_seed(seed)
    unevenness = torch.rand(shares.shape, generator=generator) if uses[0] else None
    effect = torch.rand(shares.shape[:2], generator=generator) if uses[1] else None
    ranked = choose_records(shares, unevenness, effect, each, epsilon)
    costs = shares.double() * (1.0 if unevenness is None else unevenness.double())
    costs = costs * (1.0 if effect is None else effect.double().unsqueeze(-1))
    costs = costs.unflatten(-1, (-1, each)).sum(-1).flatten(0, 1)
    assert len(ranked.unique()) == len(ranked)
    assert wrong(costs, ranked) <= epsilon + ROUNDING
    if len(ranked):
        together = costs.sum(0)[ranked]
        assert bool((together > 0).all())
        assert bool((together.diff() <= ROUNDING).all()), "costliest first"
        assert wrong(costs, ranked[:-1]) > epsilon - ROUNDING
        left = torch.ones(costs.shape[1], dtype=torch.bool)
        left[ranked] = False
        assert bool((costs.sum(0)[left] <= together[-1] + ROUNDING).all())


def test_ties_go_to_the_lowest_number(kernels):
    shares = torch.full((1, 2, 6), 1 / 6)
    assert choose_records(shares, None, None, 1, 0.6).tolist() == [0, 1, 2, 3]
    assert choose_records(shares, None, None, 2, 0.0).tolist() == [0, 1, 2]


@pytest.mark.parametrize("kernels", COMPILED, indirect=True)
def test_threads_change_no_bit(kernels):
    log_mass, raw = masses(8, 4, 3000)
    unevenness = torch.rand(log_mass.shape, generator=torch.Generator().manual_seed(1))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            shares = page_shares(log_mass, raw)
            found.append((*shares, choose_records(shares.shares, unevenness, None, 1, 0.01)))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))


@pytest.mark.parametrize("kernels", COMPILED, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [64, 24])
def test_what_is_known_before_pages_are_looked_at(kernels, dtype, dim):
    """Two runs of raw tokens, as the sink and a cell are."""
    heads, rows, tokens = 3, 2, (5, 40)
    generator = torch.Generator().manual_seed(dim)
    k, v = torch.randn((2, heads, sum(tokens), dim), generator=generator).to(dtype)
    v[:, :, 3] += 7  # what all values share does not spread them
    parts = [[one.contiguous() for one in part.split(tokens, 1)] for part in (k, v)]
    runs = []
    for key, value in zip(*parts, strict=True):
        head_bytes = key.shape[1] * dim * dtype.itemsize
        runs += [key.data_ptr(), value.data_ptr(), head_bytes, key.shape[1]]
    q = torch.randn((heads, rows, dim), generator=generator) / 4
    norms, x = (
        torch.rand((heads, rows), generator=generator),
        torch.randn((1, 100), generator=generator),
    )
    layout = PageLayout(heads, dim, 16, 1, key_bits=8, value_bits=8, near_bits=2)
    got = stand(q, Raw(dtype, runs), layout, 0.0, norms, x)
    scores = q.double() @ k.double().transpose(1, 2)
    log_mass, out = scores.logsumexp(-1), scores.softmax(-1) @ v.double()
    torch.testing.assert_close(got.raw_log_mass.double(), log_mass, atol=2e-5, rtol=2e-5)
    whole = got.raw.out / got.raw.sum.unsqueeze(-1)
    torch.testing.assert_close(whole.double(), out, atol=2e-5, rtol=2e-5)
    effect = head_effect(norms.double(), x.double().norm(), out, value_spread(v).double())
    torch.testing.assert_close(got.effect.double(), effect, atol=0, rtol=2e-5)


@pytest.mark.skipif(dispatch._cpu is None, reason="no compiled kernels here")
def test_a_record_that_is_not_there_is_refused():
    shares = torch.zeros(1, 1, 4)
    where = torch.zeros(4, dtype=torch.int64)
    layout = PageLayout(1, 8, 16, 1, key_bits=3, value_bits=2, near_bits=1, value_means=True)
    numbers = dispatch.layout_numbers(layout)
    for chosen in (torch.tensor([4]), torch.tensor([-1])):
        with pytest.raises(ValueError, match="not there"):
            dispatch._cpu.left_out(
                *(shares.data_ptr(), shares.data_ptr(), 1, where.data_ptr(), numbers, 4),
                *(chosen.data_ptr(), 1, 0, 0, 0, 1),
            )

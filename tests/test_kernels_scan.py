"""Mamba's selective scan and the convolution before it, against float64, and texts in one call
against many."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_kernels_recurrence import any_example, assert_near, exact_conv, normal, silu

from ebbtide.kernels.scan import ScanTokens, scan, silu_conv


def tokens_of(n: int, channels: int, dim: int, strided: bool = False) -> ScanTokens:
    """strided: they are parts of the same wide rows."""
    widths = [channels, channels, dim, dim, channels]
    parts = normal(n, sum(widths), seed=1).split(widths, -1)
    if n > 3:  # nearly nothing is left of what was, and nearly all of it
        parts[1][1], parts[1][3] = 200, -30
    if not strided:
        parts = [part.contiguous() for part in parts]
    return ScanTokens(*parts)


def weights_of(channels: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    return -normal(dim, channels, seed=2).exp(), normal(channels, seed=3)


def exact_scan(rate, skip, tokens: ScanTokens, before):
    x, steps, keys, queries, gate = (part.double() for part in vars(tokens).values())
    state, outs = before.double(), []
    steps = steps.clamp(min=0) + (-steps.abs()).exp().log1p()
    for t in range(len(x)):
        state = state * (steps[t] * rate.double()).exp() + torch.outer(keys[t], steps[t] * x[t])
        outs.append(queries[t] @ state + skip.double() * x[t])
    return torch.stack(outs) * silu(gate), state


@pytest.mark.parametrize("n", [1, 5, 70])
@pytest.mark.parametrize("dim", [1, 5, 16])
@pytest.mark.parametrize("channels", [8, 64, 200])
def test_the_scan(kernels, channels, dim, n):
    rate, skip = weights_of(channels, dim)
    for strided, in_place in [(False, False), (True, True)]:
        tokens, before = tokens_of(n, channels, dim, strided), normal(dim, channels, seed=4)
        kept, after = before.clone(), before if in_place else torch.full_like(before, torch.nan)
        want, behind = exact_scan(rate, skip, tokens, before)
        got = scan(rate, skip, tokens, before, after)
        assert got.shape == (n, channels) and got.is_contiguous()
        assert_near(got, want, dim * n + 16)
        assert_near(after, behind, n + 16)
        assert in_place or torch.equal(before, kept)


@pytest.mark.parametrize("channels", [1, 24, 200])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_convolutions(kernels, channels, width):
    taps, bias = normal(width, channels, seed=2), normal(channels, seed=3)
    for n, has_bias, strided, in_place in [(1, 0, 0, 1), (2, 1, 1, 0), (70, 1, 1, 1)]:
        x = normal(n, channels + 8 * strided)[:, :channels]
        before, biases = normal(width - 1, channels, seed=4), bias if has_bias else None
        want, behind = exact_conv(x, taps, biases, before)
        after = before if in_place else torch.full_like(before, torch.nan)
        got = silu_conv(x, taps, biases, before, after)
        assert torch.equal(after.double(), behind)
        assert_near(got, silu(want), width + 8)


@any_example
@given(parts=st.lists(st.integers(1, 40), min_size=1, max_size=6), threads=st.integers(1, 2))
def test_any_cut(kernels, parts, threads):
    """To the bit, by one thread and by two."""
    channels, dim, n = 200, 16, sum(parts)
    rate, skip = weights_of(channels, dim)
    tokens, taps = tokens_of(n, channels, dim, strided=True), normal(4, channels, seed=5)
    state, inputs = normal(dim, channels, seed=6), normal(3, channels, seed=7)
    behind, last = torch.empty_like(state), torch.empty_like(inputs)
    whole = scan(rate, skip, tokens, state, behind)
    convolved = silu_conv(tokens.x, taps, None, inputs, last)
    cuts = zip(*(part.split(parts) for part in vars(tokens).values()), strict=True)
    torch.set_num_threads(threads)
    try:
        outs = [scan(rate, skip, ScanTokens(*cut), state, state) for cut in cuts]
        convs = [silu_conv(x, taps, None, inputs, inputs) for x in tokens.x.split(parts)]
    finally:
        torch.set_num_threads(1)
    assert torch.equal(torch.cat(outs), whole) and torch.equal(state, behind)
    assert torch.equal(torch.cat(convs), convolved) and torch.equal(inputs, last)


def test_what_is_no_number_stays_none(kernels):
    """A step that is none reaches its channel's output, and no other."""
    tokens, state = tokens_of(1, 64, 4), normal(4, 64)
    tokens.steps[0, 5] = torch.nan
    out = scan(*weights_of(64, 4), tokens, state, torch.empty_like(state))
    assert out[0].isnan().nonzero().flatten().tolist() == [5]


def test_no_token_leaves_the_state(kernels):
    state, inputs = normal(16, 24), normal(3, 24)
    after, last = torch.empty_like(state), torch.empty_like(inputs)
    assert scan(*weights_of(24, 16), tokens_of(0, 24, 16), state, after).shape == (0, 24)
    assert silu_conv(torch.empty(0, 24), normal(4, 24), None, inputs, last).shape == (0, 24)
    assert torch.equal(after, state) and torch.equal(last, inputs)

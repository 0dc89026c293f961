"""Layers that keep a state of fixed size, against float64, and texts in one call against many."""

from __future__ import annotations

from dataclasses import replace
from math import exp, inf, log1p

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ebbtide.kernels.recurrence import RecurrentShape, RecurrentWeights, recur, short_conv

DELTA = RecurrentShape(
    heads=4,
    key_heads=2,
    key_dim=16,
    value_dim=16,
    conv_width=4,
    is_delta=True,
    norm_heads=1,
    norm_eps=1e-6,
)
MAMBA = replace(DELTA, is_delta=False, key_heads=1, norm_heads=4)
KIMI = replace(DELTA, key_heads=4, by_channel=True)
SHAPES = {
    "delta": DELTA,
    "delta, as Qwen3.5 has it": replace(DELTA, key_heads=4, key_dim=128, value_dim=128),
    "delta, a tail": replace(DELTA, value_dim=24, conv_width=3),
    "delta, odd keys": replace(DELTA, key_dim=7, value_dim=40, norm_heads=2),
    "delta, gains to two": replace(DELTA, value_dim=24, most_gain=2.0),
    "delta, one narrow head": replace(DELTA, heads=1, key_heads=1, value_dim=8, conv_width=2),
    "mamba": MAMBA,
    "mamba, as Granite has it": replace(MAMBA, key_dim=128, value_dim=64, step_limits=(0.0, inf)),
    "mamba, steps limited": replace(MAMBA, step_limits=(0.4, 0.9), norm_heads=2),
    "mamba, a tail": replace(MAMBA, value_dim=24, key_heads=2, norm_heads=1, conv_width=2),
    "mamba, one narrow head": replace(MAMBA, heads=1, norm_heads=1, value_dim=8, conv_width=3),
    "no convolution": replace(MAMBA, conv_width=1),
    "kimi": KIMI,
    "kimi, as published": replace(KIMI, key_dim=128, value_dim=128),
    "kimi, bounded": replace(KIMI, least_log_decay=-5.0),
    "kimi, odd keys and a tail": replace(KIMI, key_dim=21, value_dim=40),
    "kimi, odd keys, bounded": replace(KIMI, key_dim=7, value_dim=72, least_log_decay=-2.5),
}


any_example = settings(
    max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture]
)  # the fixture is the same for all of them


def normal(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weights_of(shape: RecurrentShape, conv_bias: bool, norm_of_all: bool) -> RecurrentWeights:
    return RecurrentWeights(
        conv=normal(shape.conv_width, shape.channels, seed=2) / 2,
        conv_bias=normal(shape.channels, seed=3) / 4 if conv_bias else None,
        step_bias=normal(shape.steps, seed=4),
        rate=-normal(shape.heads, seed=5).exp(),
        skip=None if shape.is_delta else normal(shape.heads, seed=6),
        norm=1 + normal(shape.values if norm_of_all else shape.value_dim, seed=7) / 4,
    )


def rows_of(shape: RecurrentShape, n: int, strided: bool = False) -> list[torch.Tensor | None]:
    """mixed, steps, gains and gate; strided: they are parts of the same wide rows."""
    widths = [shape.channels, shape.steps, shape.heads, shape.values]
    wide = normal(n, sum(widths), seed=8)
    parts = wide.split(widths, -1)
    if n > 3:  # forgets everything, and nearly nothing
        parts[1][1], parts[1][3] = 200, -30
    if not strided:
        parts = [part.contiguous() for part in parts]
    return [parts[0], parts[1], parts[2] if shape.is_delta else None, parts[3]]


def state_of(shape: RecurrentShape) -> tuple[torch.Tensor, torch.Tensor]:
    matrices = normal(shape.heads, shape.key_dim, shape.value_dim, seed=9)
    return normal(shape.conv_width - 1, shape.channels, seed=10), matrices


def empty_state(shape: RecurrentShape) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.full_like(part, torch.nan) for part in state_of(shape))


def silu(x: torch.Tensor) -> torch.Tensor:
    return x / (1 + (-x).exp())


def exact_conv(x, taps, bias, before) -> tuple[torch.Tensor, torch.Tensor]:
    seen, width = torch.cat([before.double(), x.double()]), len(taps)
    out = [(seen[t : t + width] * taps.double()).sum(0) for t in range(len(x))]
    out = torch.stack(out) + (0 if bias is None else bias.double())
    return out, seen[len(x) :]


def exact_decays(shape, weights, steps, head: int) -> tuple[torch.Tensor, float]:
    """Of a head's key's numbers, and the last step that they are made of."""
    each, decays, step = shape.steps // shape.heads, [], 0.0
    for i in range(head * each, (head + 1) * each):
        x, rate = (
            float(steps[i].double() + weights.step_bias[i].double()),
            float(weights.rate[head]),
        )
        step = x + log1p(exp(-x)) if x > 0 else log1p(exp(x))
        if not shape.is_delta:
            step = min(max(step, shape.step_limits[0]), shape.step_limits[1])
        if shape.least_log_decay:
            log_decay = shape.least_log_decay / (1 + exp(min(rate * x, 700)))
        else:
            log_decay = step * rate
        decays.append(exp(log_decay))
    return torch.tensor(decays).double(), step


def exact_recur(shape, weights, mixed, steps, gains, gate, before):
    """Outputs and the state behind, by the definition: head by head, in float64."""
    out, inputs = exact_conv(mixed, weights.conv, weights.conv_bias, before[0])
    out, keys = silu(out), shape.keys
    q, k, v = (
        (out[:, :keys], out[:, keys : 2 * keys], out[:, 2 * keys :])
        if shape.is_delta
        else (out[:, -keys:], out[:, -2 * keys : -keys], out[:, : -2 * keys])
    )
    matrices, result = before[1].double(), torch.empty(len(mixed), shape.values).double()
    for h in range(shape.heads):
        key_head = h // (shape.heads // shape.key_heads)
        of_key = slice(key_head * shape.key_dim, (key_head + 1) * shape.key_dim)
        of_value = slice(h * shape.value_dim, (h + 1) * shape.value_dim)
        for t in range(len(mixed)):
            query, key, value = q[t, of_key], k[t, of_key], v[t, of_value]
            decays, step = exact_decays(shape, weights, steps[t], h)
            if shape.is_delta:
                query = query / (query.square().sum() + 1e-6).sqrt() / shape.key_dim**0.5
                key = key / (key.square().sum() + 1e-6).sqrt()
            matrices[h] *= decays[:, None]
            if shape.is_delta:
                gain = shape.most_gain / (1 + exp(-float(gains[t, h])))
                matrices[h] += torch.outer(key, gain * (value - matrices[h].T @ key))
            else:
                matrices[h] += torch.outer(key, step * value)
            found = matrices[h].T @ query
            if weights.skip is not None:
                found = found + float(weights.skip[h]) * value
            result[t, of_value] = found
    opened = gate.double().sigmoid() if shape.by_channel else silu(gate.double())
    if not shape.is_delta:
        result = result * opened
    if weights.norm is None:
        return result, (inputs, matrices)
    norm = weights.norm.double().repeat(shape.values // len(weights.norm))
    width = shape.norm_heads * shape.value_dim
    for first in range(0, shape.values, width):
        part = result[:, first : first + width]
        part /= (part.square().sum(1, keepdim=True) / width + shape.norm_eps).sqrt()
    result = result * norm
    return result * opened if shape.is_delta else result, (inputs, matrices)


def assert_near(got: torch.Tensor, want: torch.Tensor, num_roundings: int) -> None:
    """Roundings of 2**-24 of the largest number, which add up as random ones do; eight times what
    is to be expected, as the farthest of thousands is looked for and parts are rounded too."""
    atol = 8 * num_roundings**0.5 * 2**-24 * float(want.abs().max())
    torch.testing.assert_close(got.double(), want, atol=atol, rtol=0)


@pytest.mark.parametrize("n", [1, 5, 70])
@pytest.mark.parametrize("name", SHAPES)
def test_recurrent_layers(kernels, name, n):
    shape = SHAPES[name]
    for conv_bias, norm_of_all, strided, in_place in [(0, 0, 0, 0), (1, 1, 1, 1)]:
        weights = weights_of(shape, bool(conv_bias), bool(norm_of_all))
        rows = rows_of(shape, n, bool(strided))
        before = state_of(shape)
        want, behind = exact_recur(shape, weights, *rows, before)
        after = before if in_place else empty_state(shape)
        got = recur(shape, weights, *rows, before, after)
        assert got.shape == (n, shape.values) and got.is_contiguous()
        num_roundings = shape.key_dim * n + 16
        assert torch.equal(after[0].double(), behind[0])
        assert_near(after[1], behind[1], num_roundings)
        assert_near(got, want, num_roundings)
        if not in_place:
            assert all(map(torch.equal, before, state_of(shape)))


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_what_is_not_normed_keeps_its_size(kernels, scale):
    """Falcon-H1's outputs are gated alone: small ones lose no bits to large ones beside them."""
    weights = replace(weights_of(MAMBA, True, False), norm=None)
    mixed, steps, _, gate = rows_of(MAMBA, 5)
    rows, before = (mixed, steps, None, gate * scale), state_of(MAMBA)
    want, _ = exact_recur(MAMBA, weights, *rows, before)
    got = recur(MAMBA, weights, *rows, before, empty_state(MAMBA))
    assert_near(got, want, MAMBA.key_dim * 5 + 16)
    torch.testing.assert_close(got.double(), want, atol=1e-6 * scale, rtol=1e-4)


@pytest.mark.parametrize("name", ["delta", "mamba", "kimi", "kimi, bounded"])
def test_a_step_that_is_no_number_reaches_the_output(kernels, name):
    shape = SHAPES[name]
    rows = rows_of(shape, 1)
    rows[1][0, 0] = torch.nan
    weights = weights_of(shape, False, False)
    out = recur(shape, weights, *rows, state_of(shape), empty_state(shape))
    assert bool(out.isnan().any())


@pytest.mark.parametrize("channels", [1, 24, 200])
@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_short_convolutions(kernels, channels, width):
    taps, bias = normal(width, channels, seed=2), normal(channels, seed=3)
    for n, has_bias, strided, in_place in [(1, 0, 0, 1), (2, 1, 1, 0), (70, 0, 1, 1)]:
        mixed = normal(n, 3 * channels + 8 * strided)[:, : 3 * channels]
        before = normal(width - 1, channels, seed=4)
        b, c, x = mixed.chunk(3, -1)
        product = (b * x).double()  # rounded, as the state holds it
        want, behind = exact_conv(product, taps, bias if has_bias else None, before)
        after = before if in_place else torch.full_like(before, torch.nan)
        got = short_conv(mixed, taps, bias if has_bias else None, before, after)
        assert torch.equal(after.double(), behind)
        assert_near(got, c.double() * want, width + 2)


def in_parts(shape, weights, rows, parts: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs and matrices of a text that is taken in calls of so many tokens, by turns in the
    state's place and in another."""
    state, outs, first = state_of(shape), [], 0
    for i, count in enumerate(parts):
        part = [None if x is None else x[first : first + count] for x in rows]
        after = state if i % 2 else empty_state(shape)
        outs.append(recur(shape, weights, *part, state, after))
        state, first = after, first + count
    return torch.cat(outs), state


WIDE_DELTA = replace(DELTA, key_heads=4, key_dim=64, value_dim=72)
WIDE_MAMBA = replace(MAMBA, heads=6, key_dim=64, value_dim=72, norm_heads=3)
WIDE_KIMI = replace(WIDE_DELTA, by_channel=True)
WIDE = {"delta": WIDE_DELTA, "mamba": WIDE_MAMBA, "kimi": WIDE_KIMI}
SMALL = {"delta": DELTA, "mamba": MAMBA, "kimi": KIMI}


@pytest.mark.parametrize("shape", WIDE.values(), ids=WIDE)
def test_a_token_depends_on_those_before_it_alone(kernels, shape):
    """To the bit, in calls of 37 tokens and of fewer, by one thread and by two."""
    weights, rows = weights_of(shape, True, False), rows_of(shape, 37)
    whole, behind = in_parts(shape, weights, rows, [37])
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for parts in ([37], [1, 5, 20, 11]):
                got, state = in_parts(shape, weights, rows, parts)
                assert torch.equal(got, whole)
                assert torch.equal(state[1], behind[1])
                assert torch.equal(state[0], behind[0])
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("shape", SMALL.values(), ids=SMALL)
@any_example
@given(parts=st.lists(st.integers(1, 40), min_size=1, max_size=8))
def test_any_cut(kernels, shape, parts):
    shape = replace(shape, value_dim=40)
    weights, rows = weights_of(shape, False, True), rows_of(shape, sum(parts), strided=True)
    whole, behind = in_parts(shape, weights, rows, [sum(parts)])
    got, state = in_parts(shape, weights, rows, parts)
    assert torch.equal(got, whole)
    assert torch.equal(state[1], behind[1])
    assert torch.equal(state[0], behind[0])


@any_example
@given(parts=st.lists(st.integers(1, 40), min_size=1, max_size=8), threads=st.integers(1, 2))
def test_any_cut_of_a_short_convolution(kernels, parts, threads):
    channels, n = 520, sum(parts)
    mixed, taps = normal(n, 3 * channels), normal(3, channels, seed=2)
    state = normal(2, channels, seed=3)
    behind = torch.empty_like(state)
    whole = short_conv(mixed, taps, None, state, behind)
    torch.set_num_threads(threads)
    try:
        outs = [short_conv(part, taps, None, state, state) for part in mixed.split(parts)]
    finally:
        torch.set_num_threads(1)
    assert torch.equal(torch.cat(outs), whole) and torch.equal(state, behind)


@pytest.mark.parametrize("shape", SMALL.values(), ids=SMALL)
def test_no_token_leaves_the_state(kernels, shape):
    weights, after = weights_of(shape, True, True), empty_state(shape)
    out = recur(shape, weights, *rows_of(shape, 0), state_of(shape), after)
    assert out.shape == (0, shape.values) and all(map(torch.equal, after, state_of(shape)))
    inputs, kept = normal(3, 24), torch.empty(3, 24)
    out = short_conv(torch.empty(0, 72), normal(4, 24), None, inputs, kept)
    assert out.shape == (0, 24) and torch.equal(kept, inputs)

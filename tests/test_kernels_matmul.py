"""Linear layers: tiles that do not know of each other, and how far quantised weights are off."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from ebbtide.kernels.matmul import BLOCK_ROWS, ROW_TILE, linear, quantise_weight

KINDS = ["float32", "bfloat16", "float16", "8", "4"]
SHAPES = [(1, 1), (8, 40), (100, 32), (BLOCK_ROWS + 7, 96), (64, 1000), (3, 4864)]


def make(kind: str, shape: tuple[int, int], seed: int = 0):
    """(weight, the same weight in float64)."""
    generator = torch.Generator().manual_seed(seed + shape[0] * shape[1])
    w = torch.randn(shape, generator=generator) * 0.05
    if kind.isdigit():
        weight = quantise_weight(w, int(kind))
        return weight, weight.rows(0, shape[0]).double()
    weight = w.to(getattr(torch, kind))
    return weight, weight.double()


def inputs(rows: int, width: int) -> torch.Tensor:
    return torch.randn((rows, width), generator=torch.Generator().manual_seed(rows + width))


def check(got: torch.Tensor, x: torch.Tensor, exact: torch.Tensor, bias=None) -> None:
    """Within float32 summation.

    Each product, and each partial sum, is rounded once, by 2**-24 of the sum of magnitudes at most.
    Random signs keep the total near the square root of the number of roundings; four times that.
    """
    want = x.double() @ exact.T
    magnitude = x.double().abs() @ exact.T.abs()
    if bias is not None:
        want, magnitude = want + bias.double(), magnitude + bias.double().abs()
    bound = magnitude * 2**-24 * (4 * exact.shape[1] ** 0.5 + 4)
    assert got.dtype == torch.float32 and got.shape == want.shape
    assert bool(((got - want).abs() <= bound + 1e-30).all())


def check_product(kind, shape, rows):
    weight, exact = make(kind, shape)
    assert tuple(weight.shape) == shape
    x = inputs(rows, shape[1])
    check(linear(x, weight), x, exact)
    bias = torch.linspace(-1, 1, shape[0])
    check(linear(x, weight, bias), x, exact, bias)
    check(linear(x, weight, bias.bfloat16()), x, exact, bias.bfloat16())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_vector_is_multiplied(kind, shape, kernels):
    check_product(kind, shape, 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [ROW_TILE, 3 * ROW_TILE])
def test_tiles_are_multiplied(kind, shape, rows):
    check_product(kind, shape, rows)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(40, 33), (BLOCK_ROWS * 2 + 8, 896), (64, 1000)])
def test_a_tile_does_not_depend_on_the_others(kind, shape):
    weight, _ = make(kind, shape)
    x = inputs(6 * ROW_TILE, shape[1])
    bias = torch.linspace(-1, 1, shape[0])
    whole = linear(x, weight, bias)
    for i in range(6):
        tile = slice(ROW_TILE * i, ROW_TILE * (i + 1))
        assert torch.equal(whole[tile], linear(x[tile], weight, bias))
        assert torch.equal(whole[tile], linear(x[tile].clone(), weight, bias))
    # Other rows of the same tile may hold anything: padding rows, for one.
    x[ROW_TILE // 2 : ROW_TILE] = 0
    again = linear(x, weight, bias)
    assert torch.equal(again[: ROW_TILE // 2], whole[: ROW_TILE // 2])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kernels", ["portable", "avx2", "avx512"], indirect=True)
def test_threads_do_not_change_a_vector(kind, kernels):
    """The reference is not asked: it leaves the order of a vector's sums to torch."""
    weight, _ = make(kind, (301, 896))
    x = inputs(1, 896)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(linear(x, weight))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


WEIGHTS = st.lists(st.floats(-65504, 65504, width=32), min_size=1, max_size=70)


@given(WEIGHTS)
@example([0.0] * 33)
@example([1e-9, -1e-9])
@example([65504.0, -65504.0])
def test_eight_bits_are_within_half_a_step(values):
    w = torch.tensor([values])
    q = quantise_weight(w, 8)
    assert tuple(q.shape) == tuple(w.shape)
    step = q.scales.float().repeat_interleave(32, 1)[:, : w.shape[1]]
    assert bool(((q.rows(0, 1) - w).abs() <= step / 2 + w.abs() * 2**-22).all())
    greatest = w.abs().max()
    assert bool((step <= greatest / 127 * (1 + 2**-10) + 6e-8).all())


@given(WEIGHTS)
@example([0.0] * 33)
@example([8.0, -8.0])
@example([1e-9, -1e-9])
def test_four_bits_are_within_a_step(values):
    w = torch.tensor([values])
    q = quantise_weight(w, 4)
    step = q.scales.float().abs().repeat_interleave(32, 1)[:, : w.shape[1]]
    assert bool(((q.rows(0, 1) - w).abs() <= step * (65 / 64) + 2**-21).all())
    greatest = w.abs().max()
    assert bool((step <= greatest / 8 * (1 + 2**-10) + 6e-8).all())


def test_what_quantised_weights_weigh_and_lose():
    w = torch.randn((64, 1024), generator=torch.Generator().manual_seed(1))
    eight, four = quantise_weight(w, 8), quantise_weight(w, 4)
    assert eight.num_bytes * 8 == 8.5 * w.numel() and four.num_bytes * 8 == 4.5 * w.numel()
    for weight, most, least in ((eight, 0.008, 0.003), (four, 0.11, 0.05)):
        loss = float((weight.rows(0, 64) - w).norm() / w.norm())
        # Of normal weights, whose greatest of 32 is about 2.1: a step is that / 127 or / 8, the
        # loss a step / sqrt(12).
        assert least < loss < most
    assert torch.equal(four.rows(5, 9), four.rows(0, 64)[5:9])


@pytest.mark.parametrize("bits", [4, 8])
def test_quantising_reads_any_float_and_any_width(bits):
    w = torch.randn((BLOCK_ROWS + 3, 45), generator=torch.Generator().manual_seed(2))
    whole = quantise_weight(w.bfloat16(), bits)
    again = quantise_weight(w.bfloat16().float(), bits)
    assert torch.equal(whole.codes, again.codes) and torch.equal(whole.scales, again.scales)
    assert whole.in_features == 45 and whole.scales.shape == (BLOCK_ROWS + 3, 2)
    assert quantise_weight(w, bits).to("cpu").device.type == "cpu"


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_weights_that_cannot_be_quantised_are_refused(bits, bad):
    w = torch.ones(4, 64)
    w[2, 40] = bad
    with pytest.raises(FloatingPointError, match="not finite, or too large"):
        quantise_weight(w, bits)


def test_shapes_that_do_not_fit_are_refused():
    w = torch.ones(8, 16)
    with pytest.raises(ValueError, match="1 or a multiple of 32"):
        linear(torch.ones(33, 16), w)
    with pytest.raises(ValueError, match="it must be float32"):
        linear(torch.ones(32, 17), w)
    with pytest.raises(ValueError, match="it must be float32"):
        linear(torch.ones(32, 16, dtype=torch.float64), w)
    with pytest.raises(ValueError, match=r"a weight is \(out, in\)"):
        linear(torch.ones(32, 16), w.double())
    with pytest.raises(ValueError, match="8 or 4 bits, not 5"):
        quantise_weight(w, 5)
    with pytest.raises(ValueError, match=r"a weight is \(out, in\)"):
        quantise_weight(w[0], 4)

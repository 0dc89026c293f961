"""Linear layers: rows that do not know of each other, and how far quantised weights and rows are
off.
"""

from __future__ import annotations

import pytest
import torch
from affine_files import drawn_affine
from hypothesis import example, given
from hypothesis import strategies as st
from instruction_sets import COMPILED
from mxfp4_files import drawn_weight

from ebbtide.kernels import dispatch
from ebbtide.kernels.matmul import BLOCK_ROWS, ROW_TILE, linear
from ebbtide.kernels.quantised import (
    QuantisedWeight,
    quantise_weight,
    repack_int8,
    rounded_rows,
)

DRAWN = {"mxfp4": drawn_weight, "affine": drawn_affine}
KINDS = ["float32", "bfloat16", "float16", "8", "4", *DRAWN]
SHAPES = [(1, 1), (8, 40), (100, 32), (BLOCK_ROWS + 7, 96), (64, 1000), (3, 4864), (9, 6500)]


def make(kind: str, shape: tuple[int, int], seed: int = 0):
    """(weight, the same weight in float64)."""
    if kind in DRAWN:
        weight = DRAWN[kind](shape, seed)
        return weight, weight.rows(0, shape[0]).double()
    generator = torch.Generator().manual_seed(seed + shape[0] * shape[1])
    w = torch.randn(shape, generator=generator) * 0.05
    if kind.isdigit():
        weight = quantise_weight(w, int(kind))
        return weight, weight.rows(0, shape[0]).double()
    weight = w.to(getattr(torch, kind))
    return weight, weight.double()


def inputs(rows: int, width: int, values: str = "normal") -> torch.Tensor:
    x = torch.randn((rows, width), generator=torch.Generator().manual_seed(rows + width))
    if values == "one huge channel":
        x[:, width // 2] = 3e4
    elif values == "all equal":
        x[:] = 0.7
    elif values == "zeros":
        x[:] = 0
    elif values == "denormal":
        x *= 1e-40
    elif values == "tiny":
        x *= 1e-30
    return x


VALUES = ["normal", "one huge channel", "all equal", "zeros", "denormal", "tiny"]


def check(got: torch.Tensor, x: torch.Tensor, weight, exact: torch.Tensor, bias=None) -> None:
    """Within float32 summation of what the rows are multiplied as.

    Each product, and each partial sum, is rounded once, by 2**-24 of the sum of magnitudes at most.
    Random signs keep the total near the square root of the number of roundings; four times that.
    """
    if isinstance(weight, QuantisedWeight):
        x = rounded_rows(x)
    want = x.double() @ exact.T
    magnitude = x.double().abs() @ exact.T.abs()
    if bias is not None:
        want, magnitude = want + bias.double(), magnitude + bias.double().abs()
    bound = magnitude * 2**-24 * (4 * exact.shape[1] ** 0.5 + 4)
    assert got.dtype == torch.float32 and got.shape == want.shape
    # Products of denormals and of what is near them are rounded to a multiple of 2**-149.
    assert bool(((got - want).abs() <= bound + 2**-148 * (exact.shape[1] + 1)).all())


def check_product(kind, shape, rows):
    weight, exact = make(kind, shape)
    assert tuple(weight.shape) == shape
    x = inputs(rows, shape[1])
    check(linear(x, weight), x, weight, exact)
    bias = torch.linspace(-1, 1, shape[0])
    check(linear(x, weight, bias), x, weight, exact, bias)
    check(linear(x, weight, bias.bfloat16()), x, weight, exact, bias.bfloat16())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 2, 13, 2 * ROW_TILE + 5])
def test_rows_are_multiplied(kind, shape, rows, kernels):
    check_product(kind, shape, rows)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("values", VALUES)
def test_hard_values_are_multiplied(kind, values, kernels):
    weight, exact = make(kind, (40, 352))
    x = inputs(5, 352, values)
    check(linear(x, weight), x, weight, exact)


@pytest.mark.parametrize("kind", ["8", "4"])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_codes_do_not_overflow(kind, sign, kernels):
    """Every code of the row and of the weight is as large as it can be, with either sign."""
    w = torch.full((16, 96), -1.0)
    w[1] = 1.0
    w[:, 32] = -8.0 / 7  # of 4 bits, the others are then 1 and 15
    weight = quantise_weight(w, int(kind))
    x = torch.full((3, 96), float(sign))
    check(linear(x, weight), x, weight, weight.rows(0, 16).double())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_so(kind, bad, kernels):
    weight, _ = make(kind, (20, 100))
    x = inputs(3, 100)
    x[1, 70] = bad
    out = linear(x, weight)
    assert not bool(torch.isfinite(out[1]).any())
    assert bool(torch.isfinite(out[0]).all()) and bool(torch.isfinite(out[2]).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(40, 33), (BLOCK_ROWS * 2 + 8, 896), (64, 1000)])
@pytest.mark.parametrize("kernels", ["reference"], indirect=True)
def test_a_tile_does_not_depend_on_the_others(kind, shape, kernels):
    weight, _ = make(kind, shape)
    x = inputs(6 * ROW_TILE, shape[1])
    bias = torch.linspace(-1, 1, shape[0])
    whole = linear(x, weight, bias)
    for i in range(6):
        tile = slice(ROW_TILE * i, ROW_TILE * (i + 1))
        assert torch.equal(whole[tile], linear(x[tile], weight, bias))
        assert torch.equal(whole[tile], linear(x[tile].clone(), weight, bias))
    assert torch.equal(whole[:45], linear(x[:45], weight, bias))
    # Other rows of the same tile may hold anything: padding rows, for one.
    x[ROW_TILE // 2 : ROW_TILE] = 0
    again = linear(x, weight, bias)
    assert torch.equal(again[: ROW_TILE // 2], whole[: ROW_TILE // 2])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(40, 33), (301, 896), (64, 1000), (19, 6477)])
@pytest.mark.parametrize("kernels", COMPILED, indirect=True)
def test_a_row_does_not_depend_on_the_others(kind, shape, kernels):
    weight, _ = make(kind, shape)
    x = inputs(77, shape[1])
    whole = linear(x, weight)
    for start, stop in [(0, 1), (76, 77), (3, 5), (10, 25), (1, 76)]:
        assert torch.equal(whole[start:stop], linear(x[start:stop], weight))
    x[5:70] = torch.inf
    again = linear(x, weight)
    assert torch.equal(again[:5], whole[:5]) and torch.equal(again[70:], whole[70:])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 21])
@pytest.mark.parametrize("kernels", COMPILED, indirect=True)
def test_threads_do_not_change_a_product(kind, rows, kernels):
    """The reference is not asked: it leaves the order of sums to torch."""
    weight, _ = make(kind, (301, 896))
    x = inputs(rows, 896)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(linear(x, weight))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("kind", ["8", "4", *DRAWN])
@pytest.mark.parametrize("rows", [(0, 64), (8, 9), (5, 40), (16, 64), (40, 40), (63, 64)])
def test_a_part_of_a_weight_is_a_weight(kind, rows, kernels):
    """Parts of fused weights begin anywhere, within strips too; parts of parts as well."""
    weight, _ = make(kind, (64, 160))
    part = weight.part(*rows)
    assert part.shape == (rows[1] - rows[0], 160)
    assert part.codes.untyped_storage().data_ptr() == weight.codes.untyped_storage().data_ptr()
    assert torch.equal(part.rows(0, part.out_features), weight.rows(0, 64)[slice(*rows)])
    x = inputs(3, 160)
    if kernels == "reference":  # leaves the order of sums to torch, by the shapes
        check(linear(x, part), x, part, weight.rows(*rows).double())
    else:
        assert torch.equal(linear(x, part), linear(x, weight)[:, slice(*rows)])
    if part.out_features > 3:
        assert torch.equal(part.part(2, 4).rows(0, 2), part.rows(2, 4))


# Beyond, a code times its scale may be above float32.
FLOATS = st.floats(-(2.0**127), 2.0**127, width=32) | st.sampled_from([torch.inf, torch.nan])


@given(st.lists(FLOATS, min_size=1, max_size=70))
@example([0.0] * 33)
@example([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 63.5, -126.5])
@example([2.0**-100, 2.0**-101])
@example([1e-45, -3e-39])
@example([2.0**127, -(2.0**127), 2.0**120])
def test_rows_are_rounded_to_the_nearest_of_their_group(values):
    x = torch.tensor([values])
    rounded = rounded_rows(x)
    for start in range(0, len(values), 32):
        group, got = x[0, start : start + 32], rounded[0, start : start + 32]
        greatest = group.abs().max()
        if not torch.isfinite(greatest):
            assert not bool(torch.isfinite(got).any())
        elif greatest < 2.0**-100:
            assert bool((got == 0).all())
        else:
            # Half a step; 127 / greatest and each product with it are rounded.
            assert bool(((got - group).abs() <= greatest / 254 * (1 + 2**-14)).all())


@pytest.mark.parametrize("kernels", COMPILED, indirect=True)
@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("width", [1, 31, 64, 100, 896])
def test_rows_are_rounded_to_the_same_bits_everywhere(kernels, values, width):
    x = inputs(3, width, values)
    x[0, 0] = 0.0
    each, groups = dispatch._cpu.row_bytes(width), -(-width // 32)
    assert each % 64 == 0 and 0 <= each - groups * 40 < 64
    bytes_ = torch.zeros(3, each, dtype=torch.uint8)
    dispatch._cpu.quantise_rows(x.data_ptr(), width, width, bytes_.data_ptr(), 3)
    parts = bytes_[:, : groups * 40].unflatten(1, (groups, 40))
    codes = parts[..., :32].contiguous().view(torch.int8)
    scales = parts[..., 32:36].contiguous().view(torch.float32)
    sums = parts[..., 36:].contiguous().view(torch.int32).squeeze(-1)
    assert torch.equal(codes.sum(-1, dtype=torch.int32) * -8, sums)
    decoded = (codes * scales).flatten(1)
    assert torch.equal(decoded[:, :width], rounded_rows(x))
    assert bool((codes.flatten(1)[:, width:] == 0).all())


WEIGHTS = st.lists(st.floats(-65504, 65504, width=32), min_size=1, max_size=70)


@given(WEIGHTS)
@example([0.0] * 33)
@example([1e-9, -1e-9])
@example([65504.0, -65504.0])
@example([2.0**-149])
def test_eight_bits_are_within_half_a_step(values):
    w = torch.tensor([values])
    q = quantise_weight(w, 8)
    assert tuple(q.shape) == tuple(w.shape)
    step = q.scales[:, :, 0].float().repeat_interleave(32, 1)[:, : w.shape[1]]
    # Less than 127 of float32's least number have a step of 0.
    allowed = step / 2 + w.abs() * 2**-22 + 127 * 2.0**-149
    assert bool(((q.rows(0, 1) - w).abs() <= allowed).all())
    greatest = w.abs().max()
    assert bool((step <= greatest / 127 * (1 + 2**-10) + 6e-8).all())


@given(WEIGHTS)
@example([0.0] * 33)
@example([8.0, -8.0])
@example([1e-9, -1e-9])
def test_four_bits_are_within_a_step(values):
    w = torch.tensor([values])
    q = quantise_weight(w, 4)
    step = q.scales[:, :, 0].float().abs().repeat_interleave(32, 1)[:, : w.shape[1]]
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


@pytest.mark.parametrize("kernels", COMPILED, indirect=True)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (16, 32), (45, 70), (33, 1000)])
def test_quantising_gives_the_bits_of_the_reference(bits, dtype, shape, kernels, monkeypatch):
    generator = torch.Generator().manual_seed(shape[1])
    w = torch.randn(shape, generator=generator)
    # Rows of halves and of whole numbers have ties, of either sign; others are tiny, huge or zero.
    scales = torch.tensor([1.0, 1e-6, 1e-9, 1e-42, 2e3, 0.0, -0.0])
    w *= scales[torch.arange(shape[0]) % len(scales), None]
    w[7::9], w[8::9] = w[7::9].round(), (2 * w[8::9]).round() / 2
    w = w.to(dtype)
    got = quantise_weight(w, bits)
    monkeypatch.setenv("EBBTIDE_KERNELS", "reference")
    want = quantise_weight(w, bits)
    assert torch.equal(got.codes, want.codes)
    assert torch.equal(got.scales.view(torch.int16), want.scales.view(torch.int16))


@pytest.mark.parametrize("bits", [4, 8])
def test_quantising_reads_any_float_and_any_width(bits):
    w = torch.randn((BLOCK_ROWS + 3, 45), generator=torch.Generator().manual_seed(2))
    whole = quantise_weight(w.bfloat16(), bits)
    again = quantise_weight(w.bfloat16().float(), bits)
    assert torch.equal(whole.codes, again.codes) and torch.equal(whole.scales, again.scales)
    assert whole.in_features == 45 and whole.scales.shape == (BLOCK_ROWS // 16 + 1, 2, 16)
    # Zeros fill the last strip.
    assert bool((whole.scales[-1, :, 3:] == 0).all())
    assert quantise_weight(w, bits).to("cpu").device.type == "cpu"


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_weights_that_cannot_be_quantised_are_refused(bits, bad, kernels):
    w = torch.ones(4, 64)
    w[2, 40] = bad
    with pytest.raises(FloatingPointError, match="not finite, or too large"):
        quantise_weight(w, bits)


def test_shapes_that_do_not_fit_are_refused():
    w = torch.ones(8, 16)
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


@pytest.mark.parametrize("shape", [(1, 32), (45, 192), (32, 960)])
@pytest.mark.parametrize("group", [32, 64, None])
@pytest.mark.parametrize("are_unsigned", [False, True])
def test_eight_bits_that_are_given_are_kept(shape, group, are_unsigned, kernels):
    """But for codes of -128."""
    generator = torch.Generator().manual_seed(shape[1])
    codes = torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
    each = group if group and shape[1] % group == 0 else shape[1]
    scales = (torch.rand(shape[0], shape[1] // each, generator=generator) + 0.1).half()
    wide = scales.double().repeat_interleave(each, 1)

    def full(of, dtype, device):
        return torch.full(of, -3, dtype=dtype, device=device)

    def kept() -> QuantisedWeight:
        words = (codes ^ -128 if are_unsigned else codes).view(torch.int32)
        weight = repack_int8(words, scales, full, are_unsigned=are_unsigned)
        turned = words.T.contiguous().T, scales.T.contiguous().T
        again = repack_int8(*turned, full, are_unsigned=are_unsigned)
        assert torch.equal(weight.codes, again.codes) and torch.equal(weight.scales, again.scales)
        return weight

    weight = kept()
    assert weight.bits == 8 and torch.equal(weight.rows(0, shape[0]).double(), codes * wide)
    end = -(-shape[0] // 16) * 16 - shape[0]
    assert not weight.codes[-1, :, 16 - end :].any() and not weight.scales[-1, :, 16 - end :].any()
    x = inputs(3, shape[1])
    check(linear(x, weight), x, weight, codes * wide)
    codes[0, 5], codes[-1, -1] = -128, -128
    got = kept().rows(0, shape[0])
    codes[0, 5], codes[-1, -1] = -127, -127
    assert torch.equal(got.double(), codes * wide)


def test_eight_bits_that_do_not_fit_are_refused():
    words, scales = torch.zeros(4, 16, dtype=torch.int32), torch.ones(4, 2)
    for bad in ((words.long(), scales), (words[:, :10], scales), (words, scales[:3])):
        with pytest.raises(ValueError, match="codes are int32"):
            repack_int8(*bad)
    with pytest.raises(FloatingPointError, match="beyond float16"):
        repack_int8(words, scales * 1e6)

"""Codes with scales and minimums say after repacking what they said before, within what is promised
where float16 rounds, and are multiplied as that.
"""

from __future__ import annotations

import pytest
import torch
from affine_files import decoded, drawn, packed
from hypothesis import example, given
from hypothesis import strategies as st
from instruction_sets import COMPILED

from ebbtide.kernels import affine
from ebbtide.kernels.affine import CodeOrder, repack_affine
from ebbtide.kernels.matmul import linear
from ebbtide.kernels.quantised import quantised_shapes

SHAPES = [(1, 64), (16, 64), (45, 192), (33, 960), (200, 2880)]
BY_OUTPUTS = [(8, 64), (16, 64), (40, 192), (200, 2880)]


def whole(out_features: int, in_features: int, seed: int = 0, group: int = 32):
    """Codes, scales that float16 has, and minimums of zeros that are whole numbers."""
    codes, scales, _ = drawn(out_features, in_features, seed, group)
    generator = torch.Generator().manual_seed(seed)
    scales = scales.half().float()
    zeros = torch.randint(0, 17, scales.shape, generator=generator)
    return codes, scales, -zeros * scales


def same(got, want) -> bool:
    return torch.equal(got.codes, want.codes) and torch.equal(
        got.scales.view(torch.int16), want.scales.view(torch.int16)
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("group", [32, 64])
def test_zeros_that_are_whole_numbers_are_exact(shape, group, kernels):
    codes, scales, minimums = whole(*shape, group=group)
    weight = repack_affine(codes, scales, minimums)
    assert weight.shape == shape and weight.is_affine and weight.bits == 4
    assert torch.equal(
        weight.rows(0, shape[0]).double(), decoded(codes, scales, minimums).float().double()
    )
    of_codes, of_scales = quantised_shapes(shape, 4, True)
    assert tuple(weight.codes.shape) == of_codes and tuple(weight.scales.shape) == of_scales
    assert weight.num_bytes * 8 == 5 * -(-shape[0] // 16) * 16 * shape[1]


@pytest.mark.parametrize("shape", SHAPES)
def test_other_numbers_are_off_by_what_is_said(shape, kernels):
    codes, scales, minimums = drawn(*shape)
    exact = decoded(codes, scales, minimums)
    got = repack_affine(codes, scales, minimums).rows(0, shape[0]).double()
    least = minimums.double().repeat_interleave(32, 1)
    # And float32's own roundings.
    bound = ((exact - least).abs() + least.abs()) * 2.0**-11 * (1 + 2.0**-10)
    assert bool(((got - exact).abs() <= bound).all())
    assert not torch.equal(got, exact)


NUMBERS = st.floats(-60000, 60000, width=32)


@given(NUMBERS, NUMBERS, st.lists(st.integers(0, 15), min_size=32, max_size=32))
@example(0.0, 1.5, [7] * 32)
@example(0.0, -0.0, [7] * 32)
@example(1e-9, 1.0, list(range(16)) * 2)
@example(2.0**-24, 60000.0, list(range(16)) * 2)
@example(1e-3, 0.0, list(range(16)) * 2)
@example(-(2.0**-14), 2.0, list(range(16)) * 2)
def test_any_scale_and_minimum_is_kept_as_well_as_halves_can(scale, minimum, values):
    codes = torch.tensor([values], dtype=torch.uint8)
    numbers = torch.tensor([[scale]]), torch.tensor([[minimum]])
    exact = decoded(codes, *numbers)
    got = repack_affine(codes, *numbers).rows(0, 1).double()
    # Steps of float16: 2**-24 at least, of the scale, of which there are 15, and of a minimum that
    # is all there is; an offset's last bit, times the scale, is that much of the minimum.
    bound = 15 * (abs(scale) * 2.0**-11 + 2.0**-25) + abs(minimum) * 2.0**-11 + 2.0**-24
    if abs(scale) < 2.0**-24 or abs(minimum) > 65000 * abs(scale):
        bound += 15 * abs(scale)
    assert bool(((got - exact).abs() <= bound * (1 + 2.0**-8)).all())


@pytest.mark.parametrize("order", CodeOrder)
@pytest.mark.parametrize("shape", BY_OUTPUTS)
@pytest.mark.parametrize("has_minimums", [True, False])
def test_codes_may_lie_in_any_order(order, shape, has_minimums, kernels, monkeypatch):
    if kernels != "reference":
        monkeypatch.setattr(affine, "_repack", None)
    codes, scales, minimums = whole(*shape)
    minimums = minimums if has_minimums else None
    got = repack_affine(packed(codes, order), scales, minimums, order)
    assert got.is_affine == has_minimums
    assert torch.equal(
        got.rows(0, shape[0]).double(), decoded(codes, scales, minimums).float().double()
    )


@pytest.mark.parametrize("kernels", COMPILED, indirect=True)
@pytest.mark.parametrize("order", CodeOrder)
@pytest.mark.parametrize("shape", BY_OUTPUTS)
@pytest.mark.parametrize("has_minimums", [True, False])
def test_repacking_gives_the_bits_of_the_reference(
    order, shape, has_minimums, kernels, monkeypatch
):
    """Numbers of all sizes, and those that float16 has not; what was in memory before shows
    nowhere."""
    codes, scales, minimums = drawn(*shape)
    powers = 2.0 ** (torch.arange(scales.numel()).view(scales.shape) % 40 - 30)
    scales *= powers
    minimums[1::3] *= powers[1::3]
    scales[::5, 0] = 0
    minimums[::4, -1] = 0
    given_ = packed(codes, order), scales, minimums if has_minimums else None, order

    def full(of, dtype, device):
        return torch.full(of, -3, dtype=dtype, device=device)

    results = [repack_affine(*given_, full, threads) for threads in (1, 2, 5)]
    monkeypatch.setenv("EBBTIDE_KERNELS", "reference")
    want = repack_affine(*given_, full)
    assert all(same(got, want) for got in results)
    end = -(-shape[0] // 16) * 16 - shape[0]
    assert not want.codes[-1, :, 16 - end :].any() and not want.scales[-1, ..., 16 - end :].any()


@pytest.mark.parametrize("order", [o for o in CodeOrder if o.value < 4])
def test_chunks_of_bytes_may_lie_apart(order, kernels, monkeypatch):
    """As in blocks that hold their scales as well: chunks of 128 inputs here."""
    if kernels != "reference":
        monkeypatch.setattr(affine, "_repack", None)
    codes, scales, minimums = whole(45, 384)
    bytes_ = packed(codes, order).unflatten(1, (3, -1))
    blocks = torch.zeros(45, 3, 16 + bytes_.shape[2], dtype=torch.uint8)
    blocks[..., 16:] = bytes_
    got = repack_affine(blocks[..., 16:], scales, minimums, order)
    assert same(got, repack_affine(packed(codes, order), scales, minimums, order))
    every_other = torch.stack((blocks, blocks), 1).flatten(0, 1)[::2, :, 16:]
    assert same(got, repack_affine(every_other, scales, minimums, order))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_scales_may_be_of_any_dtype_and_lie_anyhow(dtype, kernels):
    codes, scales, minimums = drawn(45, 192)
    scales, minimums = scales.to(dtype), minimums.to(dtype)
    want = repack_affine(codes, scales.float(), minimums.float())
    got = repack_affine(codes, scales.T.contiguous().T, minimums.T.contiguous().T)
    assert same(got, want)
    transposed = codes.T.contiguous().T
    assert same(repack_affine(transposed, scales, minimums), want)


@pytest.mark.parametrize("num_rows", [*range(1, 10), 37, 300])
@pytest.mark.parametrize("part", [(0, 45), (3, 45), (20, 31)])
def test_products_are_exact(num_rows, part, kernels):
    """Rows of whole numbers whose groups have a greatest of 127 are not rounded, and no sum has
    more bits than float32: 18 of a group's, 2 of scales' differences, 3 of eight groups.
    """
    codes, _, _ = drawn(45, 256, num_rows)
    generator = torch.Generator().manual_seed(num_rows)
    scales = 2.0 ** torch.randint(-3, 0, (45, 8), generator=generator)
    minimums = -torch.randint(0, 17, (45, 8), generator=generator) * scales
    x = torch.randint(-127, 128, (num_rows, 256), generator=generator).float()
    x[:, ::32] = 127
    x[num_rows // 2, 1::2] = -127
    want = x.double() @ decoded(codes, scales, minimums)[slice(*part)].T
    assert torch.equal(linear(x, repack_affine(codes, scales, minimums).part(*part)).double(), want)


@pytest.mark.parametrize("kernels", COMPILED, indirect=True)
@pytest.mark.parametrize("num_rows", [1, 2, 5, 40])
def test_eight_everywhere_gives_the_bits_of_plain_four(num_rows, kernels):
    codes, scales, _ = drawn(45, 960)
    x = torch.randn(num_rows, 960, generator=torch.Generator().manual_seed(3))
    scales = scales.half().float()
    assert torch.equal(
        linear(x, repack_affine(codes, scales, -8 * scales)),
        linear(x, repack_affine(codes, scales)),
    )


@pytest.mark.parametrize("codes", [(0, 0), (15, 15), (0, 15), (15, 0)])
@pytest.mark.parametrize("zero", [0, 15])
@pytest.mark.parametrize("num_rows", [1, 3, 8])
def test_the_largest_codes_do_not_overflow(codes, zero, num_rows, kernels):
    """At the even inputs and at the odd ones, times 127 and -127."""
    given_ = torch.tensor(codes, dtype=torch.uint8).repeat(16, 32)
    scales = torch.ones(16, 2)
    numbers = given_, scales, -zero * scales
    weight, exact = repack_affine(*numbers), decoded(*numbers)
    for even, odd in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
        x = torch.full((num_rows, 64), 127.0 * even)
        x[:, 1::2] = 127.0 * odd
        assert torch.equal(linear(x, weight).double(), x.double() @ exact.T)


def test_a_group_without_a_scale_is_its_minimum(kernels):
    codes, scales, minimums = whole(20, 96)
    scales[3, 1] = 0
    minimums[3, 1] = -0.37
    scales[4, 2] = 1e-7  # of which float16 has one bit
    minimums[4, 2] = 0.5
    got = repack_affine(codes, scales, minimums).rows(0, 20)
    assert bool((got[3, 32:64] == torch.tensor(-0.37).half()).all())
    assert bool((got[4, 64:] == 0.5).all())
    scales[3, 1], minimums[3, 1] = 0, 0
    assert not repack_affine(codes, scales, minimums).rows(3, 4)[0, 32:64].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -7e4])
@pytest.mark.parametrize("place", [(0, 0), (17, 2)])
def test_what_float16_cannot_hold_is_refused(bad, place, kernels):
    for which in (1, 2):
        numbers = whole(20, 96)
        numbers[which][place] = bad
        if which == 2 and bad == -7e4:
            numbers[1][place] = 0  # with a scale beside it, a large minimum is an offset
        with pytest.raises(FloatingPointError, match="beyond float16"):
            repack_affine(*numbers)
        if which == 1:
            with pytest.raises(FloatingPointError, match="beyond float16"):
                repack_affine(*numbers[:2])


def test_what_does_not_fit_is_refused():
    codes, scales, minimums = whole(16, 128)
    for bad in ((codes[:, :40], scales), (codes.int(), scales), (codes[0], scales)):
        with pytest.raises(ValueError, match="codes of the order EACH"):
            repack_affine(*bad)
    for order in (CodeOrder.WORDS_OF_INPUTS, CodeOrder.WORDS_OF_OUTPUTS):
        with pytest.raises(ValueError, match="codes of the order WORDS"):
            repack_affine(codes, scales, minimums, order)
    for bad in ((scales[:15], minimums[:15]), (scales[:, :3], minimums), (scales[0], minimums[0])):
        with pytest.raises(ValueError, match="scales and minimums"):
            repack_affine(codes, *bad)
    with pytest.raises(ValueError, match="a multiple of 32"):
        repack_affine(codes, scales.repeat(1, 2), minimums.repeat(1, 2))


def test_parts_and_copies_stay_affine(kernels):
    weight = repack_affine(*whole(40, 96))
    for other in (weight.to("cpu"), weight.part(0, 40), weight.part(5, 40).part(0, 9)):
        assert other.is_affine
    assert torch.equal(weight.part(5, 40).part(0, 9).rows(2, 9), weight.rows(7, 14))

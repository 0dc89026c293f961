"""MXFP4 weights say after repacking what they said in their file, and are multiplied as that."""

from __future__ import annotations

import pytest
import torch
from instruction_sets import COMPILED
from mxfp4_files import decoded, drawn

from ebbtide.kernels import quantised
from ebbtide.kernels.matmul import linear
from ebbtide.kernels.quantised import quantised_shapes, repack_mxfp4

SHAPES = [(1, 32), (16, 64), (45, 96), (33, 992), (200, 2880)]


@pytest.mark.parametrize("shape", SHAPES)
def test_numbers_are_the_files(shape, kernels):
    blocks, scales = drawn(*shape)
    weight = repack_mxfp4(blocks, scales)
    assert weight.shape == shape and weight.is_float and weight.bits == 4
    assert torch.equal(weight.rows(0, shape[0]).double(), decoded(blocks, scales))
    of_codes, of_scales = quantised_shapes(shape, 4)
    assert tuple(weight.codes.shape) == of_codes and tuple(weight.scales.shape) == of_scales


def test_numbers_are_transformers(kernels):
    """Whose experts' weights are (in, out)."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, scales = zip(*(drawn(48, 128, seed) for seed in range(3)), strict=True)
    want = convert_moe_packed_tensors(torch.stack(blocks), torch.stack(scales), dtype=torch.float32)
    for i in range(3):
        assert torch.equal(repack_mxfp4(blocks[i], scales[i]).rows(0, 48), want[i].T)


@pytest.mark.parametrize("kernels", COMPILED, indirect=True)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("step", [1, 2, 3])
def test_repacking_gives_the_bits_of_the_reference(shape, step, kernels, monkeypatch):
    """Rows that lie apart as well; what was in memory before shows nowhere."""
    blocks, scales = drawn(shape[0] * step, shape[1], exponents=(0, 143))

    def full(of, dtype, device):
        return torch.full(of, -3, dtype=dtype, device=device)

    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(repack_mxfp4(blocks[step - 1 :: step], scales[step - 1 :: step], full))
    finally:
        torch.set_num_threads(before)
    monkeypatch.setenv("EBBTIDE_KERNELS", "reference")
    want = repack_mxfp4(blocks[step - 1 :: step], scales[step - 1 :: step], full)
    for got in results:
        assert torch.equal(got.codes, want.codes)
        assert torch.equal(got.scales.view(torch.int16), want.scales.view(torch.int16))
    end = -(-shape[0] // 16) * 16 - shape[0]
    assert not want.codes[-1, :, 16 - end :].any() and not want.scales[-1, :, 16 - end :].any()


def test_every_other_row_is_a_weight(kernels, monkeypatch):
    """Gate and up take turns in gpt-oss, and are read where they lie."""
    blocks, scales = drawn(90, 160)
    if kernels != "reference":
        monkeypatch.setattr(quantised, "_repack", None)
    exact = decoded(blocks, scales)
    for first in (0, 1):
        weight = repack_mxfp4(blocks[first::2], scales[first::2])
        assert torch.equal(weight.rows(0, 45).double(), exact[first::2])


def test_bytes_may_lie_anyhow(kernels):
    blocks, scales = drawn(20, 96)
    apart = blocks.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    got = repack_mxfp4(apart, scales.T.contiguous().T)
    assert torch.equal(got.rows(0, 20).double(), decoded(blocks, scales))


@pytest.mark.parametrize("num_rows", [*range(1, 10), 37, 300])
@pytest.mark.parametrize("part", [(0, 45), (3, 45), (20, 31)])
def test_products_are_exact(num_rows, part, kernels):
    """Rows of whole numbers whose groups have a greatest of 127 are not rounded, and no sum has
    more bits than float32: 17 of a group's, 3 of scales' differences, 3 of eight groups.
    """
    blocks, scales = drawn(45, 256, num_rows, exponents=(119, 122))
    generator = torch.Generator().manual_seed(num_rows)
    x = torch.randint(-127, 128, (num_rows, 256), generator=generator).float()
    x[:, ::32] = 127
    x[num_rows // 2, 1::2] = -127
    want = x.double() @ decoded(blocks, scales)[slice(*part)].T
    assert torch.equal(linear(x, repack_mxfp4(blocks, scales).part(*part)).double(), want)


@pytest.mark.parametrize("codes", [(7, 7), (15, 15), (7, 15), (15, 7)])
@pytest.mark.parametrize("num_rows", [1, 3, 8])
def test_the_largest_codes_do_not_overflow(codes, num_rows, kernels):
    """6 and -6 at the even inputs and at the odd ones, times 127 and -127."""
    blocks = torch.full((16, 2, 16), codes[0] + 16 * codes[1], dtype=torch.uint8)
    scales = torch.full((16, 2), 127, dtype=torch.uint8)
    weight, exact = repack_mxfp4(blocks, scales), decoded(blocks, scales)
    for even, odd in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
        x = torch.full((num_rows, 64), 127.0 * even)
        x[:, 1::2] = 127.0 * odd
        assert torch.equal(linear(x, weight).double(), x.double() @ exact.T)


def test_scales_that_float16_has_are_exact(kernels):
    blocks, _ = drawn(40, 96)
    scales = torch.arange(104, 144, dtype=torch.uint8)[:, None].repeat(1, 3)
    weight = repack_mxfp4(blocks, scales)
    assert torch.equal(weight.rows(0, 40).double(), decoded(blocks, scales))


def test_tiny_scales_are_zero(kernels):
    blocks, _ = drawn(104, 64)
    scales = torch.arange(104, dtype=torch.uint8)[:, None].repeat(1, 2)
    weight = repack_mxfp4(blocks, scales)
    assert not weight.rows(0, 104).any()
    assert decoded(blocks, scales).abs().max() == 6 * 2.0**-24


@pytest.mark.parametrize("exponent", [144, 200, 254, 255])
@pytest.mark.parametrize("place", [(0, 0), (17, 2)])
def test_scales_that_float16_cannot_hold_are_refused(exponent, place, kernels):
    blocks, scales = drawn(20, 96)
    scales[place] = exponent
    with pytest.raises(FloatingPointError, match=r"above 2\*\*16"):
        repack_mxfp4(blocks, scales)
    with pytest.raises(FloatingPointError, match=r"above 2\*\*16"):
        repack_mxfp4(torch.zeros_like(blocks), scales)


def test_what_is_no_mxfp4_is_refused():
    blocks, scales = drawn(20, 96)
    for bad in ((blocks[..., :8], scales), (blocks, scales[:19]), (blocks.flatten(1), scales)):
        with pytest.raises(ValueError, match="MXFP4 is blocks"):
            repack_mxfp4(*bad)
    for bad in ((blocks.to(torch.int8), scales), (blocks, scales.to(torch.int16))):
        with pytest.raises(ValueError, match="MXFP4 is of bytes"):
            repack_mxfp4(*bad)


def test_parts_and_copies_stay_mxfp4(kernels):
    weight = repack_mxfp4(*drawn(40, 96))
    for other in (weight.to("cpu"), weight.part(0, 40), weight.part(5, 40).part(0, 9)):
        assert other.is_float
    assert torch.equal(weight.part(5, 40).part(0, 9).rows(2, 9), weight.rows(7, 14))
    assert weight.num_bytes * 8 == 4.5 * 48 * 96

"""The quantiser: its box is a bound, its error is within half a step, its codes nest."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from ebbtide.kernels import codec

# What a float32 key may be and float16 parameters can hold, denormals of both formats included.
NUMBERS = st.one_of(
    st.floats(-65504, 65504, width=32),
    st.sampled_from([0.0, -0.0, 65504.0, -65504.0, 6e-8, -6e-8, 1e-40, -1e-40, 2049.0, 1e-3]),
)
CHANNELS = st.lists(NUMBERS, min_size=1, max_size=20)


def as_channel(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32).unsqueeze(-1)  # (P, 1)


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
@example(65519.9)
@example(-65504.1)
@example(1e-45)
@example(-0.0)
def test_half_rounds_to_the_neighbour_on_its_side(x):
    x = torch.tensor([x], dtype=torch.float32)
    below, above = codec.half_below(x), codec.half_above(x)
    assert below.float() <= x <= above.float()
    # No float16 lies between the two.
    with np.errstate(over="ignore"):
        step = np.nextafter(below.numpy(), np.float16(np.inf))
    assert above.numpy() in (below.numpy(), step)


@given(CHANNELS, st.integers(1, 8))
@example([5.0, 5.0, 5.0], 4)
@example([0.1, 0.1], 3)  # a constant that float16 cannot hold
@example([-65504.0, 65504.0], 1)
@example([65504.0, 65503.0], 8)
@example([1e-40, 3e-40], 2)
def test_the_box_holds_every_value_and_the_error_is_half_a_step(values, bits):
    x = as_channel(values)
    try:
        lo, scale = codec.box(x, 0, bits, "keys")
    except FloatingPointError:
        # Only a box wider than 2**bits - 1 steps of the largest float16 may be refused.
        assert max(values) - min(values) > (2**bits - 1) * 65000
        return
    top = lo.float() + (2**bits - 1) * scale.float()
    assert bool((lo.float() <= x).all()) and bool((x <= top).all())
    decoded = codec.decode(codec.encode(x, lo, scale, bits), lo, scale)
    # Half a step; and the two float32 roundings, of x - lo and of lo + code * scale.
    rounding = (x.abs() + lo.float().abs() + scale.float() * 2**bits) * 2**-23
    assert bool(((decoded - x).abs() <= scale.float() / 2 + rounding).all())
    if min(values) == max(values) and float(np.float16(values[0])) == np.float32(values[0]):
        assert float(scale) == 0 and bool((decoded == x).all())


@given(CHANNELS, st.integers(2, 8), st.data())
def test_near_codes_are_the_top_bits_decoded_at_the_middle_of_their_bin(values, bits, data):
    near_bits = data.draw(st.integers(0, bits - 1))
    x = as_channel([v / 4 for v in values])  # so that one bit's box fits float16 as well
    lo, scale = codec.box(x, 0, bits, "keys")
    codes = codec.encode(x, lo, scale, bits)
    far_bits = bits - near_bits
    near = codes >> far_bits
    middle = codec.decode_near(near, lo, scale, far_bits)
    first = codec.decode(near << far_bits, lo, scale)
    last = codec.decode((near << far_bits) | (2**far_bits - 1), lo, scale)
    # Each of the three is rounded once, at most half an ulp of the greatest of them.
    ulp = torch.maximum(first.abs(), last.abs()) * 2**-23
    assert bool(((middle - (first.double() + last.double()) / 2).abs() <= ulp).all())
    assert bool(((middle - x).abs() <= scale.float() * 2**far_bits / 2 + 2 * ulp + 1e-37).all())


@pytest.mark.parametrize("bits", range(9))
@pytest.mark.parametrize("dim", [8, 64, 80, 112])
def test_planes_give_codes_back(bits, dim):
    generator = torch.Generator().manual_seed(bits * 1000 + dim)
    codes = torch.randint(0, 2**bits, (2, 3, 16, dim), generator=generator, dtype=torch.uint8)
    data = codec.pack(codes, bits)
    assert data.shape == (2, 3, 16 * dim * bits // 8)
    assert torch.equal(codec.unpack(data, bits, 16, dim), codes)


def test_where_the_bits_of_a_code_lie():
    codes = torch.arange(16, dtype=torch.uint8).reshape(1, 16)  # one token, sixteen elements
    six = codec.pack(codes << 2 | 3, 6)
    # First the plane of 4 bits: byte j holds element j below element j + 8; then the plane of 2
    # bits.
    assert six[:8].tolist() == [j | (j + 8) << 4 for j in range(8)]
    assert six[8:].tolist() == [0xFF] * 4


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("at", [0, 5])
def test_what_is_not_finite_is_refused(bad, at):
    x = torch.ones(8, 4)
    x[at, 2] = bad
    with pytest.raises(FloatingPointError, match="keys are not finite"):
        codec.box(x, 0, 4, "keys")


@pytest.mark.parametrize("values", [[-65505.0, 0.0], [-65504.0, 65504.0 * 1.01], [1e30, 0.0]])
def test_what_float16_cannot_hold_is_refused(values):
    with pytest.raises(FloatingPointError, match=r"values between .* do not fit"):
        codec.box(as_channel(values), 0, 1, "values")


def test_zeros_of_either_sign_give_the_same_bytes():
    a = codec.box(as_channel([0.0, -0.0]), 0, 4, "keys")
    b = codec.box(as_channel([-0.0, -0.0]), 0, 4, "keys")
    for one, other in zip(a, b, strict=True):
        assert torch.equal(one.view(torch.int16), other.view(torch.int16))
        assert int(one.view(torch.int16)) == 0

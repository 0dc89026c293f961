"""The quantiser and the bit planes: tensors to codes, codes to bytes, and back.

    lo    = the least value, rounded down to fp16
    scale = (the greatest value - lo) / (2**bits - 1), rounded up to fp16
    code  = round((x - lo) / scale), ties to even, clamped to 0 .. 2**bits - 1; 0 where scale is 0
    x'    = lo + code * scale

All in float32, except that scale is found in float64, where the test that lo + (2**bits - 1) *
scale reaches the greatest value is exact. So [lo, lo + (2**bits - 1) * scale] holds every value,
also when float32 evaluates it. A code times an fp16 scale is exact in float32, which leaves one
rounding: x' has the same bits with and without fused multiply-add. |x' - x| <= scale / 2, plus
float32's rounding of x - lo.

A constant channel has scale 0, and is decoded exactly, if fp16 holds the constant. If not, lo lies
just below it and scale is a sliver of an fp16 step: the box stays a bound, and the error at most
half that sliver.

Dropping the low bits of a code gives a coarser code whose wider bin is decoded at its midpoint.

Knows no layout: the axis of a channel is the caller's.
"""

from __future__ import annotations

import torch

from .layout import plane_widths

_HALF_SMALLEST_NEGATIVE = -32767  # 0x8001 as int16: the fp16 number next below zero


def half_below(x: torch.Tensor) -> torch.Tensor:
    """x (float32 or float64) rounded down to float16; -inf below float16's range. Same shape."""
    half = x.to(torch.float16)
    bits = half.view(torch.int16)
    lower = torch.where(half > 0, bits - 1, bits + 1)
    lower = torch.where(half == 0, torch.full_like(bits, _HALF_SMALLEST_NEGATIVE), lower)
    return torch.where(half.to(x.dtype) > x, lower.view(torch.float16), half)


def half_above(x: torch.Tensor) -> torch.Tensor:
    """x rounded up to float16; inf above float16's range."""
    return -half_below(-x)


def box(x: torch.Tensor, dim: int, bits: int, what: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(lo, scale), float16, of x (float32) along `dim`, which is kept with size 1.

    Raises FloatingPointError, naming `what`, if x is not finite or float16 cannot hold lo or scale.
    """
    # Adding zero turns -0.0 into 0.0, so that the bytes do not depend on which zero a reduction met
    # first.
    least = x.amin(dim, keepdim=True) + 0.0
    greatest = x.amax(dim, keepdim=True).to(torch.float64)
    levels = 2**bits - 1
    lo = half_below(least)
    scale = half_above((greatest - lo.to(torch.float64)) / levels)
    # The division rounds, so its result may be one fp16 step short of a bound.
    short = lo.to(torch.float64) + levels * scale.to(torch.float64) < greatest
    scale = torch.where(short, (scale.view(torch.int16) + 1).view(torch.float16), scale) + 0.0
    if not bool((torch.isfinite(lo) & torch.isfinite(scale)).all()):
        if not bool(torch.isfinite(x).all()):
            raise FloatingPointError(
                f"{what} are not finite (NaN or infinity): nothing to quantise"
            )
        raise FloatingPointError(
            f"{what} between {float(x.min()):g} and {float(x.max()):g} "
            "do not fit float16 parameters"
        )
    return lo, scale


def encode(x: torch.Tensor, lo: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """x (float32) to codes, uint8, same shape. lo and scale (float16) broadcast to x."""
    scale = scale.to(torch.float32)
    # Where scale is 0 all of x equals lo: 0 / 1 gives code 0.
    divisor = torch.where(scale == 0, torch.ones_like(scale), scale)
    codes = ((x - lo.to(torch.float32)) / divisor).round_().clamp_(0, 2**bits - 1)
    return codes.to(torch.uint8)


def decode(codes: torch.Tensor, lo: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Codes (uint8) to float32, same shape. lo and scale (float16) broadcast to codes."""
    return codes.to(torch.float32).mul_(scale.to(torch.float32)).add_(lo.to(torch.float32))


def decode_near(
    near: torch.Tensor, lo: torch.Tensor, scale: torch.Tensor, far_bits: int
) -> torch.Tensor:
    """Near codes (uint8: codes without their low `far_bits` bits) to the middles of their bins."""
    width = 2**far_bits
    middle = near.to(torch.float32).mul_(width).add_((width - 1) / 2)
    return middle.mul_(scale.to(torch.float32)).add_(lo.to(torch.float32))


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes (..., P, d) uint8 to the bytes of their planes, (..., P * d * bits / 8) uint8."""
    *lead, tokens, dim = codes.shape
    planes = []
    below = bits  # bits of the code that lie below what is already stored
    for width in plane_widths(bits):
        below -= width
        part = (codes >> below) & (2**width - 1)
        runs = part.reshape(*lead, tokens, 8 // width, dim * width // 8)
        plane = runs[..., 0, :].clone()
        for i in range(1, 8 // width):
            plane |= runs[..., i, :] << (i * width)
        planes.append(plane.flatten(-2))
    return torch.cat(planes, -1) if planes else codes.new_empty((*lead, 0))


def unpack(data: torch.Tensor, bits: int, tokens: int, dim: int) -> torch.Tensor:
    """The inverse of `pack`: bytes (..., tokens * dim * bits / 8) to codes (..., tokens, dim)."""
    lead = data.shape[:-1]
    codes = torch.zeros((*lead, tokens, dim), dtype=torch.uint8, device=data.device)
    start, below = 0, bits
    for width in plane_widths(bits):
        below -= width
        size = tokens * dim * width // 8
        plane = data[..., start : start + size].reshape(*lead, tokens, dim * width // 8)
        start += size
        runs = [(plane >> (i * width)) & (2**width - 1) for i in range(8 // width)]
        codes |= torch.cat(runs, -1) << below
    return codes

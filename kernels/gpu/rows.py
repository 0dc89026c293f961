"""The small steps between a layer's products, each in one launch: RMS norms, rotations, gates."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..gate import ACTIVATIONS, BOUND, STEEPNESS

_AT_ONCE = 1024  # numbers that a program makes
_BOUND, _STEEPNESS = tl.constexpr(BOUND), tl.constexpr(STEEPNESS)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, offset: float, eps: float) -> torch.Tensor:
    """As kernels.norm.rms_norm."""
    x, out = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    width = x.shape[-1]
    rows = x.numel() // width
    if rows:
        wide = triton.next_power_of_2(width)
        at_once = max(1, _AT_ONCE // wide)
        grid = (triton.cdiv(rows, at_once),)
        given = (x, weight.contiguous(), out, rows, width, offset, eps)
        _rms_norm[grid](*given, WIDTH=wide, ROWS=at_once)
    return out


def turn(
    x: torch.Tensor,
    cosines: torch.Tensor,
    sines: torch.Tensor,
    interleaved: bool,
    scale: float,
    heads_first: bool,
) -> torch.Tensor:
    """As kernels.turn.turn."""
    tokens, heads, dim = x.shape
    shape = (heads, tokens, dim) if heads_first else x.shape
    out = torch.empty(shape, dtype=torch.float32, device=x.device)
    if not out.numel():
        return out
    width = cosines.shape[-1]
    dims = triton.next_power_of_2(dim)
    at_once = max(1, _AT_ONCE // dims)
    _turn[(tokens, triton.cdiv(heads, at_once))](
        x.contiguous(),
        cosines.contiguous() if width else x,
        sines.contiguous() if width else x,
        out,
        scale,
        out.stride(int(heads_first)),
        out.stride(int(not heads_first)),
        heads,
        DIM=dim,
        DIMS=dims,
        HEADS=at_once,
        WIDTH=width,
        INTERLEAVED=interleaved,
    )
    return out


def gate(x: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """As kernels.gate.gate, of contiguous rows: in x's place."""
    count = x.numel()
    if count:
        kind = ACTIVATIONS.index(activation)
        _gate[(triton.cdiv(count, _AT_ONCE),)](x, up, count, KIND=kind, AT_ONCE=_AT_ONCE)
    return x


@triton.jit
def _rms_norm(x, weight, out, rows, width, offset, eps, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    is_there = (row < rows)[:, None] & (columns < width)[None, :]
    at = row[:, None] * width + columns[None, :]
    values = tl.load(x + at, mask=is_there, other=0.0)
    inverse = tl.rsqrt(tl.sum(values * values, 1) / width + eps)
    factors = tl.load(weight + columns, mask=columns < width, other=0.0) + offset
    tl.store(out + at, values * inverse[:, None] * factors[None, :], mask=is_there)


@triton.jit
def _turn(
    x,
    cosines,
    sines,
    out,
    scale,
    token_stride,
    head_stride,
    heads,
    DIM: tl.constexpr,
    DIMS: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    token, dims = tl.program_id(0).to(tl.int64), tl.arange(0, DIMS)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    is_head = (head < heads)[:, None]
    is_there = is_head & (dims < DIM)[None, :]
    of_head = x + (token * heads + head)[:, None] * DIM
    values = tl.load(of_head + dims[None, :], mask=is_there, other=0.0)
    if WIDTH:
        if INTERLEAVED:
            partners, sign = dims ^ 1, tl.where(dims % 2 == 0, -1.0, 1.0)
        else:
            half: tl.constexpr = WIDTH // 2
            partners = tl.where(dims < half, dims + half, dims - half)
            sign = tl.where(dims < half, -1.0, 1.0)
        is_turned = dims < WIDTH
        is_partner = is_head & is_turned[None, :]
        crossed = tl.load(of_head + partners[None, :], mask=is_partner, other=0.0)
        cosine = tl.load(cosines + token * WIDTH + dims, mask=is_turned, other=1.0)
        sine = tl.load(sines + token * WIDTH + dims, mask=is_turned, other=0.0)
        values = values * cosine[None, :] + crossed * (sine * sign)[None, :]
    at = out + token * token_stride + head[:, None] * head_stride + dims[None, :]
    tl.store(at, values * scale, mask=is_there)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _gate(x, up, count, KIND: tl.constexpr, AT_ONCE: tl.constexpr):
    """KIND: an index into ACTIVATIONS."""
    at = tl.program_id(0).to(tl.int64) * AT_ONCE + tl.arange(0, AT_ONCE)
    values = tl.load(x + at, mask=at < count, other=0.0)
    others = tl.load(up + at, mask=at < count, other=0.0)
    if KIND == 0:
        gated = values * _sigmoid(values)
    elif KIND == 1:
        gated = values * 0.5 * (1.0 + tl.erf(values * 0.7071067811865476))
    elif KIND == 2:
        inner = 0.7978845608028654 * (values + 0.044715 * values * values * values)
        gated = values * _sigmoid(2.0 * inner)  # tanh(a) = 2 sigmoid(2 a) - 1
    elif KIND == 3:
        gated = _sigmoid(values)
    elif KIND == 5:
        above = tl.maximum(values, 0.0)
        gated = above * above
    elif KIND == 6:
        gated = tl.maximum(values, 0.0)
    elif KIND == 7:
        gated = tl.maximum(values, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(values)))
    else:
        values = tl.minimum(values, _BOUND)
        gated = values * _sigmoid(values * _STEEPNESS)
        others = tl.minimum(tl.maximum(others, -_BOUND), _BOUND) + 1.0
    tl.store(x + at, gated * others, mask=at < count)

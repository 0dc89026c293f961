"""Products of rows with group-quantised or raw weights, and the rounding of rows to groups.

As kernels.quantised has it: within a group of 32 inputs whole numbers are multiplied, exactly; the
groups are added in float32. One row reads a strip of sixteen outputs from end to end; several rows
are multiplied a group at a time where whole numbers of eight bits have units of their own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..quantised import GROUP, QuantisedWeight

_ROUND = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding and taking it away rounds to even
_LEAST = tl.constexpr(2.0**-100)  # quantised.rounded_rows has it
_ROUNDED_GROUPS = 16  # that a program of `_round_rows` rounds
_ROW_GROUPS = 32  # that a program for one row takes at once, of 4 bits; half as many of 8
_ROWS, _OUTPUTS = 64, 64  # that a program for many rows makes
_RAW_OUTPUTS, _RAW_INPUTS = 8, 512  # of raw weights, for one row


def linear(x: torch.Tensor, weight: QuantisedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """x (rows, in) float32 times a quantised weight, transposed, plus bias (out) float32: (rows,
    out) float32."""
    rows, (out_features, in_features) = len(x), weight.shape
    x = x.contiguous()
    num_groups = weight.scales.shape[1]
    codes = torch.empty((rows, num_groups * GROUP), dtype=torch.int8, device=x.device)
    scales = torch.empty((rows, num_groups), dtype=torch.float32, device=x.device)
    out = torch.empty((rows, out_features), dtype=torch.float32, device=x.device)
    if not rows or not out_features:
        return out
    grid = (rows, triton.cdiv(num_groups, _ROUNDED_GROUPS))
    _round_rows[grid](x, codes, scales, in_features, num_groups, GROUPS=_ROUNDED_GROUPS)
    shared = {
        "num_groups": num_groups,
        "first": weight.first,
        "out_features": out_features,
        "BITS": weight.bits,
        "IS_FLOAT": weight.is_float,
        "IS_AFFINE": weight.is_affine,
        "HAS_BIAS": bias is not None,
    }
    given = (codes, scales, weight.codes, weight.scales, out if bias is None else bias, out)
    if rows == 1:
        at_once = _ROW_GROUPS if weight.bits == 4 else _ROW_GROUPS // 2
        _multiply_row[(len(weight.codes),)](*given, **shared, GROUPS=at_once)
    else:
        covered = weight.first + out_features
        grid = (triton.cdiv(rows, _ROWS), triton.cdiv(covered, _OUTPUTS))
        _multiply_rows[grid](*given, rows, **shared, ROWS=_ROWS, OUTPUTS=_OUTPUTS)
    return out


def linear_raw(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The same of one row x (1, in) with a raw weight (out, in)."""
    out_features, in_features = weight.shape
    x, weight = x.contiguous(), weight.contiguous()
    out = torch.empty((1, out_features), dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(out_features, _RAW_OUTPUTS),)
    _multiply_raw[grid](
        x,
        weight,
        out if bias is None else bias,
        out,
        in_features,
        out_features,
        HAS_BIAS=bias is not None,
        OUTPUTS=_RAW_OUTPUTS,
        INPUTS=_RAW_INPUTS,
    )
    return out


@triton.jit
def _round_rows(x, codes, scales, in_features, num_groups, GROUPS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    groups = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    inputs = groups[:, None] * 32 + tl.arange(0, 32)[None, :]
    values = tl.load(x + row * in_features + inputs, mask=inputs < in_features, other=0.0)
    greatest = tl.max(tl.abs(values), 1)
    is_nothing = greatest < _LEAST
    divisor = tl.where(is_nothing, 1.0, greatest)
    inverse = tl.where(is_nothing, 0.0, tl.div_rn(tl.full((GROUPS,), 127.0, tl.float32), divisor))
    scale = tl.where(is_nothing, 0.0, tl.div_rn(greatest, tl.full((GROUPS,), 127.0, tl.float32)))
    # What is not a number must stay visible: the greatest of a group passes over it.
    is_strange = tl.max((values != values).to(tl.int32), 1) > 0
    scale = tl.where(is_strange, float("nan"), scale)
    rounded = (values * inverse[:, None] + _ROUND) - _ROUND
    rounded = tl.where(tl.abs(rounded) <= 127.0, rounded, 0.0)
    is_there = groups < num_groups
    places = row * num_groups * 32 + inputs
    tl.store(codes + places, rounded.to(tl.int8), mask=is_there[:, None])
    tl.store(scales + row * num_groups + groups, scale, mask=is_there)


@triton.jit
def _of_four_bits(code, IS_FLOAT: tl.constexpr, IS_AFFINE: tl.constexpr):
    """The whole number that a code of four bits stands for."""
    if IS_AFFINE:
        return code  # less an offset that is no whole number
    if not IS_FLOAT:
        return code - 8
    half, exponent, fraction = code & 7, (code & 7) >> 1, code & 1
    number = tl.where(exponent == 0, half, (2 + fraction) << (tl.maximum(exponent, 1) - 1))
    return tl.where(code >= 8, -number, number)


@triton.jit
def _multiply_row(
    x,
    x_scales,
    codes,
    scales,
    bias,
    out,
    num_groups,
    first,
    out_features,
    BITS: tl.constexpr,
    IS_FLOAT: tl.constexpr,
    IS_AFFINE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """One strip of outputs of one row. A word has four inputs of 8 bits, or eight of 4."""
    strip = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, 16)
    total = tl.zeros((GROUPS, 16), tl.float32)
    words = codes + strip * num_groups * BITS * 16
    own: tl.constexpr = 32 if IS_AFFINE else 16  # numbers of a group: scales, and offsets
    strip_scales = scales + strip * num_groups * own
    for start in range(0, num_groups, GROUPS):
        groups = start + tl.arange(0, GROUPS)
        is_there = groups < num_groups
        word = tl.arange(0, BITS)
        at = (groups[:, None, None] * BITS + word[None, :, None]) * 16 + lanes[None, None, :]
        w = tl.load(words + at, mask=is_there[:, None, None], other=0)
        inputs = x + groups[:, None] * 32 + word[None, :] * 4
        products = tl.zeros((GROUPS, BITS, 16), tl.int32)
        inputs_sum = tl.zeros((GROUPS, BITS), tl.int32)
        for byte in tl.static_range(4):
            low = tl.load(inputs + byte, mask=is_there[:, None], other=0).to(tl.int32)
            if BITS == 8:
                part = (w << (24 - 8 * byte)) >> 24
                products += part * low[:, :, None]
            else:
                high = tl.load(inputs + byte + 16, mask=is_there[:, None], other=0).to(tl.int32)
                part = _of_four_bits((w >> (8 * byte)) & 15, IS_FLOAT, IS_AFFINE)
                products += part * low[:, :, None]
                part = _of_four_bits((w >> (8 * byte + 4)) & 15, IS_FLOAT, IS_AFFINE)
                products += part * high[:, :, None]
                inputs_sum += low + high
        of_x = tl.load(x_scales + groups, mask=is_there, other=0.0)
        at = strip_scales + groups[:, None] * own + lanes[None, :]
        of_w = tl.load(at, mask=is_there[:, None], other=0.0).to(tl.float32)
        sums = tl.sum(products, 1).to(tl.float32)
        if IS_AFFINE:
            offsets = tl.load(at + 16, mask=is_there[:, None], other=0.0).to(tl.float32)
            sums -= offsets * tl.sum(inputs_sum, 1).to(tl.float32)[:, None]
        total += sums * (of_w * of_x[:, None])
    result = tl.sum(total, 0)
    outputs = strip * 16 + lanes - first
    is_wanted = (outputs >= 0) & (outputs < out_features)
    if HAS_BIAS:
        result += tl.load(bias + outputs, mask=is_wanted, other=0.0)
    tl.store(out + outputs, result, mask=is_wanted)


@triton.jit
def _multiply_rows(
    x,
    x_scales,
    codes,
    scales,
    bias,
    out,
    num_rows,
    num_groups,
    first,
    out_features,
    BITS: tl.constexpr,
    IS_FLOAT: tl.constexpr,
    IS_AFFINE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    """ROWS rows times OUTPUTS outputs; a group's inputs are multiplied as one small matrix."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    places = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    strips, lanes = (places // 16).to(tl.int64), places % 16
    is_row, is_place = rows < num_rows, places < first + out_features
    rows = rows.to(tl.int64)
    inputs = tl.arange(0, 32)
    # 8 bits: byte i % 4 of word i // 4. 4 bits: byte i % 16, half i // 16, of the group's sixteen.
    if BITS == 8:
        word, shift = inputs // 4, 24 - (inputs % 4) * 8
    else:
        word, shift = (inputs % 16) // 4, (inputs % 4) * 8 + (inputs // 16) * 4
    w_at = codes + (strips * num_groups * BITS * 16 + lanes)[None, :] + word[:, None] * 16
    x_at = x + (rows * num_groups * 32)[:, None] + inputs[None, :]
    own: tl.constexpr = 32 if IS_AFFINE else 16
    w_scales, x_scales = scales + strips * num_groups * own + lanes, x_scales + rows * num_groups
    total = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for group in range(0, num_groups):
        a = tl.load(x_at + group * 32, mask=is_row[:, None], other=0)
        w = tl.load(w_at + group * BITS * 16, mask=is_place[None, :], other=0)
        if BITS == 8:
            b = ((w << shift[:, None]) >> 24).to(tl.int8)
        else:
            b = _of_four_bits((w >> shift[:, None]) & 15, IS_FLOAT, IS_AFFINE).to(tl.int8)
        of_x = tl.load(x_scales + group, mask=is_row, other=0.0)
        of_w = tl.load(w_scales + group * own, mask=is_place, other=0.0).to(tl.float32)
        sums = tl.dot(a, b, out_dtype=tl.int32).to(tl.float32)
        if IS_AFFINE:
            offsets = tl.load(w_scales + group * own + 16, mask=is_place, other=0.0)
            of_inputs = tl.sum(a.to(tl.int32), 1).to(tl.float32)
            sums -= of_inputs[:, None] * offsets.to(tl.float32)[None, :]
        total += sums * (of_x[:, None] * of_w[None, :])
    outputs = places - first
    is_wanted = is_place & (outputs >= 0)
    if HAS_BIAS:
        total += tl.load(bias + outputs, mask=is_wanted, other=0.0)[None, :]
    at = out + rows[:, None] * out_features + outputs[None, :]
    tl.store(at, total, mask=is_row[:, None] & is_wanted[None, :])


@triton.jit
def _multiply_raw(
    x,
    weight,
    bias,
    out,
    in_features,
    out_features,
    HAS_BIAS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    outputs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    is_output = outputs < out_features
    rows = weight + outputs.to(tl.int64)[:, None] * in_features
    total = tl.zeros((OUTPUTS, INPUTS), tl.float32)
    for start in range(0, in_features, INPUTS):
        inputs = start + tl.arange(0, INPUTS)
        is_input = inputs < in_features
        a = tl.load(x + inputs, mask=is_input, other=0.0)
        w = tl.load(rows + inputs[None, :], mask=is_output[:, None] & is_input[None, :], other=0.0)
        total += w.to(tl.float32) * a[None, :]
    result = tl.sum(total, 1)
    if HAS_BIAS:
        result += tl.load(bias + outputs, mask=is_output, other=0.0)
    tl.store(out + outputs, result, mask=is_output)

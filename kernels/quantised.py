"""Weights in groups of 8 or 4 bits, and rows of activations in groups of 8.

32 neighbouring inputs share a scale; zeros fill the last group.
    weights, 8 bits   scale = greatest magnitude / 127, rounded up to float16
                      code = round(w / scale) in -127 .. 127
                      w' = code * scale; |w' - w| <= scale / 2
    weights, 4 bits   scale = (the value of greatest magnitude, with its sign) / -8, float16
                      code = round(w / scale) + 8, clamped to 0 .. 15
                      (of two as great the one above zero)
                      w' = (code - 8) * scale, as llama.cpp's q4_0; 4.5 bits per weight in all
                      |w' - w| <= |scale| * 65 / 64 + 2**-21: a whole step only where a value of the
                      other sign is as great
    weights, MXFP4    of 4 bits, as a file has them (OCP Microscaling Formats 1.0, E2M1)
                      scale = 2**(e - 127); code = sign (8) + which of 0, 0.5, 1, 1.5, 2, 3, 4, 6
                      kept is scale / 2, float16, for twice a value is a whole number
    weights, affine   of 4 bits, as files of several formats have them (affine.py)
                      w' = (code - offset) * scale; scale and offset are float16; 5 bits per weight
    activations       scale = greatest magnitude / 127, float32; code = round(x * (127 / greatest))

A weight's outputs lie interleaved, sixteen at a time (a strip; zeros fill the last one): the
products of sixteen outputs are then one stream of addresses, and lanes of a vector are outputs.

Knows no products: matmul.py does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from . import codec, dispatch
from .layout import RAW_DTYPES
from .threads import num_threads

GROUP = 32
STRIP = 16
# Converted at once while quantising, which makes half a dozen such copies: they stay in cache.
QUANTISED_BYTES = 1 << 20
# Groups of activations that are all smaller are zero: 127 / greatest might overflow.
_LEAST = 2.0**-100
# By its code, twice an MXFP4 number.
_TWICE = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


@dataclass(frozen=True)
class QuantisedWeight:
    """A weight (out_features, in_features) in groups of 32 inputs. Made by `quantise_weight`,
    `repack_mxfp4` or `repack_affine`.
    """

    bits: int  # 8 or 4
    in_features: int
    out_features: int
    # int32 (strips, groups * bits, 16 outputs): four bytes each, one above the other in memory.
    # 8 bits: element v of a group is the int8 codes of its inputs 4 v .. 4 v + 3.
    # 4 bits: byte j of a group's 16 is the codes of its inputs j (low half) and j + 16.
    codes: torch.Tensor
    # (strips, groups, 16 outputs) float16; affine: (strips, groups, 2, 16 outputs), offsets second
    scales: torch.Tensor
    first: int = 0  # the first output's place in its strip, where this is a part of another weight
    is_float: bool = False  # codes of 4 bits are MXFP4's
    is_affine: bool = False  # codes of 4 bits have an offset for each group and output

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @property
    def num_bytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def to(self, device) -> QuantisedWeight:
        return self._with(self.out_features, self.codes.to(device), self.scales.to(device))

    def part(self, start: int, stop: int) -> QuantisedWeight:
        """Rows start..stop as a weight of their own, which shares its memory with this one."""
        start, stop = start + self.first, stop + self.first
        strips = slice(start // STRIP, -(-stop // STRIP))
        return self._with(stop - start, self.codes[strips], self.scales[strips], start % STRIP)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows start..stop, decoded: (stop - start, in_features) float32."""
        part = self.part(start, stop)
        num_groups = part.scales.shape[1]
        scales, offsets = part.scales.unbind(2) if self.is_affine else (part.scales, None)
        four = part.codes.transpose(1, 2).contiguous()
        codes = four.view(torch.int8 if self.bits == 8 else torch.uint8)
        if self.bits == 8:
            values = codes.to(torch.float32).unflatten(-1, (num_groups, GROUP))
        else:
            halves = codes.unflatten(-1, (num_groups, GROUP // 2))
            codes = torch.cat((halves & 15, halves >> 4), -1)
            if self.is_float:
                values = codes.new_tensor(_TWICE, dtype=torch.float32)[codes.to(torch.int32)]
            else:
                values = codes.to(torch.float32).sub_(
                    8.0 if offsets is None else _by_output(offsets)
                )
        values.mul_(_by_output(scales))
        values = values.flatten(2).flatten(0, 1)
        return values[part.first : part.first + part.out_features, : self.in_features]

    def _with(self, out_features: int, codes, scales, first: int | None = None) -> QuantisedWeight:
        first = self.first if first is None else first
        return replace(self, out_features=out_features, codes=codes, scales=scales, first=first)


def quantised_shapes(
    shape: tuple[int, ...], bits: int, is_affine: bool = False
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the codes (int32) and of the scales (float16) of a weight (out, in)."""
    num_strips, num_groups = -(-shape[0] // STRIP), -(-shape[1] // GROUP)
    of_scales = num_strips, num_groups, *((2,) if is_affine else ()), STRIP
    return (num_strips, num_groups * bits, STRIP), of_scales


def quantise_weight(
    w: torch.Tensor, bits: int, empty: Callable[..., torch.Tensor] = torch.empty
) -> QuantisedWeight:
    """w (out, in), any float dtype, to groups of 8 or 4 bits, on w's device.

    Without compiled kernels some rows at a time, QUANTISED_BYTES of float32. empty(shape, dtype=,
    device=) gives the memory for the result. Raises ValueError for other bits, FloatingPointError
    for weights that are not finite or whose scale float16 cannot hold.
    """
    if bits not in (4, 8):
        raise ValueError(f"weights can be quantised to 8 or 4 bits, not {bits}")
    if w.dim() != 2:
        raise ValueError(f"a weight is (out, in); this one is {tuple(w.shape)}")
    out_features, in_features = w.shape
    of_codes, of_scales = quantised_shapes((out_features, in_features), bits)
    codes = empty(of_codes, dtype=torch.int32, device=w.device)
    scales = empty(of_scales, dtype=torch.float16, device=w.device)
    native = dispatch.compiled_for(w, codes, scales)
    if native is not None and w.dtype in RAW_DTYPES and w.is_contiguous():
        is_good = native.quantise_weight(
            dispatch.raw_kind(w.dtype),
            w.data_ptr(),
            out_features,
            in_features,
            bits,
            codes.data_ptr(),
            scales.data_ptr(),
            num_threads(),
        )
    else:
        _quantise(w, bits, codes, scales)
        is_good = bool(torch.isfinite(scales).all())
    if not is_good:
        raise FloatingPointError("weights are not finite, or too large to quantise")
    return QuantisedWeight(bits, in_features, out_features, codes, scales)


def repack_mxfp4(
    blocks: torch.Tensor,
    scales: torch.Tensor,
    empty: Callable[..., torch.Tensor] = torch.empty,
    threads: int | None = None,
) -> QuantisedWeight:
    """A weight (out, groups * 32) in MXFP4, as Hugging Face's files have it, to strips.

    blocks (out, groups, 16) uint8: byte j of a group is the codes of its inputs 2 j (low half) and
    2 j + 1. scales (out, groups) uint8: e of 2**(e - 127). Rows may lie apart: where gate and up
    take turns, blocks[0::2] with scales[0::2] is a weight, and read where it lies. empty(shape,
    dtype=, device=) gives the memory for the result. threads: None: as many as torch has.

    Exact for scales of 2**-23 to 2**16. Smaller ones are zero in float16, and so is their group
    then, of which no weight is above 6 * 2**-24. Raises FloatingPointError for a larger one or
    255, which is not a number, whatever the codes are; ValueError for other shapes or dtypes.
    """
    if blocks.dim() != 3 or blocks.shape[2] != GROUP // 2 or scales.shape != blocks.shape[:2]:
        raise ValueError(
            f"MXFP4 is blocks (out, groups, {GROUP // 2}) and scales (out, groups); these are "
            f"{tuple(blocks.shape)} and {tuple(scales.shape)}"
        )
    if blocks.dtype != torch.uint8 or scales.dtype != torch.uint8:
        raise ValueError(f"MXFP4 is of bytes, not {blocks.dtype} and {scales.dtype}")
    out_features, num_groups = scales.shape
    in_features = num_groups * GROUP
    of_codes, of_scales = quantised_shapes((out_features, in_features), 4)
    codes = empty(of_codes, dtype=torch.int32, device=blocks.device)
    halves = empty(of_scales, dtype=torch.float16, device=blocks.device)
    native = dispatch.compiled_for(blocks, scales, codes, halves)
    if native is not None and blocks.stride()[1:] == (GROUP // 2, 1) and scales.stride(1) == 1:
        is_good = native.repack_mxfp4(
            blocks.data_ptr(),
            blocks.stride(0),
            scales.data_ptr(),
            scales.stride(0),
            out_features,
            num_groups,
            codes.data_ptr(),
            halves.data_ptr(),
            num_threads() if threads is None else threads,
        )
    else:
        _repack(blocks, scales, codes, halves)
        is_good = bool(torch.isfinite(halves).all())
    if not is_good:
        raise FloatingPointError("scales of MXFP4 weights are not numbers, or above 2**16")
    return QuantisedWeight(4, in_features, out_features, codes, halves, is_float=True)


def repack_int8(
    words: torch.Tensor,
    scales: torch.Tensor,
    empty: Callable[..., torch.Tensor] = torch.empty,
    *,
    are_unsigned: bool = False,
) -> QuantisedWeight:
    """A weight (out, groups * 32) of codes of 8 bits times scales (out, n), each of which counts
    for a part of the inputs, a multiple of 32, to strips. words: int32 (out, in / 4), the codes of
    four neighbouring inputs from the lowest byte on, in memory that may lie anyhow; are_unsigned:
    128 too much each. empty: see quantise_weight.

    Exact where float16 has the scale, but for a code of -128, which the kernels do not multiply: it
    becomes -127. (Who rounds -127.5, the least of a symmetric 255 steps, could have written
    either.) Raises FloatingPointError for scales that float16 cannot hold, ValueError for other
    shapes or dtypes.
    """
    fits = words.dim() == scales.dim() == 2 and len(words) == len(scales)
    if words.dtype != torch.int32 or not fits or words.shape[1] % (GROUP // 4 * scales.shape[1]):
        raise ValueError(
            f"codes are int32 (out, in / 4) and scales (out, n) with in / n a multiple of {GROUP}, "
            f"not {words.dtype} {tuple(words.shape)} and {tuple(scales.shape)}"
        )
    out_features, in_features = len(words), 4 * words.shape[1]
    of_codes, of_scales = quantised_shapes((out_features, in_features), 8)
    codes = empty(of_codes, dtype=torch.int32, device=words.device)
    halves = empty(of_scales, dtype=torch.float16, device=words.device)
    scale = scales.to(torch.float16).repeat_interleave(of_scales[1] // scales.shape[1], 1)
    into_strips(codes, words)
    into_strips(halves, scale)
    if are_unsigned:
        codes.bitwise_xor_(-(1 << 31) | 0x00808080)
        if out_features % STRIP:
            codes[-1, :, out_features % STRIP :] = 0
    codes.view(torch.int8).clamp_(min=-127)
    if not bool(torch.isfinite(halves).all()):
        raise FloatingPointError("scales are not numbers, or beyond float16")
    return QuantisedWeight(8, in_features, out_features, codes, halves)


def _repack(
    blocks: torch.Tensor, exponents: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor
) -> None:
    powers = [2.0 ** (e - 128) for e in range(256)]
    half_of = torch.tensor(powers, device=blocks.device).to(torch.float16)
    pad = torch.nn.functional.pad
    for strips, rows, missing in strips_at_once(*exponents.shape):
        block = pad(blocks[rows], (0, 0, 0, 0, 0, missing))
        inputs = torch.stack((block & 15, block >> 4), -1).flatten(2)
        bytes_ = inputs[..., : GROUP // 2] | (inputs[..., GROUP // 2 :] << 4)
        scale = half_of[pad(exponents[rows], (0, 0, 0, missing)).to(torch.int32)]
        codes[strips] = interleaved(bytes_.flatten(1).view(torch.int32))
        scales[strips] = interleaved(scale)


def _quantise(w: torch.Tensor, bits: int, codes: torch.Tensor, scales: torch.Tensor) -> None:
    in_features, num_groups = w.shape[1], scales.shape[1]
    encode = _encode8 if bits == 8 else _encode4
    for strips, rows, missing in strips_at_once(len(w), num_groups):
        padding = num_groups * GROUP - in_features
        block = torch.nn.functional.pad(w[rows].to(torch.float32), (0, padding, 0, missing))
        bytes_, scale = encode(block.unflatten(1, (num_groups, GROUP)))
        codes[strips], scales[strips] = interleaved(bytes_.view(torch.int32)), interleaved(scale)


def _by_output(numbers: torch.Tensor) -> torch.Tensor:
    """(strips, groups, STRIP) to (strips, STRIP, groups, 1) float32."""
    return numbers.transpose(1, 2).to(torch.float32).unsqueeze(-1)


def strips_at_once(out_features: int, num_groups: int) -> Iterator[tuple[slice, slice, int]]:
    """Some strips, the rows in them, and how many rows the last lacks, until all have been."""
    step = max(1, QUANTISED_BYTES // (4 * STRIP * max(1, num_groups) * GROUP))
    for start in range(0, out_features, step * STRIP):
        rows = slice(start, min(start + step * STRIP, out_features))
        strips = slice(start // STRIP, -(-rows.stop // STRIP))
        yield strips, rows, strips.stop * STRIP - rows.stop


def interleaved(rows: torch.Tensor) -> torch.Tensor:
    """(strips * STRIP, n) to (strips, n, STRIP)."""
    return rows.unflatten(0, (-1, STRIP)).transpose(1, 2)


def into_strips(out, rows) -> None:
    """rows (strips * STRIP or fewer, n) to out (strips, n, STRIP), both of torch or of numpy; zeros
    for those that lack."""
    whole, rest = divmod(len(rows), STRIP)
    out[:whole] = rows[: whole * STRIP].reshape(whole, STRIP, rows.shape[1]).swapaxes(1, 2)
    out[whole:] = 0
    if rest:
        out[whole, :, :rest] = rows[whole * STRIP :].T


def _encode8(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = codec.half_above(groups.abs().amax(-1) / 127)
    codes = (groups / _divisor(scale)).round_().clamp_(-127, 127)
    return codes.nan_to_num_().to(torch.int8).flatten(1), scale


def _encode4(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    above, below = groups.amax(-1), -groups.amin(-1)
    greatest = torch.where(above >= below, above, -below) + 0.0  # either zero to one
    scale = (greatest / -8).to(torch.float16)
    codes = (groups / _divisor(scale)).round_().add_(8).clamp_(0, 15).nan_to_num_()
    codes = codes.to(torch.uint8)
    low, high = codes[..., : GROUP // 2], codes[..., GROUP // 2 :]
    return (low | (high << 4)).flatten(1), scale


def _divisor(scale: torch.Tensor) -> torch.Tensor:
    """Scales (out, groups) as float32 (out, groups, 1), with 1 for 0: zeros have code zero."""
    wide = scale.to(torch.float32).unsqueeze(-1)
    return torch.where(wide == 0, torch.ones_like(wide), wide)


def rounded_rows(x: torch.Tensor) -> torch.Tensor:
    """x (rows, in) float32 as products with quantised weights see it: every number the nearest
    that its group can hold. A group that is not finite is not afterwards.
    """
    num_groups = -(-x.shape[1] // GROUP)
    groups = torch.nn.functional.pad(x, (0, num_groups * GROUP - x.shape[1]))
    groups = groups.unflatten(1, (num_groups, GROUP))
    greatest = groups.abs().amax(-1, keepdim=True)
    nothing = greatest < _LEAST
    inverse = torch.where(nothing, 0.0, 127.0 / greatest)
    scale = torch.where(nothing, 0.0, greatest / 127.0)
    return ((groups * inverse).round_() * scale).flatten(1)[:, : x.shape[1]]

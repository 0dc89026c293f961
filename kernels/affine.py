"""Weights of 4 bits as files of other programs have them: codes 0 .. 15, and for each group of
inputs a scale and a minimum.

    w = code * scale + minimum    what a file says; where it is (code - zero) * scale, the minimum
                                  is -zero * scale
    w' = (code - offset) * scale  what is kept: offset = -minimum / scale; both are float16

A zero that is a whole number, as of AWQ and GPTQ, is kept as it is, and with a scale that float16
has w' is w. Other offsets are rounded, by 2**-11 of themselves, and scales by 2**-11, so that w' is
off by |w - minimum| * 2**-11 + |minimum| * 2**-11 at most, where float16 holds them. A group whose
scale is nothing in float16 beside its minimum is that minimum throughout, which costs no more than
15 * |scale|.

Knows no files: quantised.py says how strips lie.
"""

from __future__ import annotations

import enum
from collections.abc import Callable

import torch

from . import dispatch
from .quantised import GROUP, QuantisedWeight, interleaved, quantised_shapes, strips_at_once
from .threads import num_threads

# Of 8 outputs that share a word, in the order of their codes from the lowest.
_OUTPUTS_OF_WORD = (0, 2, 4, 6, 1, 3, 5, 7)


class CodeOrder(enum.Enum):
    """Where codes lie: bytes (out, in / 2) or (out, chunks, bytes), uint8, where chunks may lie
    apart, or words, int32, of eight codes from the lowest. In the order of cpu/repack_affine.h.
    """

    EACH = 0  # a byte each: (out, in); its upper half counts for nothing
    PAIRS = 1  # byte j of 16: inputs 2 j (low half) and 2 j + 1
    HALVES = 2  # byte j of 16: inputs j and j + 16
    FAR_HALVES = 3  # byte j of 32: inputs j and j + 32
    WORDS_OF_INPUTS = 4  # (in / 8, out): neighbouring inputs of one output
    WORDS_OF_OUTPUTS = 5  # (in, out / 8): outputs 0, 2, 4, 6, 1, 3, 5, 7 of one input


def repack_affine(
    codes: torch.Tensor,
    scales: torch.Tensor,
    minimums: torch.Tensor | None = None,
    order: CodeOrder = CodeOrder.EACH,
    empty: Callable[..., torch.Tensor] = torch.empty,
    threads: int | None = None,
) -> QuantisedWeight:
    """A weight (out, in) of codes in `order`, and of scales and minimums (out, n) of any float
    dtype, each of which counts for in / n inputs, a multiple of 32. Without minimums w is
    (code - 8) * scale, and the weight of plain 4 bits. empty(shape, dtype=, device=) gives the
    memory for the result; for scales that are not float32 and contiguous others are made, of 4
    bytes. threads: None: as many as torch has.

    Raises FloatingPointError for what float16 cannot hold or is no number; ValueError for other
    shapes or dtypes.
    """
    out_features, in_features = _shape(codes, order)
    num_groups = in_features // GROUP
    is_affine = minimums is not None
    minimums = scales if minimums is None else minimums
    if (
        scales.dim() != 2
        or len(scales) != out_features
        or scales.shape != minimums.shape
        or num_groups % max(1, scales.shape[1])
    ):
        raise ValueError(
            f"scales and minimums of a weight ({out_features}, {in_features}) are ({out_features}, "
            f"n) with in / n a multiple of {GROUP}, not {tuple(scales.shape)} and "
            f"{tuple(minimums.shape)}"
        )
    scales, minimums = (t.to(torch.float32).contiguous() for t in (scales, minimums))
    of_codes, of_halves = quantised_shapes((out_features, in_features), 4, is_affine)
    kept = empty(of_codes, dtype=torch.int32, device=codes.device)
    halves = empty(of_halves, dtype=torch.float16, device=codes.device)
    native = dispatch.compiled_for(codes, scales, minimums, kept, halves)
    if native is not None and codes.stride(-1) == 1:
        chunks = codes.unsqueeze(1) if codes.dim() == 2 else codes
        words = order in (CodeOrder.WORDS_OF_INPUTS, CodeOrder.WORDS_OF_OUTPUTS)
        strides = [stride * codes.element_size() for stride in chunks.stride()]
        is_good = native.repack_affine(
            [codes.data_ptr(), order.value, *strides[:2], 0 if words else chunks.shape[2]],
            scales.data_ptr(),
            minimums.data_ptr() if is_affine else 0,
            scales.shape[1],
            out_features,
            num_groups,
            kept.data_ptr(),
            halves.data_ptr(),
            num_threads() if threads is None else threads,
        )
    else:
        _repack(codes, scales, minimums if is_affine else None, order, kept, halves)
        is_good = bool(torch.isfinite(halves).all())
    if not is_good:
        raise FloatingPointError("scales or minimums are not numbers, or beyond float16")
    return QuantisedWeight(4, in_features, out_features, kept, halves, is_affine=is_affine)


def _shape(codes: torch.Tensor, order: CodeOrder) -> tuple[int, int]:
    """(out, in) of codes that lie as `order` says."""
    words = order in (CodeOrder.WORDS_OF_INPUTS, CodeOrder.WORDS_OF_OUTPUTS)
    if words and codes.dtype == torch.int32 and codes.dim() == 2:
        rows, columns = codes.shape
        is_inputs = order is CodeOrder.WORDS_OF_INPUTS
        out_features, in_features = (columns, 8 * rows) if is_inputs else (8 * columns, rows)
        if in_features % GROUP == 0:
            return out_features, in_features
    elif not words and codes.dtype == torch.uint8 and codes.dim() in (2, 3):
        unit = GROUP if order in (CodeOrder.EACH, CodeOrder.FAR_HALVES) else GROUP // 2
        if codes.shape[-1] % unit == 0:
            return len(codes), codes[:1].numel() * (1 if order is CodeOrder.EACH else 2)
    raise ValueError(
        f"codes of the order {order.name} are not {codes.dtype} {tuple(codes.shape)}; inputs "
        f"are a multiple of {GROUP}"
    )


def _repack(codes, scales, minimums, order, kept, halves) -> None:
    num_groups = halves.shape[1]
    pad = torch.nn.functional.pad
    for strips, rows, missing in strips_at_once(len(scales), num_groups):
        block = codes_of(codes, order, rows).unflatten(1, (num_groups, GROUP))
        scale = scales[rows].to(torch.float16)
        numbers, same = [scale], None
        if minimums is not None:
            least = minimums[rows]
            offset = (-least / scale.to(torch.float32)).to(torch.float16)
            same = (scale == 0) | (torch.isfinite(scale) & ~torch.isfinite(offset))
            numbers = [torch.where(same, least.to(torch.float16), scale), offset]
            numbers[1] = offset.masked_fill(same, 0.0)
        each = [n.repeat_interleave(num_groups // n.shape[1], 1) for n in numbers]
        if same is not None:
            same = same.repeat_interleave(num_groups // same.shape[1], 1)
            block = block.masked_fill(same.unsqueeze(-1), 1)
        bytes_ = block[..., : GROUP // 2] | (block[..., GROUP // 2 :] << 4)
        packed = pad(bytes_.flatten(1), (0, 0, 0, missing)).contiguous()
        kept[strips] = interleaved(packed.view(torch.int32))
        each = [interleaved(pad(n, (0, 0, 0, missing))) for n in each]
        halves[strips] = each[0] if minimums is None else torch.stack(each, 2)


def codes_of(codes: torch.Tensor, order: CodeOrder, rows: slice) -> torch.Tensor:
    """Those of some outputs: (rows, in) uint8. Of words of outputs from a multiple of 8 on."""
    if order is CodeOrder.WORDS_OF_OUTPUTS:
        words = codes[:, rows.start // 8 : -(-rows.stop // 8)]
        shifts = 4 * torch.arange(8, device=codes.device, dtype=torch.int32)
        nibbles = ((words[..., None] >> shifts) & 15).to(torch.uint8)  # (in, words, 8)
        back = torch.tensor(_OUTPUTS_OF_WORD, device=codes.device).argsort()
        return nibbles[..., back].flatten(1).T[: rows.stop - rows.start]
    if order is CodeOrder.WORDS_OF_INPUTS:  # from the lowest byte on, as machines have it
        part, order = codes[:, rows].T.contiguous().view(torch.uint8), CodeOrder.PAIRS
    else:
        part = codes[rows]
    if order is CodeOrder.EACH:
        return part.flatten(1) & 15
    low, high = part & 15, part >> 4
    if order is CodeOrder.PAIRS:
        return torch.stack((low, high), -1).flatten(1)
    width = GROUP // 2 if order is CodeOrder.HALVES else GROUP
    low, high = (half.flatten(1).unflatten(1, (-1, width)) for half in (low, high))
    return torch.cat((low, high), -1).flatten(1)

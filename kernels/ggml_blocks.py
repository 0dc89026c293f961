"""GGUF's blocks that are Ebbtide's own groups but for their places: put into strips.

    Q8_0    float16 scale, 32 int8 codes                     w = code * scale
    Q4_0    float16 scale, 16 bytes of two codes             w = (code - 8) * scale
    MXFP4   a byte e, 16 bytes of two codes                  w = code's number * 2**(e - 127)
    Q4_1    float16 scale and minimum, 16 bytes              w = code * scale + minimum
    Q4_K    256 weights: two float16, 12 bytes of eight      w = code * scale - minimum; each is a
            scales and minimums, 128 bytes of two codes          float16 times a number of six bits

Byte j of 16 holds the codes of inputs j (low half) and j + 16, as quantised.py has them; of Q4_K
byte j of 32 those of j and j + 32. No number of the first three changes, but for a code of -128 in
Q8_0, which llama.cpp never writes and no kernel multiplies: it becomes -127. affine.py says what
becomes of scales and minimums. The numbers of _DECODED, those two among them, the compiled kernels
tell. Knows no files.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from . import dispatch
from .affine import CodeOrder, repack_affine
from .quantised import GROUP, STRIP, QuantisedWeight, into_strips, quantised_shapes
from .threads import num_threads

# In the order of cpu/ggml_blocks.h, with the bytes of a block.
_BLOCK_BYTES = {
    "Q8_0": 34,
    "Q4_0": 18,
    "MXFP4": 17,
    "Q4_1": 20,
    "Q4_K": 144,
    "Q5_K": 176,
    "Q6_K": 210,
    "Q5_0": 22,
    "Q5_1": 24,
    "Q2_K": 84,
    "Q3_K": 110,
    "IQ4_NL": 18,
    "IQ4_XS": 136,
}
_NUMBERS = {kind: place for place, kind in enumerate(_BLOCK_BYTES)}
_DECODED = frozenset(list(_BLOCK_BYTES)[_NUMBERS["Q4_1"] :])
_SUPER = 256  # weights in a block of the kinds that end with K, and of IQ4_XS
_BITS = {"Q8_0": 8, "Q4_0": 4, "MXFP4": 4}
_CHUNK_BYTES = 1 << 20  # of blocks that change places at once: they stay in cache
# Half of MXFP4's scales, by e: its codes are kept as twice their numbers.
_POWERS = torch.tensor([2.0 ** (e - 128) for e in range(256)]).to(torch.float16).numpy()


def block_bits(kind: str) -> int | None:
    """Bits of a code in blocks of a kind; None: that are not Ebbtide's groups."""
    return _BITS.get(kind)


def repack_blocks(
    blocks: torch.Tensor,
    kind: str,
    empty: Callable[..., torch.Tensor] = torch.empty,
    threads: int | None = None,
) -> QuantisedWeight:
    """A weight (out, groups * 32), of its blocks (out, groups, bytes of one) uint8, of Q8_0, Q4_0
    or MXFP4.

    empty(shape, dtype=) gives the memory for the result. threads: None: as many as torch has.
    Scales of MXFP4 are exact from 2**-23 to 2**16; smaller ones are zero. Raises FloatingPointError
    for scales that are not finite in float16; ValueError for other shapes.
    """
    bits, is_float = _BITS[kind], kind == "MXFP4"
    head = 1 if is_float else 2
    if blocks.dtype != torch.uint8 or blocks.shape[2:] != (head + GROUP * bits // 8,):
        raise ValueError(f"{kind} is not of {tuple(blocks.shape)} {blocks.dtype}")
    out_features, num_groups = blocks.shape[:2]
    of_codes, of_scales = quantised_shapes((out_features, num_groups * GROUP), bits)
    codes, scales = empty(of_codes, dtype=torch.int32), empty(of_scales, dtype=torch.float16)
    native = dispatch.compiled_for(blocks, codes, scales)
    if native is not None and blocks.is_contiguous():
        is_good = _repack_native(native, kind, blocks, num_groups, codes, scales, threads)
    else:
        _repack(blocks, bits, is_float, codes, scales)
        is_good = bool(torch.isfinite(scales).all())
    if not is_good:
        raise FloatingPointError(f"scales of {kind} weights are not finite in float16")
    return QuantisedWeight(bits, num_groups * GROUP, out_features, codes, scales, is_float=is_float)


def repack_minimum_blocks(
    blocks: torch.Tensor,
    kind: str,
    empty: Callable[..., torch.Tensor] = torch.empty,
    threads: int | None = None,
) -> QuantisedWeight:
    """The same of Q4_1 or Q4_K, whose blocks are (out, blocks, bytes of one): an affine weight, as
    repack_affine makes it."""
    if blocks.dtype != torch.uint8 or blocks.shape[2:] != (_BLOCK_BYTES[kind],):
        raise ValueError(f"{kind} is not of {tuple(blocks.shape)} {blocks.dtype}")
    native = dispatch.compiled_for(blocks)
    if native is None or not blocks.is_contiguous():
        return repack_affine(*_with_minimums(blocks, kind), empty, threads)
    out_features, num_groups = len(blocks), blocks.shape[1] * (8 if kind == "Q4_K" else 1)
    of_codes, of_scales = quantised_shapes((out_features, num_groups * GROUP), 4, is_affine=True)
    codes, scales = empty(of_codes, dtype=torch.int32), empty(of_scales, dtype=torch.float16)
    if not _repack_native(native, kind, blocks, num_groups, codes, scales, threads):
        raise FloatingPointError("scales or minimums are not numbers, or beyond float16")
    return QuantisedWeight(4, num_groups * GROUP, out_features, codes, scales, is_affine=True)


def is_decoded(kind: str) -> bool:
    """Whether `decode_blocks` serves here."""
    return kind in _DECODED and dispatch.backend() == "compiled"


def decode_blocks(blocks: torch.Tensor, kind: str, threads: int | None = None) -> torch.Tensor:
    """The numbers (out, in) float32 of blocks (out, blocks, bytes of one) uint8 of a kind that
    `is_decoded`, to the bit those of the `gguf` package."""
    blocks = blocks.contiguous()
    if blocks.dtype != torch.uint8 or blocks.shape[2:] != (_BLOCK_BYTES[kind],):
        raise ValueError(f"{kind} is not of {tuple(blocks.shape)} {blocks.dtype}")
    of_block = _SUPER if kind.endswith(("_K", "_XS")) else GROUP
    numbers = torch.empty(len(blocks), blocks.shape[1] * of_block)
    dispatch.compiled().decode_blocks(
        _NUMBERS[kind],
        blocks.data_ptr(),
        len(blocks) * blocks.shape[1],
        numbers.data_ptr(),
        num_threads() if threads is None else threads,
    )
    return numbers


def _repack_native(native, kind, blocks, num_groups, codes, scales, threads) -> bool:
    return native.repack_blocks(
        _NUMBERS[kind],
        blocks.data_ptr(),
        len(blocks),
        num_groups,
        codes.data_ptr(),
        scales.data_ptr(),
        num_threads() if threads is None else threads,
    )


def _repack(
    blocks: torch.Tensor, bits: int, is_float: bool, codes: torch.Tensor, scales: torch.Tensor
) -> None:
    """Some rows at a time, _CHUNK_BYTES of them."""
    num_groups, head = blocks.shape[1], 1 if is_float else 2
    # By numpy: torch takes thirty times as long for bytes and numbers of two bytes that lie apart.
    raw, words, halves = blocks.numpy(), codes.numpy(), scales.numpy()
    step = max(1, _CHUNK_BYTES // (STRIP * max(1, num_groups) * blocks.shape[2]))
    for first in range(0, len(codes), step):
        strips = slice(first, min(first + step, len(codes)))
        rows = raw[first * STRIP : strips.stop * STRIP]
        of_rows = np.ascontiguousarray(rows[..., head:])
        if bits == 8 and (of_rows == 0x80).any():
            of_rows = np.maximum(of_rows.view(np.int8), -127)
        of_rows = of_rows.view(np.int32).reshape(len(rows), -1)
        if is_float:
            scale = _POWERS[rows[..., 0]]
        else:
            scale = np.ascontiguousarray(rows[..., :2]).view(np.float16)[..., 0]
        into_strips(words[strips], of_rows)
        into_strips(halves[strips], scale)


def _with_minimums(
    blocks: torch.Tensor, kind: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, CodeOrder]:
    """Codes, scales, minimums and the order of codes, as repack_affine takes them."""
    # By numpy: torch's threads wait for each other at such small copies.
    raw = blocks.numpy()
    halves = np.ascontiguousarray(raw[..., :4]).view(np.float16).astype(np.float32)
    scale, least = halves[..., :1], halves[..., 1:]
    order, codes = CodeOrder.HALVES, blocks[..., 4:]
    if kind == "Q4_K":
        order, codes = CodeOrder.FAR_HALVES, blocks[..., 16:]
        d, m, both = raw[..., 4:8], raw[..., 8:12], raw[..., 12:16]
        scale = np.concatenate((d & 0x3F, (both & 0x0F) | (d >> 2 & 0x30)), -1) * scale
        least = np.concatenate((m & 0x3F, (both >> 4) | (m >> 2 & 0x30)), -1) * -least
    scales, minimums = (torch.from_numpy(n.reshape(len(raw), -1)) for n in (scale, least))
    return codes, scales, minimums, order

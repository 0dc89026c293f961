"""GGUF's blocks of 32 weights that are Ebbtide's own groups but for their places: put into strips.

    Q8_0    float16 scale, 32 int8 codes                     w = code * scale
    Q4_0    float16 scale, 16 bytes of two codes             w = (code - 8) * scale
    MXFP4   a byte e, 16 bytes of two codes                  w = code's number * 2**(e - 127)

Byte j of 16 holds the codes of inputs j (low half) and j + 16, as quantised.py has them. No number
changes, but for a code of -128 in Q8_0, which llama.cpp never writes and no kernel multiplies: it
becomes -127. Knows no files.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from .quantised import GROUP, STRIP, QuantisedWeight, into_strips, quantised_shapes

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
) -> QuantisedWeight:
    """A weight (out, groups * 32), of its blocks (out, groups, bytes of one) uint8.

    empty(shape, dtype=) gives the memory for the result. Some rows at a time, _CHUNK_BYTES of them.
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
    if not bool(torch.isfinite(scales).all()):
        raise FloatingPointError(f"scales of {kind} weights are not finite in float16")
    return QuantisedWeight(bits, num_groups * GROUP, out_features, codes, scales, is_float=is_float)

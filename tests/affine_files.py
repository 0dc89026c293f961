"""Codes of 4 bits with scales and minimums: drawn, packed in every order that files have, and read
by definition.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from ebbtide.kernels.affine import CodeOrder, repack_affine
from ebbtide.kernels.quantised import QuantisedWeight


def drawn(
    out_features: int, in_features: int, seed: int = 0, group: int = 32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes (out, in) uint8, scales and minimums (out, in / group) float32 that float16 has none
    of."""
    generator = torch.Generator().manual_seed(seed + out_features * in_features)
    shape = out_features, in_features // group
    codes = torch.randint(
        0, 16, (out_features, in_features), generator=generator, dtype=torch.uint8
    )
    scales = torch.rand(shape, generator=generator) * 0.02 + 0.001
    return codes, scales, -scales * torch.rand(shape, generator=generator) * 15


def decoded(
    codes: torch.Tensor, scales: torch.Tensor, minimums: torch.Tensor | None
) -> torch.Tensor:
    """What they say: (out, in) float64."""
    each = codes.shape[1] // scales.shape[1]
    wide = [
        None if n is None else n.double().repeat_interleave(each, 1) for n in (scales, minimums)
    ]
    return (
        (codes.double() - 8) * wide[0] if minimums is None else codes.double() * wide[0] + wide[1]
    )


def packed(codes: torch.Tensor, order: CodeOrder) -> torch.Tensor:
    """Codes (out, in), in / 64 whole, as a file has them: number by number."""
    c = codes.numpy().astype(np.uint32)
    out_features, in_features = c.shape
    if order is CodeOrder.EACH:
        return codes.clone()
    if order is CodeOrder.WORDS_OF_INPUTS:
        words = np.zeros((in_features // 8, out_features), np.uint32)
        for i in range(in_features):
            words[i // 8] |= c[:, i] << np.uint32(4 * (i % 8))
        return torch.from_numpy(words.view(np.int32))
    if order is CodeOrder.WORDS_OF_OUTPUTS:
        words = np.zeros((in_features, out_features // 8), np.uint32)
        for o in range(out_features):
            place = [0, 4, 1, 5, 2, 6, 3, 7][o % 8]
            words[:, o // 8] |= c[o] << np.uint32(4 * place)
        return torch.from_numpy(words.view(np.int32))
    to = np.zeros((out_features, in_features // 2), np.uint8)
    for i in range(in_features):
        if order is CodeOrder.PAIRS:
            byte, half = i // 2, i % 2
        elif order is CodeOrder.HALVES:
            byte, half = i // 32 * 16 + i % 16, i % 32 // 16
        else:
            byte, half = i // 64 * 32 + i % 32, i % 64 // 32
        to[:, byte] |= (c[:, i] << (4 * half)).astype(np.uint8)
    return torch.from_numpy(to)


def drawn_affine(shape: tuple[int, int], seed: int = 0) -> QuantisedWeight:
    """A weight of any number of inputs: the codes of the last group's other inputs must not
    matter."""
    codes, scales, minimums = drawn(shape[0], -(-shape[1] // 32) * 32, seed)
    return replace(repack_affine(codes, scales, minimums), in_features=shape[1])

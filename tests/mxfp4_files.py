"""MXFP4 weights as Hugging Face's files have them: drawn, and read by the format's definition alone
(OCP Microscaling Formats 1.0).
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ebbtide.kernels.quantised import QuantisedWeight, repack_mxfp4


def drawn(
    out_features: int, in_features: int, seed: int = 0, exponents: tuple[int, int] = (118, 124)
) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks (out, groups, 16) and scales (out, groups), uint8, of any codes and of exponents in
    first .. last, plus 127.
    """
    generator = torch.Generator().manual_seed(seed + out_features * in_features)
    shape = out_features, -(-in_features // 32)
    blocks = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
    first, last = exponents
    scales = torch.randint(first, last + 1, shape, generator=generator, dtype=torch.uint8)
    return blocks, scales


def decoded(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """What they say: (out, groups * 32) float64."""
    codes = torch.empty((*scales.shape, 32), dtype=torch.int64)
    codes[..., 0::2], codes[..., 1::2] = blocks % 16, blocks // 16
    sign, exponent, mantissa = codes // 8, codes // 2 % 4, codes % 2
    # An exponent's bias is 1; exponent 0 has no leading one.
    size = torch.where(exponent == 0, mantissa / 2, 2.0 ** (exponent - 1) * (1 + mantissa / 2))
    return ((1 - 2 * sign) * size.double() * 2.0 ** (scales.double() - 127)[..., None]).flatten(1)


def drawn_weight(shape: tuple[int, int], seed: int = 0) -> QuantisedWeight:
    """A weight of any number of inputs. The format has whole groups alone: the codes of the last
    one's other inputs must not matter.
    """
    return replace(repack_mxfp4(*drawn(*shape, seed)), in_features=shape[1])

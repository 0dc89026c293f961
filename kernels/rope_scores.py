"""What a key's bias adds to scores, where pages leave it out.

RoPE turns a bias by its token's position, so q.RoPE_t(b) is a sum of cosines and sines of the
angles t * frequency, one for each pair of elements, with factors that do not depend on t. Angles
are float32 products, as RoPE itself has them.

Knows factors and frequencies, and neither queries nor pages.
"""

from __future__ import annotations

import torch

from . import dispatch


def rope_scores(
    cosines: torch.Tensor,  # (..., pairs) float32: the factors of the cosines
    sines: torch.Tensor,  # (..., pairs) float32
    constant: torch.Tensor,  # (...,) float32
    frequencies: torch.Tensor,  # (pairs,) float32
    start: int,
    count: int,
) -> torch.Tensor:
    """(..., count) float32: the sums at the positions start .. start + count - 1. A number does not
    depend, to the bit, on which others are asked for."""
    native = dispatch.compiled_for(cosines, sines, constant, frequencies)
    if native is None:
        positions = torch.arange(start, start + count, device=frequencies.device)
        angles = frequencies[:, None] * positions.float()
        return cosines @ angles.cos() + sines @ angles.sin() + constant.unsqueeze(-1)
    out = torch.empty((*constant.shape, count))
    parts = [part.contiguous() for part in (cosines, sines, constant, frequencies)]
    native.rope_scores(
        *(part.data_ptr() for part in parts),
        constant.numel(),
        len(frequencies),
        start,
        count,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out

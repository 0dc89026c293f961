"""What a key's bias adds to scores, where pages leave it out.

RoPE turns a bias by its token's position, so q.RoPE_t(b) is a sum of cosines and sines of angles,
one for each pair of elements, with factors that do not depend on t. Tokens are taken a block at a
time: within one, the angle of a pair is that of the block's centre plus so many steps of its
frequency, so that only factors have to be turned to each centre. Slow pairs, nearly all of them,
make a polynomial over the block together; fast ones are looked up in a table.

The bias that pages leave out must be turned by the very same angles (`cos_sin`): those of the
centres are float32 products, as RoPE itself has them, and thousands of radians long.

Knows factors and frequencies, and neither queries nor pages.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from . import dispatch
from .threads import num_threads

BLOCK = 64  # positions
DEGREES = 16  # of a polynomial, 0 and on
# A pair is slow if half a block turns it by no more than this: polynomials are within 1e-7 of its
# cosine and sine then.
SLOW_ANGLE = 4.5


class Turns(NamedTuple):
    """Frequencies, and what a block makes of them.

    frequencies: (pairs,) float32. num_fast: the first pairs, behind which all are slow. table:
    float32, flat: the frequencies, each twice, and zeros to whole sixteens; cosines and sines of
    each fast pair at a block's positions, (num_fast, 2, BLOCK); of each slow pair the polynomial of
    the cosine, which is even, and that of the sine, which is odd, (pairs - num_fast, DEGREES); the
    Chebyshev polynomials that these are made of, (DEGREES, BLOCK). steps: cosines and sines of all
    pairs at a block's positions, (2, BLOCK, pairs) float32.
    """

    frequencies: torch.Tensor
    num_fast: int
    table: torch.Tensor
    steps: torch.Tensor


def block_turns(frequencies: torch.Tensor) -> Turns:
    """Of frequencies (pairs,) float32, radians a position."""
    exact = frequencies.cpu().double()  # not every device has float64
    half = BLOCK // 2
    is_fast = (exact.abs() * half > SLOW_ANGLE).nonzero()
    num_fast = int(is_fast[-1]) + 1 if len(is_fast) else 0
    steps, degrees = torch.arange(-half, half).double(), torch.arange(DEGREES)
    angles = exact[:num_fast, None, None] * steps
    fast = torch.cat([angles.cos(), angles.sin()], 1)
    # Coefficients by the discrete orthogonality of the polynomials.
    nodes = (torch.arange(BLOCK).double() + 0.5) * (math.pi / BLOCK)
    at_nodes = (degrees[:, None] * nodes).cos()
    angles = exact[num_fast:, None] * half * nodes.cos()
    values = torch.where(degrees % 2 == 0, angles.cos()[..., None], angles.sin()[..., None])
    slow = (values * at_nodes.T).sum(1) * torch.where(degrees == 0, 1 / BLOCK, 2 / BLOCK)
    basis = (degrees[:, None] * (steps / half).acos()).cos()
    doubled = exact.repeat_interleave(2)
    doubled = torch.nn.functional.pad(doubled, (0, -len(doubled) % 16))
    table = torch.cat([part.flatten() for part in (doubled, fast, slow, basis)]).float()
    angles = steps[:, None] * exact
    turned = torch.stack([angles.cos(), angles.sin()]).float()
    device = frequencies.device
    return Turns(frequencies, num_fast, table.to(device), turned.to(device))


def cos_sin(turns: Turns, start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines, (count, pairs) float32, of the angles by which a bias is turned at the
    positions start .. start + count - 1."""
    first, last = start // BLOCK, -(-(start + count) // BLOCK)
    centres = torch.arange(first, last, device=turns.steps.device) * BLOCK + BLOCK // 2
    angles = (centres.float()[:, None] * turns.frequencies)[:, None]
    (cosine, sine), (cos_step, sin_step) = (angles.cos(), angles.sin()), turns.steps
    cosines = cosine * cos_step - sine * sin_step  # (blocks, BLOCK, pairs)
    sines = sine * cos_step + cosine * sin_step
    within = slice(start - first * BLOCK, start - first * BLOCK + count)
    return cosines.flatten(0, 1)[within], sines.flatten(0, 1)[within]


def rope_scores(
    cosines: torch.Tensor,  # (..., pairs) float32: the factors of the cosines
    sines: torch.Tensor,  # (..., pairs) float32
    constant: torch.Tensor,  # (...,) float32
    turns: Turns,
    start: int,
    count: int,
) -> torch.Tensor:
    """(..., count) float32: the sums at the positions start .. start + count - 1. A number does not
    depend, to the bit, on which others are asked for."""
    native = dispatch.compiled_for(cosines, sines, constant, turns.table)
    if native is None:
        cosine, sine = cos_sin(turns, start, count)
        return cosines @ cosine.T + sines @ sine.T + constant.unsqueeze(-1)
    out = torch.empty((*constant.shape, count))
    parts = [part.contiguous() for part in (cosines, sines, constant)]
    native.rope_scores(
        *(part.data_ptr() for part in parts),
        turns.table.data_ptr(),
        turns.num_fast,
        constant.numel(),
        len(turns.frequencies),
        start,
        count,
        out.data_ptr(),
        num_threads(),
    )
    return out

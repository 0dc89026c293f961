"""What is computed for each row of a cell alone: norms, products, activations.

A cell is always handled as a whole buffer of cell_tokens rows, of which those are multiplied that
are asked for, from the start of their tile on, so a row's bits depend on its place in the cell at
most.
"""

from __future__ import annotations

import torch

from ..kernels.matmul import ROW_TILE, linear


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) * weight over the last dimension (1910.07467)."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def tiled(x: torch.Tensor, rows: slice, weight, bias=None) -> torch.Tensor:
    """`linear` on `rows` of x (n, in), and on those before them in their tile; the result's others
    are zero.
    """
    if x.shape[0] == 1:
        return linear(x, weight, bias)
    first = rows.start // ROW_TILE * ROW_TILE
    last = max(rows.stop, first + 2)  # the reference has another way for one row
    if first == 0 and last == x.shape[0]:
        return linear(x, weight, bias)
    out = x.new_zeros(x.shape[0], weight.shape[0])
    out[first:last] = linear(x[first:last], weight, bias)
    return out


def activate(x: torch.Tensor, name: str) -> torch.Tensor:
    """silu, gelu or gelu_tanh (2002.05202 compares them as gates)."""
    if name == "silu":
        return torch.nn.functional.silu(x)
    return torch.nn.functional.gelu(x, approximate="tanh" if name == "gelu_tanh" else "none")

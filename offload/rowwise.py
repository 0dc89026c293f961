"""Products of the rows of a cell.

A cell is always handled as a whole buffer of cell_tokens rows, of which those are multiplied that
are asked for, from the start of their tile on, so a row's bits depend on its place in the cell at
most.
"""

from __future__ import annotations

import torch

from ..kernels.matmul import ROW_TILE, linear


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

"""Products of the rows of a cell.

A cell is always handled as a whole buffer of cell_tokens rows, of which those are multiplied that
are asked for, from the start of their tile on, so a row's bits depend on its place in the cell at
most.
"""

from __future__ import annotations

import torch

from ...kernels.matmul import ROW_TILE, linear, linear_heads


def tiled(x: torch.Tensor, rows: slice, weight, bias=None) -> torch.Tensor:
    """`linear` on `rows` of x (n, in), and on those before them in their tile; the result's others
    are zero.
    """
    multiplied = _multiplied(x, rows)
    if multiplied == slice(0, x.shape[0]):
        return linear(x, weight, bias)
    out = x.new_zeros(x.shape[0], weight.shape[0])
    out[multiplied] = linear(x[multiplied], weight, bias)
    return out


def tiled_heads(x: torch.Tensor, rows: slice, weight) -> torch.Tensor:
    """The same of `linear_heads`: x (n, heads, in) to (n, heads, out)."""
    multiplied = _multiplied(x, rows)
    if multiplied == slice(0, x.shape[0]):
        return linear_heads(x, weight)
    out = x.new_zeros(*x.shape[:2], weight.shape[0] // x.shape[1])
    out[multiplied] = linear_heads(x[multiplied], weight)
    return out


def row_means(x: torch.Tensor, rows: slice) -> torch.Tensor:
    """(n, 1): the means of `rows` of x (n, width), as products with ones, whose bits of a row are
    its own; see `tiled`."""
    return tiled(x, rows, x.new_ones(1, x.shape[1])) / x.shape[1]


def _multiplied(x: torch.Tensor, rows: slice) -> slice:
    """The rows of x that are multiplied for the sake of `rows`."""
    if x.shape[0] == 1:
        return slice(0, 1)
    first = rows.start // ROW_TILE * ROW_TILE
    return slice(first, max(rows.stop, first + 2))  # the reference has another way for one row

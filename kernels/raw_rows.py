"""Keys and values of the newest tokens, held in a model's own floats: to and from float32."""

from __future__ import annotations

import torch

from . import dispatch
from .threads import num_threads


def store_rows(x: torch.Tensor, to: torch.Tensor) -> None:
    """x (tokens, heads, head_dim) float32 to `to` (heads, tokens, head_dim), a view each of whose
    heads lies in one piece."""
    native = dispatch.compiled_for(x, to) if x.dtype == torch.float32 else None
    if native is None:
        to.copy_(x.transpose(0, 1))
        return
    assert to.shape == (x.shape[1], x.shape[0], x.shape[2])
    x = x.contiguous()
    native.store_rows(x.data_ptr(), *x.shape, *_place(to), num_threads())


def read_rows(rows: torch.Tensor, to: torch.Tensor) -> None:
    """rows (heads, tokens, head_dim) to `to`, a float32 view of the same shape; each head of either
    lies in one piece."""
    native = dispatch.compiled_for(rows, to)
    if native is None:
        to.copy_(rows)
        return
    assert to.shape == rows.shape and to.dtype == torch.float32 and to.stride(1) == to.shape[2]
    kind, address, head_bytes = _place(rows)
    where = (address, head_bytes, *rows.shape, kind)
    native.read_rows(*where, to.data_ptr(), to.stride(0), num_threads())


def _place(rows: torch.Tensor) -> tuple[int, int, int]:
    """What floats, where, and how many bytes from head to head."""
    assert rows.stride(2) == 1 and rows.stride(1) == rows.shape[2]
    return dispatch.raw_kind(rows.dtype), rows.data_ptr(), rows.stride(0) * rows.element_size()

"""Attention over pages as if each were one token: what bounded decoding does with pages that it
does not read.

A page's weight is its share of the softmax, its value the mean of its values. Where the tokens of a
page weigh the same, that is what attending to all of them gives.

Knows near planes and shares: neither how the shares came about, nor why a page is left out.
"""

from __future__ import annotations

import torch

from . import checks, dispatch
from .attention import Partial
from .layout import PageLayout
from .pages import value_means
from .selection import LeftOut, Shares, leave_out
from .threads import num_threads


def attend_left_out(
    shares: Shares,
    unevenness: torch.Tensor,  # (kv_heads, num_rows, num_pages) float32
    chosen: torch.Tensor,  # (n,) int64: the records that are attended otherwise
    near: torch.Tensor,  # (num_frames, near_record_bytes) uint8: an arena
    rows: torch.Tensor,  # (num_records,) int64: which frames, in the order of records
    layout: PageLayout,
) -> tuple[Partial, LeftOut]:
    """The partial of every query row over the pages of all records but the chosen ones, and what
    is known of them.

    Bits do not depend on the number of threads, nor on where the records lie. Raises ValueError
    for shapes that do not fit, for records that are not there, and for layouts without means of
    values.
    """
    if not (layout.value_means and layout.near_resident):
        raise ValueError("only pages whose near plane is resident and has value_means will do")
    checks.check_rows("near", near, rows, layout.near_record_bytes)
    kv_heads, num_rows, _ = shares.shares.shape
    wanted = (layout.kv_heads, num_rows, len(rows) * layout.pages_per_record)
    checks.check_same("shares", shares.shares, wanted)
    checks.check_same("unevenness", unevenness, wanted)
    if chosen.dtype != torch.int64:
        raise ValueError(f"chosen is {chosen.dtype}; it must be int64")
    native = dispatch.compiled_for(shares.shares, unevenness, chosen, near, rows)
    if native is None or not len(rows):
        left = leave_out(shares.shares, unevenness, chosen, layout.pages_per_record)
        out = torch.bmm(left.shares, value_means(near, rows, layout))
        return Partial(shares.log_total, left.missed, out), left
    left = LeftOut(
        shares.shares.clone(memory_format=torch.contiguous_format),
        *torch.empty((2, kv_heads, num_rows)),
    )
    out = torch.empty((kv_heads, num_rows, layout.head_dim))
    unevenness, chosen = unevenness.contiguous(), chosen.contiguous()
    where = dispatch.addresses(near, rows)
    native.left_out(
        left.shares.data_ptr(),
        unevenness.data_ptr(),
        num_rows,
        where.data_ptr(),
        dispatch.layout_numbers(layout),
        len(rows),
        chosen.data_ptr(),
        len(chosen),
        left.missed.data_ptr(),
        left.misplaced.data_ptr(),
        out.data_ptr(),
        num_threads(),
    )
    return Partial(shares.log_total, left.missed, out), left

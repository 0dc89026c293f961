"""The greatest score that a key within a page's box could have (Tang et al., Quest, 2024).

A box is the least and the greatest number of each channel, which every page's near plane holds; the
bound is the sum over channels of the greater of q times either. It says nothing of the page's mass,
and leaves out what key biases add. Knows near planes and queries alone.
"""

from __future__ import annotations

import torch

from . import checks, dispatch, pages
from .layout import PageLayout
from .threads import num_threads


def bound_pages(
    q: torch.Tensor,  # (kv_heads, num_rows, head_dim) float32, scaled; rotated, if layout.rotate
    near: torch.Tensor,  # (num_frames, near_record_bytes) uint8: an arena
    rows: torch.Tensor,  # (num_records,) int64: which frames, in the order of records
    layout: PageLayout,
) -> torch.Tensor:
    """The bound of every page of the records `rows`, (kv_heads, num_rows, num_pages) float32.

    Raises ValueError for shapes that do not fit, and for pages without a resident near plane of
    codes.
    """
    if layout.is_full or not layout.near_resident:
        raise ValueError("only quantised pages whose near plane is resident have boxes at hand")
    checks.check_queries(q, layout, None, len(rows) * layout.record_tokens)
    checks.check_rows("near", near, rows, layout.near_record_bytes)
    bounds = q.new_empty((*q.shape[:2], len(rows) * layout.pages_per_record))
    native = dispatch.compiled_for(q, near, rows)
    if native is None:
        least, greatest = pages.key_box(near[rows], layout)  # (num_pages, kv_heads, head_dim)
        torch.bmm(q.clamp(min=0), greatest.permute(1, 2, 0), out=bounds)
        return bounds.baddbmm_(q.clamp(max=0), least.permute(1, 2, 0))
    if bounds.numel():
        q, where = q.contiguous(), dispatch.addresses(near, rows)
        native.bound(
            q.data_ptr(),
            q.shape[1],
            where.data_ptr(),
            dispatch.layout_numbers(layout),
            len(rows),
            bounds.data_ptr(),
            num_threads(),
        )
    return bounds

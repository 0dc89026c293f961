"""Attention over pages as if each were one token: what bounded decoding does with pages that it
does not read.

A page's score is its log mass, its value the mean of its values. Where the tokens of a page weigh
the same, that is what attending to all of them gives.

Knows near planes and masses: neither how the masses came about, nor why a page is left out.
"""

from __future__ import annotations

import torch

from . import checks, dispatch
from .attention import UNSEEN, Partial, attend_scores
from .layout import PageLayout
from .pages import value_means


def attend_means(
    log_mass: torch.Tensor,  # (kv_heads, num_rows, num_pages) float32; -inf: not attended
    near: torch.Tensor,  # (num_frames, near_record_bytes) uint8: an arena
    rows: torch.Tensor,  # (num_records,) int64: which frames, in the order of records
    layout: PageLayout,
) -> Partial:
    """The partial of every query row over the pages of the records `rows`.

    Its bits do not depend on the number of threads, nor on where the records lie. Raises ValueError
    for shapes that do not fit and for layouts without means of values.
    """
    if not (layout.value_means and layout.near_resident):
        raise ValueError("only pages whose near plane is resident and has value_means will do")
    checks.check_rows("near", near, rows, layout.near_record_bytes)
    kv_heads, num_rows, _ = log_mass.shape
    wanted = (layout.kv_heads, num_rows, len(rows) * layout.pages_per_record)
    if log_mass.shape != wanted or log_mass.dtype != torch.float32:
        raise ValueError(
            f"log_mass is {log_mass.dtype} {tuple(log_mass.shape)}; it must be float32 {wanted}"
        )
    shape = (kv_heads, num_rows)
    if not log_mass.numel():
        nothing = log_mass.new_zeros(shape)
        return Partial(nothing + UNSEEN, nothing, log_mass.new_zeros((*shape, layout.head_dim)))
    native = dispatch.compiled_for(log_mass, near, rows)
    if native is None:
        return _reference(log_mass, near, rows, layout)
    result = Partial(
        log_mass.new_empty(shape),
        log_mass.new_empty(shape),
        log_mass.new_empty((*shape, layout.head_dim)),
    )
    log_mass, where = log_mass.contiguous(), dispatch.addresses(near, rows)
    native.attend_means(
        log_mass.data_ptr(),
        num_rows,
        where.data_ptr(),
        dispatch.layout_numbers(layout),
        len(rows),
        *(part.data_ptr() for part in result),
        torch.get_num_threads(),
    )
    return result


def _reference(log_mass, near, rows, layout: PageLayout) -> Partial:
    scores = log_mass.clamp(min=UNSEEN)
    is_seen = scores.amax(-1) > UNSEEN
    top, total, out = attend_scores(scores, value_means(near, rows, layout))
    return Partial(top, total * is_seen, out * is_seen.unsqueeze(-1))

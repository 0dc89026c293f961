"""Attention of one decode step over a layer: many spans of sealed pages and the raw tokens, in one
call of the compiled kernels, or in three launches of those for GPUs.

A span's partial, that of the raw tokens and their joining are three functions for those whose spans
come one after the other; `attend_layer` is all of them at once, to the bit the same. Partials are
merged as a binary counter does, the raw tokens last: the order depends on their numbers alone.

Everything comes by address: knows queries, records and runs of raw tokens, and no tiers. There is
no reference here: `paged_attention`, `attention.attend` and `merge` are one, in another order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from . import dispatch
from .attention import Partial, empty_parts
from .layout import PageLayout
from .threads import num_threads


class Records(NamedTuple):
    """Records of consecutive spans: where each near record and each record starts in memory.

    near_at, record_at: (num_records,) int64. visible: the tokens from .. to - 1 of the list that
    count. score_bias: (kv_heads, num_rows, num_tokens) float32 contiguous, or None.
    """

    near_at: torch.Tensor
    record_at: torch.Tensor
    records_per_span: int
    visible: tuple[int, int]
    score_bias: torch.Tensor | None = None


class Raw(NamedTuple):
    """Raw tokens as runs; each run is four numbers: the addresses of its first key and its first
    value of head 0, the bytes from head to head, and its tokens.

    null_scores: (kv_heads, num_rows) float32 contiguous, the score of something without a value
    that each row sees besides, or None. It is learnt (gpt-oss, whose files call it a sink), so that
    a head may attend to nothing; no soft-cap bounds it.
    """

    dtype: torch.dtype
    runs: list[int]
    null_scores: torch.Tensor | None = None

    @property
    def numbers(self) -> tuple[int, list[int], int]:
        """As compiled kernels take them."""
        null_scores = 0 if self.null_scores is None else self.null_scores.data_ptr()
        return dispatch.raw_kind(self.dtype), self.runs, null_scores


def attend_spans(
    q: torch.Tensor,  # (kv_heads, num_rows, head_dim) float32, scaled; rotated, if layout.rotate
    records: Records,
    layout: PageLayout,
    softcap: float,
    parts: Partial,  # the first spans' rows of which are filled
) -> None:
    """The partials of spans, one after the other."""
    gpu = dispatch.gpu_for(q)
    if gpu is not None:
        listed = records.near_at, records.record_at, records.records_per_span, records.visible
        return gpu.spans.attend_spans(q, *listed, records.score_bias, layout, softcap, parts)
    dispatch.compiled().attend_spans(
        q.data_ptr(),
        q.shape[1],
        *_numbers(records, layout),
        softcap,
        *(part.data_ptr() for part in parts),
        num_threads(),
    )


def attend_raw(q: torch.Tensor, raw: Raw, softcap: float, part: Partial) -> None:
    """The partial of the raw tokens. q as in attend_spans, but never rotated."""
    gpu = dispatch.gpu_for(q)
    if gpu is not None:
        return gpu.spans.attend_raw(q, raw.dtype, raw.runs, raw.null_scores, softcap, part)
    kv_heads, num_rows, dim = q.shape
    dispatch.compiled().attend_raw(
        q.data_ptr(),
        kv_heads,
        num_rows,
        dim,
        *raw.numbers,
        softcap,
        *(one.data_ptr() for one in part),
        num_threads(),
    )


def join_parts(parts: Partial) -> torch.Tensor:
    """(kv_heads, num_rows, head_dim): the attention output of the partials of spans, in order,
    and of the raw tokens, which come last. The partials are used up.
    """
    gpu = dispatch.gpu_for(*parts)
    if gpu is not None:
        return gpu.spans.join(parts)[2]
    count, kv_heads, num_rows, dim = parts.out.shape
    out = torch.empty((kv_heads, num_rows, dim))
    dispatch.compiled().join_spans(
        count,
        kv_heads * num_rows,
        dim,
        *(part.data_ptr() for part in parts),
        out.data_ptr(),
        num_threads(),
    )
    return out


def attend_layer(
    q: torch.Tensor,  # (kv_heads, num_rows, head_dim) float32 contiguous, scaled
    page_q: torch.Tensor,  # the same, rotated if layout.rotate
    records: Records,
    layout: PageLayout,
    raw: Raw,
    softcap: float = 0.0,
) -> torch.Tensor:
    """The attention output (kv_heads, num_rows, head_dim) of every row over all of it."""
    if dispatch.gpu_for(q) is not None:
        num_spans = -(-len(records.record_at) // records.records_per_span)
        parts = empty_parts(num_spans + 1, q)
        if num_spans:
            attend_spans(page_q, records, layout, softcap, parts)
        attend_raw(q, raw, softcap, Partial(*(part[-1] for part in parts)))
        return join_parts(parts)
    out = torch.empty_like(q)
    dispatch.compiled().attend_layer(
        q.data_ptr(),
        page_q.data_ptr(),
        q.shape[1],
        *_numbers(records, layout),
        softcap,
        *raw.numbers,
        out.data_ptr(),
        num_threads(),
    )
    return out


def _numbers(records: Records, layout: PageLayout) -> tuple:
    bias = records.score_bias
    return (
        records.near_at.data_ptr(),
        records.record_at.data_ptr(),
        dispatch.layout_numbers(layout),
        len(records.record_at),
        records.records_per_span,
        *records.visible,
        0 if bias is None else bias.data_ptr(),
    )

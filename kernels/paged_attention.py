"""Attention of query rows over sealed pages, without unpacking them: the decode step, and prefill
where that is faster.

One kernel whatever the tier the pages came from. The reference unpacks and attends; the compiled
kernel reads each page once, record by record, and joins the records in order, so that its bits
depend neither on the number of threads nor on where pages lie. `attend_pages` takes records that
lie side by side; `attend_records` any records, each where it lies, one partial for each.

Knows pages and queries, and neither spans, trees nor masks of several rows: every row sees the same
tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from . import checks, dispatch, pages
from .attention import UNSEEN, Partial, attend_scores, cap, empty_parts
from .layout import PageLayout
from .threads import num_threads

# With more rows than these, unpacking and two large products of floats are faster than the compiled
# kernel, unless dispatch.byte_products says otherwise.
FEW_ROWS = 32
TOKEN_BLOCK = 4  # the compiled kernel takes that many tokens of a page at once


def attend_pages(
    q: torch.Tensor,  # (kv_heads, num_rows, head_dim) float32, scaled; rotated, if layout.rotate
    near: torch.Tensor,  # (num_records, near_record_bytes) uint8
    records: torch.Tensor,  # (num_records, record_bytes) uint8
    layout: PageLayout,
    visible: tuple[int, int] | None = None,  # the tokens from .. to - 1; None: all
    score_bias: torch.Tensor | None = None,  # (kv_heads, num_rows, num_tokens) float32, or None
    softcap: float = 0.0,  # the bound of scores, bias included; 0 = none
) -> Partial:
    """The partial of every query row over the visible tokens of the records.

    score_bias is added to the scores q.k: a key bias b_t that pages leave out is q.b_t there.
    Raises ValueError for shapes that do not fit.
    """
    num_tokens = checks.check_records(near, records, layout)
    checks.check_queries(q, layout, score_bias, num_tokens)
    kv_heads, num_rows, _ = q.shape
    start, stop = visible if visible is not None else (0, num_tokens)
    start, stop = max(0, start), min(num_tokens, stop)
    native = dispatch.compiled_for(q, near, records)
    gpu = gpu_for(q, layout) if native is None else None
    if gpu is not None and start < stop:
        parts = empty_parts(1, q)
        rows = torch.arange(len(records), device=q.device)
        at = dispatch.addresses(near, rows), dispatch.addresses(records, rows)
        visible = start, stop
        gpu.spans.attend_spans(q, *at, len(rows), visible, score_bias, layout, softcap, parts)
        return Partial(*(part[0] for part in parts))
    if native is None or not serves(num_rows, layout) or start >= stop:
        return _reference(q, near, records, layout, start, stop, score_bias, softcap)

    q, near, records = q.contiguous(), near.contiguous(), records.contiguous()
    if score_bias is not None:
        score_bias = score_bias.to(torch.float32).contiguous()
    result = Partial(
        torch.empty((kv_heads, num_rows)), torch.empty((kv_heads, num_rows)), torch.empty_like(q)
    )
    rows = torch.arange(len(records))
    near_at, record_at = dispatch.addresses(near, rows), dispatch.addresses(records, rows)
    native.attend_spans(
        q.data_ptr(),
        num_rows,
        near_at.data_ptr(),
        record_at.data_ptr(),
        dispatch.layout_numbers(layout),
        len(records),
        len(records),
        start,
        stop,
        0 if score_bias is None else score_bias.data_ptr(),
        softcap,
        result.max.data_ptr(),
        result.sum.data_ptr(),
        result.out.data_ptr(),
        num_threads(),
    )
    return result


class Source(NamedTuple):
    """Some of the records of a list, and where they lie: record positions[i] is frames[rows[i]]."""

    frames: torch.Tensor  # (num_frames, record_bytes) uint8: an arena, a buffer
    rows: torch.Tensor  # (n,) int64
    positions: torch.Tensor  # (n,) int64


def attend_records(
    q: torch.Tensor,  # (kv_heads, num_rows, head_dim) float32, scaled; rotated, if layout.rotate
    near: torch.Tensor,  # (num_frames, near_record_bytes) uint8: an arena
    near_rows: torch.Tensor,  # (num_records,) int64: the frames of the list's near records
    sources: Sequence[Source | tuple],  # together they hold every record of the list once
    layout: PageLayout,
    skip_first: int = 0,  # tokens of the list's first record that are passed over
    softcap: float = 0.0,  # the bound of scores, bias included; 0 = none
    score_bias: torch.Tensor | None = None,  # (kv_heads, num_rows, num_tokens) float32, or None
) -> Partial:
    """The partial of every query row over each record of a list, each record where it lies.

    All parts have a leading dimension num_records: max and sum (num_records, kv_heads, num_rows),
    out (num_records, kv_heads, num_rows, head_dim). A record's partial does not depend, to the bit,
    on the other records, nor on where any of them lies. num_tokens counts the list's tokens, those
    passed over included. Raises ValueError for shapes that do not fit.
    """
    num_records = len(near_rows)
    checks.check_queries(q, layout, score_bias, num_records * layout.record_tokens)
    kv_heads, num_rows, dim = q.shape
    checks.check_rows("near", near, near_rows, layout.near_record_bytes)
    for source in sources:
        checks.check_rows("frames", source[0], source[1], layout.record_bytes)
    checks.check_positions(sources, num_records)
    result = Partial(
        q.new_empty((num_records, kv_heads, num_rows)),
        q.new_empty((num_records, kv_heads, num_rows)),
        q.new_empty((num_records, kv_heads, num_rows, dim)),
    )
    native = dispatch.compiled_for(q, near, *(source[0] for source in sources))
    gpu = gpu_for(q, layout) if native is None else None
    if gpu is not None and num_records:
        near_at = dispatch.addresses(near, near_rows.to(q.device))
        record_at = torch.empty_like(near_at)
        for frames, rows, positions in sources:
            at = dispatch.addresses(frames, rows.to(q.device))
            record_at[positions.to(q.device)] = at
        given = near_at, record_at, 1, (skip_first, num_records * layout.record_tokens)
        gpu.spans.attend_spans(q, *given, score_bias, layout, softcap, result)
    elif native is None or not serves(num_rows, layout):
        _records_reference(
            q, near, near_rows, sources, layout, skip_first, softcap, score_bias, result
        )
    elif num_records:
        q, near_at = q.contiguous(), dispatch.addresses(near, near_rows)
        record_at = torch.empty_like(near_at)
        for frames, rows, positions in sources:
            record_at[positions] = dispatch.addresses(frames, rows)
        if score_bias is not None:
            score_bias = score_bias.to(torch.float32).contiguous()
        native.attend_records(
            q.data_ptr(),
            num_rows,
            near_at.data_ptr(),
            record_at.data_ptr(),
            dispatch.layout_numbers(layout),
            num_records,
            skip_first,
            0 if score_bias is None else score_bias.data_ptr(),
            softcap,
            result.max.data_ptr(),
            result.sum.data_ptr(),
            result.out.data_ptr(),
            num_threads(),
        )
    return result


def gpu_for(q: torch.Tensor, layout: PageLayout):
    """The kernels for GPUs, where they take such queries and pages; else None."""
    gpu = dispatch.gpu_for(q)
    return gpu if gpu is not None and gpu.spans.serves(layout) else None


def serves(num_rows: int, layout: PageLayout) -> bool:
    """Whether the compiled kernel, where it is, is the fastest for so many rows of such pages."""
    is_taken = layout.page_tokens % TOKEN_BLOCK == 0
    return is_taken and 0 < num_rows and (num_rows <= FEW_ROWS or serves_any(layout))


def serves_any(layout: PageLayout) -> bool:
    """The same for any number of rows."""
    is_taken = layout.page_tokens % TOKEN_BLOCK == 0
    return is_taken and not layout.is_full and dispatch.byte_products()


def _records_reference(
    q, near, near_rows, sources, layout, skip_first, softcap, score_bias, result
) -> None:
    near_rows = near_rows.tolist()
    for frames, rows, positions in sources:
        for row, at in zip(rows.tolist(), positions.tolist(), strict=True):
            first = at * layout.record_tokens
            bias = score_bias
            if bias is not None:
                bias = bias[..., first : first + layout.record_tokens]
            partial = _reference(
                q,
                near[near_rows[at], None],
                frames[row, None],
                layout,
                skip_first if at == 0 else 0,
                layout.record_tokens,
                bias,
                softcap,
            )
            for part, one in zip(result, partial, strict=True):
                part[at] = one


def merge_records(partial: Partial) -> Partial:
    """Joins partials along their leading dimension, first to last."""
    partial = Partial(*(part.contiguous() for part in partial))
    native = dispatch.compiled_for(*partial)
    gpu = dispatch.gpu_for(*partial) if native is None else None
    if gpu is not None:
        return Partial(*gpu.spans.join(partial, is_whole=False))
    if native is not None:
        num_records, kv_heads, num_rows, dim = partial.out.shape
        result = Partial(*(part.new_empty(part.shape[1:]) for part in partial))
        native.merge(
            num_records,
            kv_heads * num_rows,
            dim,
            *(part.data_ptr() for part in partial),
            *(part.data_ptr() for part in result),
            num_threads(),
        )
        return result
    highest = partial.max.new_full(partial.max.shape[1:], UNSEEN)
    for top in partial.max:
        torch.maximum(highest, top, out=highest)
    total = torch.zeros_like(highest)
    out = partial.out.new_zeros(partial.out.shape[1:])
    for top, part_sum, part_out in zip(*partial, strict=True):
        share = torch.exp(top - highest)
        total += part_sum * share
        out += part_out * share.unsqueeze(-1)
    return Partial(highest, total, out)


def _reference(q, near, records, layout: PageLayout, start, stop, score_bias, softcap) -> Partial:
    kv_heads, num_rows, dim = q.shape
    if num_rows == 0 or start >= stop:
        nothing = q.new_zeros((kv_heads, num_rows))
        return Partial(torch.full_like(nothing, UNSEEN), nothing, torch.zeros_like(q))
    k, v = q.new_empty((2, kv_heads, len(records) * layout.record_tokens, dim))
    pages.unpack(near, records, layout, k, v)
    scores = torch.bmm(q, k[:, start:stop].transpose(1, 2))
    if score_bias is not None:
        scores += score_bias[..., start:stop]
    return attend_scores(cap(scores, softcap), v[:, start:stop])

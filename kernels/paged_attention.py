"""Attention of a few query rows over sealed pages, without unpacking them: the decode step.

One kernel whatever the tier the pages came from. The reference unpacks and attends; the compiled
kernel reads each page once, record by record, and joins the records in order, so that its bits
depend neither on the number of threads nor on where pages lie.

Knows pages and queries, and neither spans, trees nor masks of several rows: every row sees the same
tokens.
"""

from __future__ import annotations

import torch

from . import dispatch, pages
from .attention import UNSEEN, Partial, attend_scores, cap
from .layout import PageLayout

# With more rows than these, unpacking and two large products are faster than the compiled kernel.
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
    num_tokens = pages.check_records(near, records, layout)
    kv_heads, num_rows, dim = q.shape
    if (kv_heads, dim) != (layout.kv_heads, layout.head_dim) or q.dtype != torch.float32:
        raise ValueError(
            f"queries are {q.dtype} {tuple(q.shape)}; "
            f"they must be float32 ({layout.kv_heads}, num_rows, {layout.head_dim})"
        )
    if score_bias is not None and score_bias.shape != (kv_heads, num_rows, num_tokens):
        raise ValueError(
            f"score_bias is {tuple(score_bias.shape)}; "
            f"it must be {(kv_heads, num_rows, num_tokens)}"
        )
    start, stop = visible if visible is not None else (0, num_tokens)
    start, stop = max(0, start), min(num_tokens, stop)
    native = dispatch.compiled_for(q, near, records)
    fits = 0 < num_rows <= FEW_ROWS and layout.page_tokens % TOKEN_BLOCK == 0
    if native is None or not fits or start >= stop:
        return _reference(q, near, records, layout, start, stop, score_bias, softcap)

    q, near, records = q.contiguous(), near.contiguous(), records.contiguous()
    if score_bias is not None:
        score_bias = score_bias.to(torch.float32).contiguous()
    result = Partial(
        torch.empty((kv_heads, num_rows)), torch.empty((kv_heads, num_rows)), torch.empty_like(q)
    )
    native.attend(
        q.data_ptr(),
        num_rows,
        near.data_ptr(),
        records.data_ptr(),
        dispatch.layout_numbers(layout),
        len(records),
        start,
        stop,
        0 if score_bias is None else score_bias.data_ptr(),
        softcap,
        result.max.data_ptr(),
        result.sum.data_ptr(),
        result.out.data_ptr(),
        torch.get_num_threads(),
    )
    return result


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

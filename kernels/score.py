"""What the near plane alone says about every page: its share of the softmax, and how it is shared
out among the page's tokens.

A near key lies in the middle of its bin:  k_tc = m_c + w_c * (code_tc - (2**near_bits - 1) / 2),
where m_c is the middle of channel c's box and w_c the width of its bins. Its score is

    s_t = q.m + step * sum_c n_c * (code_tc - (2**near_bits - 1) / 2)

with step = max_c |q_c w_c| / 127 and n_c = round(q_c w_c / step), ties to even: products of whole
numbers, so that codes need not become floats. That rounding is an error far below the codes' own,
and the mean of exp over a bin is not corrected for: both are measured in docs/log.md.

Knows near planes and queries: neither which pages lie where, nor which of them are wanted.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from . import checks, dispatch, pages
from .attention import cap
from .layout import PageLayout
from .threads import num_threads

# The reference unpacks that many tokens at once.
BLOCK_TOKENS = 4096
# Where all |q_c w_c| are below, codes change no score that float32 could tell.
LEAST_GREATEST = 1e-30


class PageScores(NamedTuple):
    """The estimate for every page and query row, (kv_heads, num_rows, num_pages) float32 each.

    log_mass    log of the sum of exp(score) over the page's tokens
    unevenness  half the sum of |w_t - 1/P| over the page's P tokens, w their softmax within the
                page: 0 where all weigh the same, up to 1 - 1/P where one takes it all. The share of
                the page's mass that its mean value attends to in the wrong place.
    """

    log_mass: torch.Tensor
    unevenness: torch.Tensor


def score_pages(
    q: torch.Tensor,  # (kv_heads, num_rows, head_dim) float32, scaled; rotated, if layout.rotate
    near: torch.Tensor,  # (num_frames, near_record_bytes) uint8: an arena
    rows: torch.Tensor,  # (num_records,) int64: which frames, in the order of records
    layout: PageLayout,
    softcap: float = 0.0,  # the bound of scores, bias included; 0 = none
    score_bias: torch.Tensor | None = None,  # (kv_heads, num_rows, num_tokens) float32, or None
) -> PageScores:
    """The estimate of every page of the records `rows`, from near codes alone.

    score_bias is added to the scores q.k: a key bias b_t that pages leave out is q.b_t there.
    Raises ValueError for shapes that do not fit, and for pages without a resident near plane of
    codes.
    """
    if layout.is_full or not layout.near_resident:
        raise ValueError("only quantised pages whose near plane is resident can be scored")
    checks.check_queries(q, layout, score_bias, len(rows) * layout.record_tokens)
    checks.check_rows("near", near, rows, layout.near_record_bytes)
    shape = (*q.shape[:2], len(rows) * layout.pages_per_record)
    result = PageScores(q.new_empty(shape), q.new_empty(shape))
    native = dispatch.compiled_for(q, near, rows)
    if native is None:
        _reference(q, near, rows, layout, softcap, score_bias, result)
    elif result.log_mass.numel():
        q, where = q.contiguous(), dispatch.addresses(near, rows)
        if score_bias is not None:
            score_bias = score_bias.to(torch.float32).contiguous()
        native.score(
            q.data_ptr(),
            q.shape[1],
            where.data_ptr(),
            dispatch.layout_numbers(layout),
            len(rows),
            0 if score_bias is None else score_bias.data_ptr(),
            softcap,
            result.log_mass.data_ptr(),
            result.unevenness.data_ptr(),
            num_threads(),
        )
    return result


def _reference(q, near, rows, layout: PageLayout, softcap, score_bias, result) -> None:
    step = max(1, BLOCK_TOKENS // layout.record_tokens)
    for first in range(0, len(rows), step):
        block = near[rows[first : first + step]]
        scores = _scores(q, block, layout)  # (kv_heads, num_rows, num_pages, P)
        if score_bias is not None:
            start = first * layout.record_tokens
            bias = score_bias[..., start : start + len(block) * layout.record_tokens]
            scores += bias.unflatten(2, (-1, layout.page_tokens))
        cap(scores, softcap)
        at = slice(first * layout.pages_per_record, (first + len(block)) * layout.pages_per_record)
        result.log_mass[..., at] = scores.logsumexp(-1)
        weights = scores.sub_(result.log_mass[..., at].unsqueeze(-1)).exp_()
        result.unevenness[..., at] = weights.sub_(1 / layout.page_tokens).abs_().sum(-1) / 2


def _scores(q, near, layout: PageLayout) -> torch.Tensor:
    """s_t of every page of the near records `near`, (kv_heads, num_rows, num_pages, P)."""
    lo, hi = pages.key_box(near, layout)  # (num_pages, kv_heads, head_dim)
    codes, scale = pages.near_codes(near, layout)  # (num_pages, kv_heads, P, d); (.., 1, d)
    query = q.unsqueeze(0)  # (num_pages, kv_heads, num_rows, d) from here on
    in_bins = query * (scale * 2**layout.far_key_bits)
    greatest = in_bins.abs().amax(-1, keepdim=True)
    per_step = torch.where(greatest > LEAST_GREATEST, greatest.reciprocal() * 127, 0.0)
    whole = (in_bins * per_step).round_()
    # Sums of whole numbers below 2**24: exact, in whatever order.
    sums = torch.matmul(whole, codes.to(torch.float32).transpose(-1, -2))
    sums -= whole.sum(-1, keepdim=True) * ((2**layout.near_bits - 1) / 2)
    middle = torch.matmul(query, ((lo + hi) / 2).unsqueeze(-1))
    return (sums * (greatest / 127) + middle).permute(1, 2, 0, 3)

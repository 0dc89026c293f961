"""What the near plane alone says about every page: its share of the softmax, and how it is shared
out among the page's tokens.

A near key lies in the middle of its bin, and the key it stands for anywhere in the bin. Where that
error is uniform, the score q.k is off by a sum with variance sum_c (q_c w_c)^2 / 12, w_c being the
width of channel c's bins.

Knows near planes and queries: neither which pages lie where, nor which of them are wanted.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from . import checks, pages
from .attention import cap
from .layout import PageLayout

# The reference unpacks that many tokens at once.
BLOCK_TOKENS = 4096


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
    corrected: bool = True,  # False: near keys are taken at their word
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
    kv_heads, num_rows, _ = q.shape
    num_pages = len(rows) * layout.pages_per_record
    log_mass = q.new_empty((kv_heads, num_rows, num_pages))
    unevenness = torch.empty_like(log_mass)
    step = max(1, BLOCK_TOKENS // layout.record_tokens)
    for first in range(0, len(rows), step):
        block = near[rows[first : first + step]]
        scores = torch.bmm(q, pages.near_keys(block, layout).transpose(1, 2))
        if score_bias is not None:
            start = first * layout.record_tokens
            scores += score_bias[..., start : start + scores.shape[2]]
        scores = scores.unflatten(2, (-1, layout.page_tokens))
        if corrected:
            scores -= _variance(q, block, layout).unsqueeze(-1) / 2
        cap(scores, softcap)
        at = slice(first * layout.pages_per_record, (first + len(block)) * layout.pages_per_record)
        log_mass[..., at] = scores.logsumexp(-1)
        weights = scores.sub_(log_mass[..., at].unsqueeze(-1)).exp_()
        unevenness[..., at] = weights.sub_(1 / layout.page_tokens).abs_().sum(-1) / 2
    return PageScores(log_mass, unevenness)


def _variance(q: torch.Tensor, near: torch.Tensor, layout: PageLayout) -> torch.Tensor:
    """Of the error of a page's scores, (kv_heads, num_rows, num_pages)."""
    lo, hi = pages.key_box(near, layout)  # (num_pages, kv_heads, head_dim)
    width = (hi - lo) * (2**layout.far_key_bits / (2**layout.box_bits - 1))
    return torch.bmm(q.square(), width.square().permute(1, 2, 0)) / 12

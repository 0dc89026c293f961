"""The best records of a budget: what selectors with a fixed number of tokens have in common.

Knows no meaning of scores, only that more is better.
"""

from __future__ import annotations

import torch

from .evidence import Evidence


def num_records_of(evidence: Evidence, num_tokens: int) -> int:
    """The records that num_tokens hold, at least one. Raises ValueError without record_tokens."""
    if evidence.record_tokens < 1:
        raise ValueError("a budget in tokens needs evidence that says how many a record holds")
    return max(1, num_tokens // evidence.record_tokens)


def best_records(evidence: Evidence, scores: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` records with the highest scores (num_records,), of those that are there."""
    scores = torch.where(evidence.present(), scores.to(torch.float32), -torch.inf)
    order = scores.sort(dim=-1, descending=True, stable=True).indices[: max(0, count)]
    return order[evidence.present()[order]].sort().values


def page_shares(scores: torch.Tensor) -> torch.Tensor:
    """Softmax over pages (..., num_pages); all zero where no page is there. Makes heads, whose
    scores have nothing in common, comparable.
    """
    return scores.softmax(-1).nan_to_num_(0.0)


def any_head(evidence: Evidence, pages: torch.Tensor) -> torch.Tensor:
    """(kv_heads, num_rows, num_pages) to (num_records,): the greatest of any page and head."""
    records = pages.unflatten(-1, (evidence.num_records, evidence.pages_per_record))
    return records.amax(-1).flatten(0, 1).amax(0)


def check_num_tokens(num_tokens: int) -> int:
    if num_tokens < 1:
        raise ValueError(f"num_tokens is {num_tokens}; a budget holds at least one token")
    return num_tokens

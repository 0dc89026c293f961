"""Selector: the records whose box of keys promises most (after Tang et al., Quest, 2024).

A page's bound is the greatest score that a key within its per-channel minimum and maximum could
have. Theirs takes pages per query head; records hold all heads, so heads are made comparable by a
softmax over pages, and a record counts for the head that wants it most. It ranks: how much mass is
missed, a bound cannot say.
"""

from __future__ import annotations

import torch

from .budget import any_head, best_records, check_num_tokens, num_records_of, page_shares
from .evidence import Evidence


class Quest:
    """num_tokens: how many tokens a step may read per layer. Needs upper_bound in the evidence."""

    def __init__(self, num_tokens: int = 2048):
        self.num_tokens = check_num_tokens(num_tokens)

    def select(self, evidence: Evidence) -> torch.Tensor:
        scores = any_head(evidence, page_shares(bounds(evidence)))
        return best_records(evidence, scores, num_records_of(evidence, self.num_tokens))


def bounds(evidence: Evidence) -> torch.Tensor:
    """The bounds of pages that are there, -inf elsewhere. (kv_heads, num_rows, num_pages)"""
    if evidence.upper_bound is None:
        raise ValueError("ranking by box bounds needs evidence with upper_bound")
    return torch.where(evidence.log_mass > -torch.inf, evidence.upper_bound(), -torch.inf)

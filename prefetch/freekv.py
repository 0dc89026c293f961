"""Selector: what the step before would have chosen, unless the query has turned (after Liu et al.,
FreeKV, 2025). Not verified against its authors' code.

Theirs corrects per KV head; records hold all heads, so one turned head corrects the layer. A page's
score is its box bound, made comparable by a softmax over pages and averaged over the heads.
"""

from __future__ import annotations

import torch

from .budget import best_records, check_num_tokens, num_records_of, page_shares
from .evidence import Evidence
from .quest import bounds


class FreeKV:
    """num_tokens: how many tokens a step may read per layer; least_cosine: below it, a query has
    turned. Needs upper_bound in the evidence; without previous and continuity it corrects always.
    """

    def __init__(self, num_tokens: int = 2048, least_cosine: float = 0.8):
        self.num_tokens, self.least_cosine = check_num_tokens(num_tokens), least_cosine

    def select(self, evidence: Evidence) -> torch.Tensor:
        if evidence.previous is not None and evidence.continuity is not None:
            if bool((evidence.continuity >= self.least_cosine).all()):
                previous = evidence.previous[evidence.previous < evidence.num_records]
                return previous[evidence.present()[previous]]
        scores = evidence.by_record(page_shares(bounds(evidence))).flatten(0, 1).mean(0)
        return best_records(evidence, scores, num_records_of(evidence, self.num_tokens))

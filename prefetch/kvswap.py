"""Selector: the records that hold the best groups of tokens by one score for all heads, in a
low-rank basis of the keys (after Zhang et al., KVSwap, 2511.11907). Not verified by running its
authors' code.

Theirs projects a layer's keys, all KV heads side by side, onto the strongest directions of a
calibration text, and queries likewise, averaged over each group and then over the heads: the whole
layer has a single score for each token. Groups of 4 tokens count by their best one, the 400 best
tokens are read, for the query that the layer before rehearsed, and the true query is never asked.
Here a group brings its whole record, so going down the groups until the budget is full is taking
the records with the best tokens, whatever the size of a group.
"""

from __future__ import annotations

import torch

from .budget import best_records, check_num_tokens, num_records_of
from .evidence import Evidence


class KVSwap:
    """num_tokens: how many tokens a step may read per layer. Needs joint_score in the evidence."""

    def __init__(self, num_tokens: int = 2048):
        self.num_tokens = check_num_tokens(num_tokens)

    def select(self, evidence: Evidence) -> torch.Tensor:
        if evidence.joint_score is None:
            raise ValueError("ranking by a score that all heads share needs evidence that has one")
        pages = (evidence.log_mass > -torch.inf).any(0).any(0)
        scores = torch.where(pages, evidence.joint_score(), -torch.inf)
        records = scores.unflatten(-1, (evidence.num_records, evidence.pages_per_record)).amax(-1)
        return best_records(evidence, records, num_records_of(evidence, self.num_tokens))

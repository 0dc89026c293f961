"""Selector: what a rehearsed query finds within `alpha` of its best score (after Lee et al.,
InfiniGen, 2024). Not verified against its authors' code.

Theirs takes tokens, per head, as many for each head as pass on average, and reads a shared
maximum of head 0; here records pass, every head is held to its own maximum, and heads vote for
what the layer takes. The true query is never asked: that is what it is compared for.
"""

from __future__ import annotations

import torch

from .budget import best_records
from .evidence import Evidence


class InfiniGen:
    """alpha: in units of scores; most: of all records, the share that a step may read at most.
    Needs rehearsed_log_mass in the evidence.
    """

    def __init__(self, alpha: float = 4.0, most: float = 0.2):
        if alpha < 0 or not 0 < most <= 1:
            raise ValueError(f"alpha is {alpha}, most {most}; they must be >= 0 and in (0, 1]")
        self.alpha, self.most = alpha, most

    def select(self, evidence: Evidence) -> torch.Tensor:
        if evidence.rehearsed_log_mass is None:
            raise ValueError("selecting by a rehearsed query needs evidence that has one")
        if not evidence.num_records:
            return torch.empty(0, dtype=torch.int64, device=evidence.log_mass.device)
        pages = torch.where(
            evidence.log_mass > -torch.inf, evidence.rehearsed_log_mass, -torch.inf
        ).unflatten(-1, (evidence.num_records, evidence.pages_per_record))
        records = pages.logsumexp(-1).flatten(0, 1)  # (query heads, num_records)
        best = records.amax(-1, keepdim=True)
        passed = (records > best - self.alpha).sum(-1).to(torch.float32).mean()
        count = min(int(passed), int(self.most * evidence.num_records))
        wanted = records.sort(dim=-1, descending=True, stable=True).indices[:, : max(1, count)]
        votes = torch.zeros_like(records).scatter_(-1, wanted, 1.0).sum(0)
        # Where votes are equal, the mass that heads expect there decides; it is less than a vote.
        share = records.softmax(-1).nan_to_num_(0.0).mean(0)
        return best_records(evidence, votes + share / 2, max(1, count))

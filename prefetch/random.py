"""Selector: records drawn at random, the same for the same seed and number of records.

Looks at no estimate. What an equal number of bytes buys without knowing anything.
"""

from __future__ import annotations

import torch

from .budget import best_records, check_num_tokens, num_records_of
from .evidence import Evidence


class Random:
    """num_tokens: how many tokens a step may read per layer."""

    def __init__(self, num_tokens: int = 2048, seed: int = 0):
        self.num_tokens, self.seed = check_num_tokens(num_tokens), seed

    def select(self, evidence: Evidence) -> torch.Tensor:
        drawn = torch.Generator().manual_seed(self.seed)
        scores = torch.rand(evidence.num_records, generator=drawn).to(evidence.log_mass.device)
        return best_records(evidence, scores, num_records_of(evidence, self.num_tokens))

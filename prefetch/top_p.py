"""Selector: the fewest records that keep within a bound what attention gets wrong.

What a query head gets wrong is the sum, over the pages outside the selection, of

"mass"       their mass: dropping them would move that much of the softmax
"misplaced"  mass times unevenness: so much is in the wrong place when a page is replaced by its
             mean value. Heads that average need no page for it, heads that point need the page
             they point at
"effect"     misplaced mass times what a unit of it does to the residual stream; as "misplaced"
             where the evidence does not say

Heads add in quadrature, so no head is wrong by more than epsilon either. Knows nothing of what is
resident or on its way.
"""

from __future__ import annotations

import torch

from ..kernels.selection import choose_records
from .evidence import Evidence

CRITERIA = ("mass", "misplaced", "effect")


class TopP:
    """epsilon: how much may be wrong, 0..1, in units of the criterion."""

    def __init__(self, epsilon: float = 0.1, criterion: str = "effect"):
        if not 0 <= epsilon <= 1:
            raise ValueError(f"epsilon is {epsilon}; it must be a share, 0 to 1")
        if criterion not in CRITERIA:
            raise ValueError(f"unknown criterion {criterion!r}; known: {', '.join(CRITERIA)}")
        self.epsilon, self.criterion = epsilon, criterion

    def select(self, evidence: Evidence) -> torch.Tensor:
        return (
            choose_records(
                evidence.shares.shares,
                None if self.criterion == "mass" else evidence.unevenness,
                evidence.effect if self.criterion == "effect" else None,
                evidence.pages_per_record,
                self.epsilon,
            )
            .sort()
            .values
        )

"""Selector: the fewest records that keep within a bound what attention gets wrong.

What a query head gets wrong is the sum, over the pages outside the selection, of

"mass"       their mass: dropping them would move that much of the softmax
"misplaced"  mass times unevenness: so much is in the wrong place when a page is replaced by its
             mean value. Heads that average need no page for it, heads that point need the page
             they point at
"effect"     misplaced mass times what a unit of it does to the residual stream; as "misplaced"
             where the evidence does not say

Heads add in quadrature, so no head is wrong by more than epsilon either. All heads share one order
of records, by what all of them together would get wrong: sets of their own, joined, hold a tenth
more for the same result. Knows nothing of what is resident or on its way.
"""

from __future__ import annotations

import torch

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
        cost = costs(evidence, self.criterion)  # (query heads, num_records)
        order = in_order(cost.cumsum(0)[-1])
        # What is left outside if the selection stops before this record; summed from the small end.
        left = cost[:, order].flip(-1).cumsum(-1).flip(-1)
        wrong = (left**2).cumsum(0)[-1].sqrt()
        return order[: int((wrong > self.epsilon).sum())].sort().values


def costs(evidence: Evidence, criterion: str) -> torch.Tensor:
    """(query heads, num_records): what each head gets wrong without each record."""
    pages = evidence.shares()
    if criterion != "mass":
        # A page that is not there has no unevenness that means anything.
        pages = torch.where(pages > 0, pages * evidence.unevenness, 0.0)
    if criterion == "effect" and evidence.effect is not None:
        pages = pages * evidence.effect.unsqueeze(-1)
    return evidence.by_record(pages).flatten(0, 1)


def in_order(wanted: torch.Tensor) -> torch.Tensor:
    """Record numbers by falling `wanted` (num_records,), ties to the lowest."""
    return wanted.sort(dim=-1, descending=True, stable=True).indices

"""Selector: the fewest records that keep what every query head gets wrong within a bound.

"mass"       bounds the estimated mass outside the selection: what dropping it would get wrong
"misplaced"  bounds mass times unevenness: what replacing a page by its mean value gets wrong. Heads
             that average need no page for it, heads that point need the page they point at

Each head takes its records from the costliest down until the rest is within epsilon; the layer
takes what any head takes. Knows nothing of what is resident or on its way.
"""

from __future__ import annotations

import torch

from .evidence import Evidence

CRITERIA = ("mass", "misplaced")


class TopP:
    """epsilon: the share of mass, 0..1, that may be wrong in any query head."""

    def __init__(self, epsilon: float = 0.02, criterion: str = "misplaced"):
        if not 0 <= epsilon <= 1:
            raise ValueError(f"epsilon is {epsilon}; it must be a share, 0 to 1")
        if criterion not in CRITERIA:
            raise ValueError(f"unknown criterion {criterion!r}; known: {', '.join(CRITERIA)}")
        self.epsilon, self.criterion = epsilon, criterion

    def select(self, evidence: Evidence) -> torch.Tensor:
        pages = evidence.shares()
        if self.criterion == "misplaced":
            pages = pages * evidence.unevenness
        cost = evidence.by_record(pages).flatten(0, 1)  # (query heads, num_records)
        cost, order = cost.sort(
            dim=-1, descending=True, stable=True
        )  # stable: ties to the lowest id
        # What is left outside if a head stops before this record; summed from the small end.
        left = cost.flip(-1).cumsum(-1).flip(-1)
        wanted = torch.zeros_like(cost, dtype=torch.bool).scatter_(-1, order, left > self.epsilon)
        return wanted.any(0).nonzero().flatten()

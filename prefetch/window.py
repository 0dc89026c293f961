"""Selector: the newest records only, beside the first page and the raw window, which are always
attended (Xiao et al., StreamingLLM, 2023). Looks at no estimate: the least that others must beat.
"""

from __future__ import annotations

import torch

from .evidence import Evidence


class Window:
    """num_tokens: how far back beyond the raw keys; 0 for those alone."""

    def __init__(self, num_tokens: int = 0):
        if num_tokens < 0:
            raise ValueError(f"num_tokens is {num_tokens}; a window is not negative")
        self.num_tokens = num_tokens

    def select(self, evidence: Evidence) -> torch.Tensor:
        there = evidence.present().nonzero().flatten()
        count = self.num_tokens // max(1, evidence.record_tokens)
        return there[max(0, len(there) - count) :]

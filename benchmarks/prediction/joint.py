"""One score for all heads of a layer, in a basis of low rank of its keys: KVSwap's (2511.11907).

The basis is that of the text itself, which theirs, fitted to other texts, cannot be better than.
"""

from __future__ import annotations

import torch
from view import View

RANK_SHARE = 1 / 8  # of all heads' channels: 128 of an 8B model's 1,024


class JointKeys:
    """keys: (kv_heads, num_tokens, d) of a layer, after RoPE."""

    def __init__(self, keys: torch.Tensor):
        rows = keys.transpose(0, 1).flatten(1)  # (num_tokens, kv_heads * d)
        _, vectors = torch.linalg.eigh(rows.T @ rows)  # by rising eigenvalue
        self.basis = vectors[:, -max(1, round(RANK_SHARE * rows.shape[1])) :]
        self.keys = rows @ self.basis  # (num_tokens, rank)

    def scores(self, view: View) -> torch.Tensor:
        """(num_rows, num_pages): the best token's of each page, for the mean query of all heads."""
        size = view.sealed.near.page_tokens
        query = view.queries.mean(2).transpose(0, 1).flatten(1) / view.kv_heads
        tokens = query @ self.basis @ self.keys[: view.num_pages * size].T
        return tokens.unflatten(1, (-1, size)).amax(-1)

"""When to rehearse a layer: before the attention of the layer before it, or after.

early  from the residual that enters the layer before: its attention and MLP hide the reads
late   from the residual after that layer's attention: only its MLP hides them, but the query is
       nearer to what it will be

In the first layers attention changes the residual so much that an early rehearsal says little
(cosine to the true query below 0.4), in later ones it is as good as a late one. Which holds is
learnt from the first tokens, and looked at again from time to time. Costs time if wrong, nothing
else.
"""

from __future__ import annotations

import torch

GOOD_COSINE = 0.9
LOOK_TOKENS = 8  # tokens in a row in which both points are compared ...
LOOK_EVERY = 256  # ... once in so many


class IssuePoint:
    """Of each layer of one model. Layers begin late."""

    def __init__(self):
        self._early: dict[int, bool] = {}
        self._guesses: dict[int, torch.Tensor] = {}
        self._cosines: dict[int, list[float]] = {}

    def is_early(self, layer: int) -> bool:
        return self._early.get(layer, False)

    def is_looking(self, position: int) -> bool:
        """Whether early queries are to be made for comparison at this position."""
        return position % LOOK_EVERY < LOOK_TOKENS or not self._early

    def guess(self, layer: int, query: torch.Tensor) -> None:
        """An early query of a layer, (kv_heads, num_rows, head_dim)."""
        self._guesses[layer] = query

    def compare(self, layer: int, query: torch.Tensor) -> None:
        """The true query: settles the layer's point when enough guesses have been compared."""
        guess = self._guesses.pop(layer, None)
        if guess is None:
            return
        seen = self._cosines.setdefault(layer, [])
        seen.append(float(torch.nn.functional.cosine_similarity(guess, query, dim=-1).mean()))
        if len(seen) >= LOOK_TOKENS:
            self._early[layer] = sum(seen) / len(seen) >= GOOD_COSINE
            seen.clear()

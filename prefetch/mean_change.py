"""What layers add to the residual, on average: a rehearsal adds it in advance.

A rehearsed query is that of a residual to which something more will be added before the layer: an
MLP, or a whole layer. A good part of that is the same for every token: in the built-in model the
mean is 0.5 to 0.8 as large as what an MLP adds. Costs time if wrong, nothing else.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch

OVER_TOKENS = 64  # what is older counts ever less


class MeanChange:
    """Means by key: a layer, and from where it is rehearsed."""

    def __init__(self):
        self._means: dict[Hashable, torch.Tensor] = {}
        self._counts: dict[Hashable, int] = {}

    def add_to(self, key: Hashable, residual: torch.Tensor) -> torch.Tensor:
        """A residual as it is expected to be at the layer; of the same shape."""
        mean = self._means.get(key)
        return residual if mean is None else residual + mean

    def note(self, key: Hashable, change: torch.Tensor) -> None:
        """What was added in one token."""
        mean = self._means.get(key)
        if mean is None:
            mean = self._means[key] = torch.zeros_like(change)
        count = self._counts[key] = min(self._counts.get(key, 0) + 1, OVER_TOKENS)
        mean.lerp_(change, 1 / (count + 1))  # as if there had been one token without any change

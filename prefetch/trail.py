"""What a sequence's layers selected: a step ago, and ever. One per sequence.

It serves predictions and reports; no choice depends on it.
"""

from __future__ import annotations

import numpy as np
import torch


class Trail:
    """By layer. last: the records that were selected a step ago, ascending, (k,) int64; standing:
    raw_log_mass and effect, as in Evidence, of the latest query that went layer by layer;
    rehearsed: log masses that the latest rehearsal found.
    """

    def __init__(self):
        self.last: dict[int, torch.Tensor] = {}
        self.standing: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.rehearsed: dict[int, torch.Tensor] = {}
        self._ever: dict[int, np.ndarray] = {}  # (num_records,) bool

    def note(
        self,
        layer: int,
        selected: torch.Tensor,
        attended: torch.Tensor,
        num_records: int,
    ) -> None:
        """A layer of `num_records` records selected some, and attends to those that are there."""
        self.last[layer] = selected
        ever = self._ever.get(layer)
        if ever is None or len(ever) != num_records:
            kept = np.zeros(num_records, dtype=bool)
            if ever is not None:
                count = min(len(ever), num_records)
                kept[:count] = ever[:count]
            self._ever[layer] = ever = kept
        ever[attended.cpu().numpy()] = True

    def never_selected(self) -> dict[int, int]:
        """By layer: how many of its records no step has attended to yet."""
        return {layer: int((~ever).sum()) for layer, ever in self._ever.items()}

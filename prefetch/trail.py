"""What a sequence's layers selected: a step ago, and ever. One per sequence.

It serves predictions and reports; no choice depends on it.
"""

from __future__ import annotations

import numpy as np
import torch


class Trail:
    """By layer. last: the records that were selected a step ago, ascending, (k,) int64;
    raw_log_mass: (kv_heads, num_rows) of that step, as in Evidence.
    """

    def __init__(self):
        self.last: dict[int, torch.Tensor] = {}
        self.raw_log_mass: dict[int, torch.Tensor] = {}
        self._ever: dict[int, np.ndarray] = {}  # (num_records,) bool

    def note(
        self, layer: int, selected: torch.Tensor, raw_log_mass: torch.Tensor, num_records: int
    ) -> None:
        """A layer of `num_records` records attends to `selected`."""
        self.last[layer], self.raw_log_mass[layer] = selected, raw_log_mass
        ever = self._ever.get(layer)
        if ever is None or len(ever) != num_records:
            kept = np.zeros(num_records, dtype=bool)
            if ever is not None:
                count = min(len(ever), num_records)
                kept[:count] = ever[:count]
            self._ever[layer] = ever = kept
        ever[selected.cpu().numpy()] = True

    def never_selected(self) -> int:
        """Records of all layers that no step has selected yet."""
        return sum(int((~ever).sum()) for ever in self._ever.values())

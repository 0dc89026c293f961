"""Predictor: what the layer used last time, in that order.

For passes that attend to a selection: neighbouring tokens select much the same pages. Knows span
numbers only.
"""

from __future__ import annotations

from collections.abc import Sequence

from .in_order import InOrder


class History(InOrder):
    """Last time's spans, then those that have come into being since (the newest are wanted most).

    A layer without a history gets every span in order.
    """

    def __init__(self):
        self._last: dict[int, list[int]] = {}

    def predict(self, layer: int, num_spans: int) -> list[int]:
        last = self._last.get(layer)
        if not last:
            return super().predict(layer, num_spans)
        return [s for s in last if s < num_spans] + list(range(max(last) + 1, num_spans))

    def record(self, layer: int, spans: Sequence[int]) -> None:
        self._last[layer] = list(dict.fromkeys(spans))

"""How many spans of pages a request comes to have, by layer: what the planner counts, in numbers
alone.
"""

from __future__ import annotations

from functools import cache

from .geometry import Geometry
from .model_config import ModelConfig
from .windows import Windows


class PageSpans:
    """Of a request of `context` tokens in as many sequences, whose prefill takes some cells at once
    (`sweep`)."""

    def __init__(self, config: ModelConfig, geometry: Geometry, context: int, sequences: int):
        self._config, self._geometry = config, geometry
        self._context, self._sequences = context, sequences
        layers = range(config.num_page_layers)
        self._layouts = geometry.layouts(layers)
        self._at_once = list(map(geometry.spans_at_once, layers))
        self._windows = Windows(config, geometry)
        self.most = cache(self._most)

    @property
    def keeping(self) -> list[int]:
        """The layers that keep all their pages."""
        return [n for n in range(len(self._layouts)) if not self._windows.bounds(n)]

    def _most(self, sweep: int) -> list[int | None]:
        """See Windows.most_spans."""
        return self._windows.most_spans(self._context, sweep, self._sequences)

    def total(self, sweep: int) -> int:
        """Of all layers at the end, what forks copy aside."""
        whole = self._geometry.num_spans(self._context)
        kept = zip(self._at_once, self.most(sweep), strict=True)
        return sum(whole * at_once if most is None else most for at_once, most in kept)

    def of_windows(self, sweep: int) -> int:
        """Of the layers that keep what their windows show."""
        return sum(most or 0 for most in self.most(sweep))

    @property
    def spare(self) -> int:
        """What forks copy of the layers that keep all pages."""
        if not self._geometry.num_spans(self._context):
            return 0
        return sum(self._geometry.spare_spans(layer, self._sequences) for layer in self.keeping)

    def near_bytes(self, sweep: int) -> int:
        sealed, total = self._geometry.sealed_tokens(self._context), 0
        for layout, most in zip(self._layouts, self.most(sweep), strict=True):
            tokens = sealed if most is None else most * self._geometry.span_tokens_of(layout)
            total += int(min(sealed, tokens) * layout.near_bytes_per_token)
        return total

    def seen(self, layer: int, length: int) -> int:
        """How many of a layer a token behind `length` others sees; through a window the last."""
        spans = self._geometry.num_spans(length) * self._at_once[layer]
        window = self._config.page_windows[layer]
        if window is None:
            return spans
        tokens = self._geometry.span_tokens_of(self._layouts[layer])
        return min(spans, window // tokens + 2) if self._windows.keeps_pages(layer) else 0

    def attended_share(self, sweep: int) -> float:
        """Of all spans, how many the last token attends to where none are selected: those that
        layers share for each of them."""
        attended = sum(self.seen(layer, self._context) for layer in self._config.kv_pages)
        return attended / max(1, self.total(sweep))

    def walked(self, sweep: int) -> int:
        """By all sweeps of prefill."""
        ends = range(0, self._context, sweep * self._geometry.cell_tokens)
        return sum(self.seen(layer, end) for end in ends for layer in range(len(self._layouts)))

"""What layers with a sliding window keep of their pages: those that a query may still see.

    tokens    0 ................ [ seen from the oldest place to go on ][ raw cells ]
    entries   None, None, ...    extents

A sequence can go on from wherever its raw cells allow it (`Sequence.resume_point`), and from its
snapshots; what queries see from none of these places is let go of, whichever tier it lies in. Where
a window lies within the raw cells, pages are not even made. All layers that keep pages of a window
keep those of the widest, and spans as long as the longest of any layer, so that all keep the same
tokens. Chunks are kept as windows of their size are, which show no less. Computes numbers;
`sequences` drops.
"""

from __future__ import annotations

from ..models.model_config import ModelConfig
from ..running.sequence import Sequence, raw_slots
from .geometry import Geometry

_ENDLESS = 1 << 62


def first_seen(position, window: int, in_chunks: bool):
    """The first token that a query at `position`, or at each of a tensor of positions, sees; below
    0 where that is before the first one. in_chunks: see ModelConfig.chunked."""
    return position - position % window if in_chunks else position - window + 1


class Windows:
    """Of the layers that keep pages, by their numbers among those."""

    def __init__(self, config: ModelConfig, geometry: Geometry):
        self._geometry, self._windows = geometry, config.page_windows
        self._span_cells = geometry.most_span_tokens // geometry.cell_tokens
        self._at_once = list(map(geometry.spans_at_once, range(config.num_page_layers)))
        wide = (w for n, w in enumerate(self._windows) if w is not None and self.keeps_pages(n))
        self._widest = max(wide, default=1)

    def bounds(self, layer: int) -> bool:
        """Whether the layer keeps only so many of its newest pages."""
        return self._windows[layer] is not None

    def keeps_pages(self, layer: int) -> bool:
        """Whether the layer ever attends to sealed pages: raw are two cells, and a window may be
        within them."""
        window = self._windows[layer]
        return window is None or window > self._geometry.cell_tokens + 1

    def first_span(self, cell: int) -> int:
        """The first span, of the longest ones, that queries of a cell and behind it see."""
        first_cell = max(0, cell - self._cells_before)
        return first_cell // self._span_cells

    def spans_seen(self, layer: int, sequence: Sequence) -> list[range]:
        """The spans of the layer that a sequence's queries may still see: from where it is, with as
        many behind it as there will be, and from its snapshots."""
        first, at_once = self.first_span(sequence.oldest_raw_cell + 1), self._at_once[layer]
        seen = [range(first * at_once, _ENDLESS)]
        records = self._geometry.records_per_span * at_once
        for snapshot in sequence.snapshots:
            first = self.first_span(snapshot.oldest_raw_cell + 1)
            stop = -(-snapshot.sealed_records[layer] // records)
            seen.append(range(first * at_once, stop * at_once))
        return seen

    def most_spans(self, context: int, sweep_cells: int, sequences: int) -> list[int | None]:
        """The most spans that each layer has at a time, None of one that keeps all. sequences: how
        many may look back from different places, snapshots included."""
        # From the first that the second of the raw cells sees to the one before the last but one.
        cells = max(1, self._cells_before + raw_slots(sweep_cells) - 3)
        spans = sequences * ((cells + self._span_cells - 2) // self._span_cells + 1)
        most: list[int | None] = []
        for layer, at_once in enumerate(self._at_once):
            whole = self._geometry.num_spans(context) * at_once
            if whole:
                whole += self._geometry.spare_spans(layer, sequences)
            bounded = min(spans * at_once, whole) if self.keeps_pages(layer) else 0
            most.append(bounded if self.bounds(layer) else None)
        return most

    def most_shown(self, layer: int) -> int | None:
        """How many spans of the layer a token sees at most; None where it may see all."""
        window = self._windows[layer]
        if window is None:
            return None
        layout = self._geometry.layout_of(layer)
        tokens = self._geometry.span_tokens_of(layout)
        return window // tokens + 2 if self.keeps_pages(layer) else 0

    def spans_of_one(self, context: int, sweep_cells: int) -> int:
        """Of all layers with a window, what a sequence has that looks back from one place."""
        return sum(most or 0 for most in self.most_spans(context, sweep_cells, 1))

    @property
    def most_tokens(self) -> int:
        """The most that one place to go on needs of the layers that keep pages of a window."""
        span_tokens = self._span_cells * self._geometry.cell_tokens
        return self._cells_before * self._geometry.cell_tokens + span_tokens

    @property
    def _cells_before(self) -> int:
        """How many cells before its own a query sees, in part or whole."""
        return -(-(self._widest - 1) // self._geometry.cell_tokens)

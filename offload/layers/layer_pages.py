"""The pages of layers that attend: cells are sealed into them, they are asked for ahead of their
turn, and attended to.

`kv` is a layer's number among those that attend. What of a layer's pages decode selects is
`selected_attention`'s business.
"""

from __future__ import annotations

import torch

from ...kernels.pages import seal
from ..errors import ModelError
from ..pages.geometry import Geometry
from ..pages.pager import PageStore
from ..running.sequence import Sequence
from ..running.sequences import Sequences
from ..weights.weights import LayerTensors
from .attention import Query, TieredAttention
from .decoder import Decoder
from .selected_attention import SelectedAttention


class LayerPages:
    """Of one model over one page store. selected: where decode selects pages, else None. With
    overlap=False nothing is asked for ahead."""

    def __init__(
        self,
        decoder: Decoder,
        attention: TieredAttention,
        sequences: Sequences,
        store: PageStore,
        geometry: Geometry,
        selected: SelectedAttention | None,
        *,
        overlap: bool,
    ):
        self._config, self._decoder = decoder.config, decoder
        self._attention, self._sequences = attention, sequences
        self._store, self._geometry = store, geometry
        self._selected, self._overlap = selected, overlap

    def attend(
        self, sequence: Sequence, kv: int, queries: list[Query], bias: torch.Tensor | None
    ) -> list[torch.Tensor]:
        """See TieredAttention.run. What follows is asked for first."""
        self.wish_ahead(sequence, kv, queries[0], decodes=queries[0].rows == 1)
        return self._attention.run(kv, sequence, queries, self.window(kv), bias)

    def wish_ahead(self, sequence: Sequence, kv: int, query: Query, *, decodes: bool) -> None:
        """Ask for all pages of a layer and of the next one, unless that one selects from them.
        query: the first, of a cell or of one or more tokens that are decoded."""
        if self._overlap:
            following = (kv + 1) % len(self._config.kv_layers)
            if not decodes and self._config.shares_kv(self._config.kv_layers[following]):
                following = 0  # prefill passes those by, but for its last token
            self._wish(sequence, kv, query, decodes)
            if not (decodes and self.selects(following)):
                self._wish(sequence, following, query, decodes)

    def selects(self, kv: int | None) -> bool:
        """Whether decode chooses among a layer's pages: a sliding window's few are all attended."""
        return self._selected is not None and kv is not None and self.window(kv) is None

    def _wish(self, sequence: Sequence, kv: int, query: Query, decodes: bool) -> None:
        """Ask for a layer's pages ahead of time: what the predictor says, or a window's spans."""
        window = self.window(kv)
        if window is None:
            self._store.spans.prefetch(sequence.table, kv)
        else:
            first = query.position if decodes else query.cell * self._geometry.cell_tokens
            spans = self._attention.spans_wanted(kv, first, query.cell, window)
            self._store.spans.prefetch(sequence.table, kv, list(spans))

    def window(self, kv: int) -> int | None:
        """How many tokens a layer's queries see; None: all."""
        return self._config.kv_windows[kv]

    def bias(self, w: LayerTensors) -> torch.Tensor | None:
        """The key bias that quantised pages leave out; full pages hold keys as they are."""
        return None if self._geometry.layout.is_full else self._decoder.key_bias(w)

    def seal(self, sequence: Sequence, kv: int, cell: int, bias: torch.Tensor | None) -> None:
        """Send a raw cell home, unless it is there already (after an interrupted sweep)."""
        layout = self._attention.layouts[kv]
        first = cell * (count := self._geometry.cell_records_of(layout))
        if cell < 0 or sequence.table.num_records(kv) > first:
            return
        if not self._sequences.windows.keeps_pages(kv):
            self._store.skip(sequence.table, kv, count)
            return
        if first % self._geometry.records_per_span == 0:
            self._sequences.let_go(sequence, kv)
        k, v = (part.transpose(0, 1) for part in sequence.raw.cell(kv, cell))
        if bias is not None:
            cells, rope = self._geometry.cell_tokens, self._attention.ropes[kv]
            k = k.float() - rope.turn_bias(bias, cell * cells, cells)
        try:
            near, records = seal(k, v, layout)
        except FloatingPointError as error:
            first = cell * self._geometry.cell_tokens
            raise ModelError(
                f"layer {self._config.kv_layers[kv]}: keys or values of tokens {first} and on "
                f"cannot be quantised ({error}). Use --kv-bits full."
            ) from error
        self._store.write(sequence.table, kv, first, near, records)

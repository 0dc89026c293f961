"""A decoded token through all layers in one call of the compiled kernels, where every layer's
weights lie in memory, and every record of the sequence that is not selected.

What is selected from disk is brought in the middle of the call, unless it is at hand. To the bit
what the engine computes layer by layer, which it does wherever this does not serve: weights that
are streamed, experts that are not in memory, pages on disk in exact mode, selections that are read
ahead, selectors other than the default one, key biases of which not all elements turn, layers of
several shapes or that share pages, the token that seals a cell. Layers may attend, keep a state, do
both or neither.

What changes from token to token is found once for all layers of one window; where records lie, once
for each change of the page table.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import replace

import torch

from ..kernels.step import native_for
from ..kernels.token_step import Selections, TokenLayer, TokenStep, View
from .attention import Query, TieredAttention
from .decoder import Decoder
from .geometry import Geometry
from .page_table import PageTable
from .pager import PageStore
from .record_reader import RecordReader
from .selected import Placed
from .selected_attention import Noted, SelectedAttention
from .sequence import Sequence
from .states import States
from .weights import WeightStore


class _Turns:
    """Layers' selections in their order: what was used is told, what is not at hand is brought."""

    def __init__(
        self, records: RecordReader, table: PageTable, layers: list[int], selections: Selections
    ):
        self._records, self._table, self._selections = records, table, selections
        self._left = deque(layers)  # those whose selection nobody was told of

    def bring(
        self, layer: int, chosen: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """See kernels.token_step.Ask."""
        self._use(until=layer)
        self._left.popleft()
        return self._parts(self._records.fetch_in_place(self._table, layer, chosen.numpy()))

    def end(self) -> None:
        """All layers had their turn."""
        self._use(until=None)

    def _use(self, until: int | None) -> None:
        while self._left and self._left[0] != until:
            layer = self._left.popleft()
            self._records.use(self._table, layer, self._selections.records(layer).numpy())

    def _parts(self, coming: Iterator[Placed]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for part in coming:
            with part:
                yield part.positions, part.record_at


class WholeToken:
    """Of one model over one page store. `make_whole_token` says where there is one."""

    def __init__(
        self,
        step: TokenStep,
        decoder: Decoder,
        attention: TieredAttention,
        store: PageStore,
        geometry: Geometry,
        windows: list[int | None],
        selected: SelectedAttention | None,
    ):
        self._step, self._decoder, self._attention = step, decoder, attention
        self._store, self._geometry, self._selected = store, geometry, selected
        # Layers that attend share what they see by their window, and their angles by their rope.
        # Their numbers are those among them.
        layers, ropes = decoder.config.kv_layers, decoder.ropes
        self._windows, self._kinds = windows, list(dict.fromkeys(windows))
        self._ropes = list(dict.fromkeys(ropes[layer] for layer in layers))
        self._selecting = [kv for kv, w in enumerate(windows) if selected is not None and w is None]
        # Behind others that select, or do not attend: what the engine may read ahead.
        number = {layer: kv for kv, layer in enumerate(layers)}
        may_select = {None, *self._selecting}
        self._foreseen = [
            kv for kv in self._selecting if layers[kv] and number.get(layers[kv] - 1) in may_select
        ]

    def run(self, sequence: Sequence, x: torch.Tensor) -> torch.Tensor | None:
        """The residual (1, hidden_size) of the next pending token after the last layer, x (1,
        hidden_size) being its embedding; its keys and values are in the raw cells then. None where
        layers must be run one by one: nothing is done.
        """
        position = sequence.length
        cell, row = divmod(position, self._geometry.cell_tokens)
        if row == 0 and cell >= 2:  # a cell is sealed, layer by layer
            return None
        addresses = self._store.records.table_addresses(sequence.table)
        from_disk = bool(self._selecting) and addresses is not None and addresses.any_on_disk
        if from_disk and not self._selected.serves_tokens(self._foreseen, sequence):
            return None
        spans = {w: self._attention.spans_wanted(0, position, cell, w) for w in self._kinds}
        attended = [spans[w] for w in self._windows]
        for layer in self._selecting:
            attended[layer] = range(0)
        pages = self._store.fetch_table(sequence.table, attended)
        if pages is None:
            return None
        angles = [rope.angles(position, 1) for rope in self._ropes]
        views = [
            self._view(sequence, position, cell, w, spans[w], pages.num_records)
            for w in self._kinds
        ]
        scale = self._decoder.query_scale(0, position)
        places = sequence.raw.places(0, cell, row)
        selections = self._selections(position, pages.num_records)
        states = (0, 0) if sequence.states is None else sequence.states.places(0)
        if selections is None:
            return self._step.run(x, scale, angles, places, views, pages.tables, states)
        turns = _Turns(self._store.records, sequence.table, self._selecting, selections)
        hand = self._store.records.at_hand() if from_disk else None
        x = self._step.run(
            x, scale, angles, places, views, pages.tables, states, selections, hand, turns.bring
        )
        turns.end()
        self._note(sequence, position, selections)
        return x

    def _selections(self, position: int, num_records: int) -> Selections | None:
        """Room for what the token selects, if it does."""
        if not self._selecting or not num_records:
            return None
        config, looked_at = self._decoder.config, self._selected.looks_at(position)
        return Selections(
            len(config.kv_layers),
            num_records,
            (config.num_kv_heads, config.groups),
            self._geometry.layout,
            looked_at if looked_at in self._selecting else None,
        )

    def _note(self, sequence: Sequence, position: int, selections: Selections) -> None:
        """What the token selected goes where the selections of single layers go."""
        num_records = selections.chosen.shape[1] - 1
        figures = selections.figures.tolist()
        for layer in self._selecting:
            chosen = selections.records(layer)
            noted = Noted(layer, chosen, chosen, num_records, figures[layer])
            self._selected.note(sequence, noted)
        if selections.looked_at is not None:
            layer, cell = selections.looked_at, position // self._geometry.cell_tokens
            bias = self._step.key_bias(layer)
            query = Query(selections.q, 1, position, cell)
            shares, log_total = selections.shares, selections.log_total
            self._selected.look(layer, sequence, query, bias, shares, log_total)

    def _view(
        self, sequence, position: int, cell: int, window: int | None, spans: range, num_records: int
    ) -> View:
        decode, layout = self._attention.decode, self._geometry.layout
        runs = decode.raw(0, sequence, position, window).runs
        if not spans:
            return View((0, 0), (0, 0), 0, runs)
        first = spans.start * self._geometry.records_per_span
        count = min(spans.stop * self._geometry.records_per_span, num_records) - first
        base, tokens = spans.start * self._geometry.span_tokens, count * layout.record_tokens
        sealed = self._attention.sealed_tokens(cell)
        visible = decode.visible(base, tokens, position, window, sealed)
        return View((first, count), visible, base, runs)


def make_whole_token(
    decoder: Decoder,
    attention: TieredAttention,
    weights: WeightStore,
    store: PageStore,
    geometry: Geometry,
    selected: SelectedAttention | None,
) -> WholeToken | None:
    """selected: where records are selected, else None. Returns None where the compiled kernels do
    not serve some layer, or the selector."""
    config, layout = decoder.config, geometry.layout
    by_layers = layout.rotate or config.attention_shapes or config.kv_sources
    by_layers = by_layers or (config.query_growth is not None and config.query_growth.unturned)
    if by_layers or not attention.decode.serves_rows(config.groups):
        return None
    choice = None if selected is None else selected.choice()
    if selected is not None and choice is None:
        return None
    windows = list(config.kv_windows)
    kinds = list(dict.fromkeys(windows))
    ropes = list(dict.fromkeys(decoder.ropes[layer] for layer in config.kv_layers))
    state_offsets, layers = iter(States.offsets(config.recurrent)), []
    for layer, rope in enumerate(decoder.ropes):
        w = weights.resident_layer(layer)
        step = None if w is None else decoder.layer_step(layer, w)
        if step is None:
            return None
        made = TokenLayer(step, None)
        if config.recurrence_of(layer) is not None:
            recurrent = decoder.recurrent_step(layer, w)
            if recurrent is None:
                return None
            made = replace(made, recurrent=recurrent, state_offset=next(state_offsets))
        if config.experts_of(layer) is not None:
            experts = decoder.routed_step(layer, w)
            if experts is None:
                return None
            made = replace(made, experts=experts)
        if config.attends(layer):
            kv = config.kv_layers.index(layer)
            made = replace(
                made,
                layout=geometry.layout_of(kv),
                view=kinds.index(windows[kv]),
                angles=ropes.index(rope),
                null_scores=attention.null_scores[kv],
            )
            if selected is not None and windows[kv] is None:
                made = replace(made, output_norms=selected.output_norms(kv, w))
            bias = None if layout.is_full else decoder.key_bias(w)
            if bias is not None:
                if rope.config is None or rope.width != config.head_dim:
                    return None  # the elements that are not turned add a sum that is torch's
                how = {"turns": rope.turns, "amplitude": rope.amplitude}
                made = replace(made, key_bias=bias, **how)
        layers.append(made)
    step = TokenStep(
        native_for(),
        layers,
        layout.raw_dtype,
        geometry.records_per_span,
        config.attention_softcap,
        choice,
    )
    return WholeToken(step, decoder, attention, store, geometry, windows, selected)

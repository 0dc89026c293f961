"""A decoded token through all layers in one call of the compiled kernels, where every layer's
weights lie in memory, and every record of the sequence that is not selected.

What is selected from disk is brought in the middle of the call, unless it is at hand. To the bit
what the engine computes layer by layer, which it does wherever this does not serve: weights that
are streamed, experts that are not in memory, pages on disk in exact mode, selections that are read
ahead or by layers of several shapes, selectors other than the default one, the token that seals a
cell. Layers may attend, to their own pages or to others', keep a state, do both or neither.

What changes from token to token is found once for all layers of one kind; where records lie, once
for each change of the page table.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch

from ...kernels.step import native_for
from ...kernels.token_step import Selections, TokenLayer, TokenStep, View
from ..layers.attention import Query, TieredAttention
from ..layers.decoder import Decoder
from ..layers.selected_attention import Noted, SelectedAttention
from ..layers.states import States
from ..models.model_config import ModelConfig
from ..pages.geometry import Geometry
from ..pages.page_table import PageTable
from ..pages.pager import PageStore
from ..pages.record_reader import RecordReader
from ..pages.selected import Placed
from ..weights.weights import WeightStore
from .sequence import Sequence


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


class _Kind(NamedTuple):
    """What layers that attend have alike where they see the same of a sequence."""

    window: int | None
    record_tokens: int


def _kinds(config: ModelConfig, attention: TieredAttention) -> list[_Kind]:
    """Of each layer that attends."""
    found = zip(config.kv_windows, attention.layouts, strict=True)
    return [_Kind(window, layout.record_tokens) for window, layout in found]


class WholeToken:
    """Of one model over one page store. `make_whole_token` says where there is one."""

    def __init__(
        self,
        step: TokenStep,
        decoder: Decoder,
        attention: TieredAttention,
        store: PageStore,
        geometry: Geometry,
        selected: SelectedAttention | None,
    ):
        self._step, self._decoder, self._attention = step, decoder, attention
        self._store, self._geometry, self._selected = store, geometry, selected
        # Layers that attend share what they see by their kind, and angles and scales of queries by
        # their rope. Their numbers are those among them.
        layers, windows = decoder.config.kv_layers, decoder.config.kv_windows
        kinds = _kinds(decoder.config, attention)
        # One layer of each kind, and of each layer that one's place.
        self._views = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
        self._view_of = [self._views.index(kinds.index(kind)) for kind in kinds]
        self._ropes = {decoder.ropes[layer]: layer for layer in layers}
        self._selecting = [kv for kv, w in enumerate(windows) if selected is not None and w is None]
        # Behind others that select, or do not attend: what the engine may read ahead.
        number = {layer: kv for kv, layer in enumerate(layers)}
        may_select = {None, *self._selecting}
        self._foreseen = [
            kv for kv in self._selecting if layers[kv] and number.get(layers[kv] - 1) in may_select
        ]

    def run(
        self, sequence: Sequence, x: torch.Tensor, inputs: torch.Tensor | None
    ) -> torch.Tensor | None:
        """The residual (1, residual_size) of the next pending token after the last layer; its keys
        and values are in the raw cells then. None where layers must be run one by one: nothing is
        done. x, inputs: as WeightStore.entering gives them.
        """
        position = sequence.length
        cell, row = divmod(position, self._geometry.cell_tokens)
        if row == 0 and cell >= 2:  # a cell is sealed, layer by layer
            return None
        addresses = self._store.records.table_addresses(sequence.table)
        if addresses is None or not self._are_alike(addresses.num_records):
            return None
        from_disk = bool(self._selecting) and addresses.any_on_disk
        if from_disk and not self._selector.serves_tokens(self._foreseen, sequence):
            return None
        spans = [self._spans(layer, position, cell) for layer in self._views]
        attended = [spans[view] for view in self._view_of]
        for layer in self._selecting:
            attended[layer] = range(0)
        pages = self._store.spans.fetch_table(sequence.table, attended)
        if pages is None:
            return None
        selections = self._selections(position, pages.num_records)
        run = partial(
            self._step.run,
            x,
            angles=[rope.angles(position, 1) for rope in self._ropes],
            scales=[self._decoder.query_scale(n, position) for n in self._ropes.values()],
            places=sequence.raw.places(cell, row),
            views=[
                self._view(sequence, position, cell, layer, seen, pages.num_records[layer])
                for layer, seen in zip(self._views, spans, strict=True)
            ],
            raw=sequence.raw.table,
            tables=pages.tables,
            inputs=inputs,
            states=(0, 0) if sequence.states is None else sequence.states.places(0),
        )
        if selections is None:
            return run()
        turns = _Turns(self._store.records, sequence.table, self._selecting, selections)
        hand = self._store.records.at_hand() if from_disk else None
        x = run(selections=selections, at_hand=hand, ask=turns.bring)
        turns.end()
        self._note(sequence, position, selections)
        return x

    @property
    def _selector(self) -> SelectedAttention:
        """Where layers select."""
        assert self._selected is not None
        return self._selected

    def _are_alike(self, num_records: list[int]) -> bool:
        """Whether layers of one kind have as many records."""
        return len(set(zip(self._view_of, num_records, strict=True))) == len(self._views)

    def _spans(self, layer: int, position: int, cell: int) -> range:
        window = self._decoder.config.kv_windows[layer]
        return self._attention.spans_wanted(layer, position, cell, window)

    def _selections(self, position: int, num_records: list[int]) -> Selections | None:
        """Room for what the token selects, if it does."""
        first = self._selecting[0] if self._selecting else None
        if first is None or not num_records[first]:
            return None
        config, looked_at = self._decoder.config, self._selector.looks_at(position)
        layer, layout = config.kv_layers[first], self._attention.layouts[first]
        return Selections(
            len(config.kv_layers),
            num_records[first],
            (layout.kv_heads, config.heads_of(layer) // layout.kv_heads),
            layout,
            looked_at if looked_at in self._selecting else None,
        )

    def _note(self, sequence: Sequence, position: int, selections: Selections) -> None:
        """What the token selected goes where the selections of single layers go."""
        num_records = selections.chosen.shape[1] - 1
        figures = selections.figures.tolist()
        for layer in self._selecting:
            chosen = selections.records(layer)
            noted = Noted(layer, chosen, chosen, num_records, figures[layer])
            self._selector.note(sequence, noted)
        if selections.looked_at is not None:
            layer, cell = selections.looked_at, position // self._geometry.cell_tokens
            bias = self._step.key_bias(layer)
            query = Query(selections.q, 1, position, cell)
            shares, log_total = selections.shares, selections.log_total
            self._selector.look(layer, sequence, query, bias, shares, log_total)

    def _view(
        self, sequence, position: int, cell: int, layer: int, spans: range, num_records: int
    ) -> View:
        decode, layout = self._attention.decode, self._attention.layouts[layer]
        window = self._decoder.config.kv_windows[layer]
        raw = decode.raw_rows(sequence, position, window)
        if not spans:
            return View((0, 0), (0, 0), 0, raw)
        first = spans.start * self._geometry.records_per_span
        count = min(spans.stop * self._geometry.records_per_span, num_records) - first
        base = spans.start * self._attention.span_tokens[layer]
        tokens = count * layout.record_tokens
        sealed = self._attention.sealed_tokens(cell)
        visible = decode.visible(base, tokens, position, window, sealed)
        return View((first, count), visible, base, raw)


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
    shapes = [(config.shape_of(layer), config.heads_of(layer)) for layer in config.kv_layers]
    rows = {heads // shape.kv_heads for shape, heads in shapes}
    if layout.rotate or not all(map(attention.decode.serves_rows, rows)):
        return None
    choice, windows = None, config.kv_windows
    if selected is not None:
        choice = selected.choice()
        selecting = {shape for shape, w in zip(shapes, windows, strict=True) if w is None}
        if choice is None or len(selecting) > 1:
            return None
    kinds = _kinds(config, attention)
    views = list(dict.fromkeys(kinds))
    ropes = list(dict.fromkeys(decoder.ropes[layer] for layer in config.kv_layers))
    state_offsets, layers = iter(States.offsets(config.recurrent)), []
    for layer, rope in enumerate(decoder.ropes):
        w = weights.resident_layer(layer)
        if w is None or (step := decoder.layer_step(layer, w)) is None:
            return None
        made = TokenLayer(step, None, streams=decoder.altup_step(w))
        if config.recurrence_of(layer) is not None:
            state = decoder.state_step(layer, w)
            if state is None:
                return None
            made = replace(made, state=state, state_offset=next(state_offsets))
        if config.experts_of(layer) is not None:
            experts = decoder.routed_step(layer, w)
            if experts is None:
                return None
            made = replace(made, experts=experts)
        if config.attends(layer):
            kv = config.kv_layers.index(layer)
            made = replace(
                made,
                layout=attention.layouts[kv],
                view=views.index(kinds[kv]),
                angles=ropes.index(rope),
                null_scores=attention.null_scores[kv],
            )
            if selected is not None and windows[kv] is None:
                made = replace(made, output_norms=selected.output_norms(kv, w))
            bias = None if layout.is_full else decoder.key_bias(w)
            if bias is not None:
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
    return WholeToken(step, decoder, attention, store, geometry, selected)

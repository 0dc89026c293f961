"""Runs token sequences through the model: prefill cell by cell, decode token by token, pages sealed
on the way.

    prefill   some cells at a time (a sweep) go through each layer together, so that weights and far
              planes are read once for all of them; every cell's arithmetic is the same whatever the
              sweep
    decode    one token through all layers: at once where weights are in memory and nothing is to be
              done between layers, else one by one
    verify    a few guessed tokens through each layer together, for the bits of decoding each

Knows no text and no sampling; `session` does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass

import torch

from ..kernels import dispatch
from ..kernels.pages import seal
from ..prefetch.foresight import make_foresight
from ..prefetch.registry import make_selector
from .attention import Query, TieredAttention
from .decoder import Decoder
from .errors import ModelError
from .footprint import MOST_VERIFIED
from .geometry import Geometry
from .mode import Mode
from .model_config import ModelConfig
from .pager import PageStore
from .selected_attention import Noted, SelectedAttention
from .sequence import RawPages, Sequence
from .weights import LayerTensors, WeightStore
from .whole_token import make_whole_token


def rows_stand_alone(device: torch.device) -> bool:
    """Whether a row's bits are its own in any company, as compiled kernels give them. Then tokens
    can be verified together, and some rows of a cell attended without the others."""
    return dispatch.compiled_for(torch.empty(0, device=device)) is not None


# rows (cell, hidden (cell_tokens, hidden_size), rows of it that are new)
OnRows = Callable[[int, torch.Tensor, slice], None]


@dataclass
class _CellRows:
    """One cell's share of a sweep: residual rows and which of them are new."""

    cell: int
    rows: slice
    x: torch.Tensor  # (cell_tokens, hidden_size)


class Engine:
    """A model, ready to run sequences whose pages lie in one store.

    sweep_cells: cells per prefill sweep; changes memory and time, never a result. With
    overlap=False nothing is requested ahead: the plain twin. mode: which pages decode attends to in
    full; prefill attends to all.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: WeightStore,
        store: PageStore,
        geometry: Geometry,
        device: torch.device,
        *,
        sweep_cells: int = 1,
        overlap: bool = True,
        mode: Mode | None = None,
    ):
        self.config, self.weights, self.store, self.geometry = config, weights, store, geometry
        self.device, self.sweep_cells, self.overlap = device, sweep_cells, overlap
        self.decoder = Decoder(config, device)
        self.attention = TieredAttention(
            geometry.layouts(config.num_layers),
            geometry.cell_tokens,
            geometry.span_tokens,
            store,
            self.decoder.ropes,
            device,
            config.attention_softcap,
        )
        self.selected: SelectedAttention | None = None
        self.choose_pages(mode or Mode())

    def choose_pages(self, mode: Mode, *, audits: bool = True) -> None:
        """From the next decoded token on, attend in full to the pages that `mode` says. Modes other
        than exact want a layout with mean values. audits: whether estimates are checked meanwhile.
        Not while tokens are verified that were not taken in.
        """
        self.selected = None
        if mode.selects:
            self.selected = SelectedAttention(
                self.attention,
                self.store.records,
                make_selector(mode.selector, **mode.selector_options),
                make_foresight(mode.foresight if self.overlap else "nothing"),
                self.weights.output_norms,
                waits=mode.name != "deadline",
                audits=audits,
            )
        self.whole_token = make_whole_token(
            self.decoder, self.attention, self.weights, self.store, self.geometry, self.selected
        )

    def twin(self, mode: Mode) -> Engine:
        """One that serves the same sequences in another mode, which its layout must allow, and
        checks no estimates."""
        other = copy(self)
        other.choose_pages(mode, audits=False)
        return other

    # ---- sequences ---------------------------------------------------------------------------

    def open_sequence(self, expected_tokens: int) -> Sequence:
        """An empty sequence. expected_tokens: how long it may become, for the policy."""
        spans = -(-expected_tokens // self.geometry.span_tokens)
        return Sequence(self.store.open_table(spans), self.new_raw(), self.geometry.cell_tokens)

    def fork(self, sequence: Sequence) -> Sequence:
        """A sequence that shares all sealed pages and owns a copy of the raw ones."""
        self.settle(sequence)
        other = Sequence(self.store.fork(sequence.table), self.new_raw(), self.geometry.cell_tokens)
        other.raw.copy_from(sequence.raw)
        other.tokens = sequence.tokens[:]
        other.processed, other.oldest_raw_cell = sequence.processed[:], sequence.oldest_raw_cell
        other.kept_tokens = sequence.kept_tokens
        return other

    def rewind(self, sequence: Sequence, length: int) -> None:
        """Make `length` the number of processed tokens; the tokens stay. Where the raw cells that
        its neighbours saw are gone, it becomes 0: a sealed copy of them would give other bits.
        """
        if not sequence.can_resume_at(length):
            length = 0
        self.begin_anew(sequence, length)
        if length == 0:
            sequence.oldest_raw_cell = 0
        self.settle(sequence)

    def rewind_to(
        self, sequence: Sequence, length: int, raw: RawPages, oldest_raw_cell: int
    ) -> None:
        """The same, where the raw cells are gone, and a copy of them was made at that length."""
        processed = sequence.processed[:length]
        self.begin_anew(sequence)
        sequence.raw.copy_from(raw)
        sequence.oldest_raw_cell = oldest_raw_cell
        sequence.processed[:] = processed
        self.settle(sequence)

    def begin_anew(self, sequence: Sequence, length: int = 0) -> None:
        """What follows changes raw cells or the table: until it is done, whatever interrupts it,
        only the first `length` tokens count as processed."""
        sequence.is_settled = False
        sequence.remembered = sequence.as_computed()
        del sequence.processed[length:]
        sequence.kept_tokens = min(sequence.kept_tokens, length)

    def settle(self, sequence: Sequence) -> None:
        """Drop what lies in the table beyond the processed tokens: something was interrupted, and
        the tokens that it was sealed for may be others by now."""
        if not sequence.is_settled:
            self.store.truncate(sequence.table, self._sealed_records(sequence.length))
            sequence.is_settled = True

    def close_sequence(self, sequence: Sequence) -> None:
        self.store.close_table(sequence.table)

    def new_raw(self) -> RawPages:
        """Empty raw pages, as a sequence or a snapshot of one needs them."""
        layout, config = self.geometry.layout, self.config
        return RawPages(
            config.num_layers,
            max(2, self.sweep_cells + 1),
            layout.kv_heads,
            self.geometry.cell_tokens,
            layout.head_dim,
            layout.page_tokens,
            layout.raw_dtype,
            self.device,
        )

    def _sealed_records(self, length: int) -> int:
        """The most that each layer's table may hold of a text of `length` tokens."""
        return max(0, length // self.geometry.cell_tokens - 1) * self._cell_records

    @property
    def _cell_records(self) -> int:
        return self.geometry.cell_tokens // self.geometry.layout.record_tokens

    # ---- running -----------------------------------------------------------------------------

    @torch.inference_mode()
    def prefill(
        self,
        sequence: Sequence,
        on_rows: OnRows | None = None,
        on_progress: Callable[[int], None] | None = None,
        stop_at: int | None = None,
    ) -> torch.Tensor | None:
        """Process pending tokens up to `stop_at` (default: all); returns the last row's residual
        (1, hidden_size).

        on_rows gets every new row's residual after the last layer; without it the last layer
        computes only what later tokens need. on_progress(length) is called after each sweep; what
        it raises stops the run between two sweeps, and the sequence is whole.
        """
        stop = len(sequence.tokens) if stop_at is None else stop_at
        last = None
        self.settle(sequence)
        while sequence.length < stop:
            sweep = self._next_sweep(sequence, stop)
            end = sweep[-1]
            sequence.is_settled = False
            sequence.will_write(end.cell)
            for layer in range(self.config.num_layers):
                final = layer == self.config.num_layers - 1
                self._sweep_layer(
                    sequence, layer, sweep, stop, needs_all=on_rows is not None or not final
                )
            cells = self.geometry.cell_tokens
            sequence.prefilled(end.cell * cells + end.rows.stop)
            sequence.is_settled = True
            last = end.x[end.rows.stop - 1 : end.rows.stop]
            if on_rows is not None:
                for part in sweep:
                    on_rows(part.cell, part.x, part.rows)
            if on_progress is not None:
                on_progress(sequence.length)
        return last

    @torch.inference_mode()
    def decode(self, sequence: Sequence) -> torch.Tensor:
        """Process the one pending token; returns its residual (1, hidden_size)."""
        self.settle(sequence)
        position = sequence.length
        x = self.weights.embed(sequence.tokens[position : position + 1])
        sequence.will_write(position // self.geometry.cell_tokens)
        residual = None if self.whole_token is None else self.whole_token.run(sequence, x)
        if residual is None:
            residual = self._decode_by_layers(sequence, x)
        sequence.decoded()
        return residual

    def room_to_verify(self, sequence: Sequence) -> int:
        """How many tokens `verify` takes at most now: they lie in one cell."""
        cells = self.geometry.cell_tokens
        return min(MOST_VERIFIED, cells - sequence.length % cells)

    @torch.inference_mode()
    def verify(self, sequence: Sequence, tokens: list[int]) -> torch.Tensor:
        """The residuals (num_tokens, hidden_size) of tokens behind the processed ones: of each the
        bits that `decode` would give, while weights and pages are read once for all. Not in
        deadline mode, which attends to what has arrived.

        The sequence stays as it is, but that the tokens' keys and values lie behind its end:
        `take_in` makes them part of it, one by one.
        """
        self.settle(sequence)
        position, count = sequence.length, len(tokens)
        cell, row = divmod(position, self.geometry.cell_tokens)
        x = self.weights.embed(tokens)
        sequence.will_write(cell)
        notes: list[list[Noted]] = [[] for _ in tokens]
        for layer in range(self.config.num_layers):
            w = self.weights.layer(layer)
            bias = self._page_bias(w)
            if row == 0:
                self._seal(sequence, layer, cell - 2, bias)
            q, k, v = self.decoder.project(layer, w, x, slice(0, count), position)
            sequence.raw.write(layer, cell, row, k, v)
            query = Query(q, count, position, cell)
            if self._selects(layer):
                attended = self.selected.run_several(layer, sequence, query, bias, x, w, notes)
            else:
                window = self._window(layer)
                self._wish_ahead(sequence, layer, query, decodes=True)
                attended = self.attention.run_several(layer, sequence, query, window, bias)
            x = self.decoder.mix(layer, w, x, attended, slice(0, count))
        sequence.verified = deque(notes)
        return x

    def take_in(self, sequence: Sequence) -> None:
        """Make the first token behind the sequence's end, which was verified, part of it."""
        notes = sequence.verified.popleft() if sequence.verified else []
        sequence.decoded()
        for noted in notes:
            self.selected.note(sequence, noted)

    def _decode_by_layers(self, sequence: Sequence, x: torch.Tensor) -> torch.Tensor:
        """The pending token's residual (1, hidden_size) after the last layer; x: its embedding."""
        position, rows = sequence.length, slice(0, 1)
        cell, row = divmod(position, self.geometry.cell_tokens)
        for layer in range(self.config.num_layers):
            w = self.weights.layer(layer)
            bias = self._page_bias(w)
            if row == 0:
                self._seal(sequence, layer, cell - 2, bias)
            q = self.decoder.project_row(layer, w, x, position, sequence.raw, cell, row)
            query = Query(q, 1, position, cell)
            if self._selects(layer):
                self._rehearse(sequence, layer + 1, x, position, early=True)
                attended = self.selected.run(layer, sequence, query, bias, x, w)
                between = self.decoder.add_attention(layer, w, x, attended, rows)
                self._rehearse(sequence, layer + 1, between, position, early=False)
                before, x = x, self.decoder.add_mlp(layer, w, between, rows)
                if self._selects(layer + 1):
                    self.selected.note_changes(layer + 1, sequence, before, between, x)
            else:
                attended = self._attend(sequence, layer, [query], bias)[0]
                x = self.decoder.mix(layer, w, x, attended, rows)
        return x

    @torch.inference_mode()
    def logits(self, residual: torch.Tensor) -> torch.Tensor:
        """Residual rows (rows, hidden_size) after the last layer -> (rows, vocab_size) float32."""
        return self.decoder.head_output(self.weights.logits(residual))

    def _next_sweep(self, sequence: Sequence, stop: int) -> list[_CellRows]:
        cells, sweep, start = self.geometry.cell_tokens, [], sequence.length
        while start < stop and len(sweep) < self.sweep_cells:
            cell = start // cells
            end = min((cell + 1) * cells, stop)
            rows = slice(start - cell * cells, end - cell * cells)
            x = torch.zeros(cells, self.config.hidden_size, device=self.device)
            x[rows] = self.weights.embed(sequence.tokens[start:end])
            sweep.append(_CellRows(cell, rows, x))
            start = end
        return sweep

    def _sweep_layer(
        self, sequence, layer: int, sweep: list[_CellRows], stop: int, needs_all: bool
    ):
        """One layer for a whole sweep: keys and values first, then attention, then the MLP."""
        w = self.weights.layer(layer)
        bias = self._page_bias(w)
        projected = []
        for part in sweep:
            position = part.cell * self.geometry.cell_tokens
            q, k, v = self.decoder.project(layer, w, part.x, part.rows, position)
            self._seal(sequence, layer, part.cell - 2, bias)
            new = part.rows
            sequence.raw.write(layer, part.cell, new.start, k[new], v[new])
            projected.append((part, q, new))
        if not needs_all:  # later tokens need the last layer's keys and values, not its output
            part, q, new = projected[-1]
            if part.cell * self.geometry.cell_tokens + new.stop < stop:
                return
            projected = [(part, q, slice(new.stop - 1, new.stop))]
        queries = [self._query(part.cell, q, rows) for part, q, rows in projected]
        outs = self._attend(sequence, layer, queries, bias)
        cells = self.geometry.cell_tokens
        for (part, _, rows), query, out in zip(projected, queries, outs, strict=True):
            attended = out.new_zeros(cells, out.shape[1])
            attended[query.position % cells :][: query.rows] = out
            part.x = self.decoder.mix(layer, w, part.x, attended, rows)

    def _query(self, cell: int, q: torch.Tensor, rows: slice) -> Query:
        """Those of a cell's queries q (kv_heads, groups * cell_tokens, head_dim) that are attended
        for the sake of `rows`: all of them where a row's bits depend on how many there are, and
        two at least, since one is decoded."""
        cells, first, count = self.geometry.cell_tokens, 0, self.geometry.cell_tokens
        if rows_stand_alone(self.device):
            first, count = min(rows.start, cells - 2), max(2, rows.stop - rows.start)
        if count < cells:
            kv_heads, _, dim = q.shape
            q = q.view(kv_heads, -1, cells, dim)[:, :, first : first + count]
            q = q.reshape(kv_heads, -1, dim)
        return Query(q, count, cell * cells + first, cell)

    def _attend(self, sequence, layer: int, queries: list[Query], bias) -> list[torch.Tensor]:
        self._wish_ahead(sequence, layer, queries[0], decodes=queries[0].rows == 1)
        return self.attention.run(layer, sequence, queries, self._window(layer), bias)

    def _wish_ahead(self, sequence, layer: int, query: Query, *, decodes: bool) -> None:
        """Ask for all pages of a layer and of the next one, unless that one selects from them.
        query: the first, of a cell or of one or more tokens that are decoded."""
        if self.overlap:
            following = (layer + 1) % self.config.num_layers
            self._wish(sequence, layer, query, decodes)
            if not (decodes and self._selects(following)):
                self._wish(sequence, following, query, decodes)

    def _selects(self, layer: int) -> bool:
        """Whether decode chooses among a layer's pages: a sliding window's few are all attended.
        There is none behind the last layer."""
        if self.selected is None or layer == self.config.num_layers:
            return False
        return self._window(layer) is None

    def _rehearse(
        self, sequence: Sequence, layer: int, x: torch.Tensor, position: int, *, early: bool
    ) -> None:
        """Ask for what a layer is expected to select, from the residual (1, hidden_size) of the
        layer before, as if no more than usual were added to it: at one of two points, see
        IssuePoint."""
        selected = self.selected
        if not self._selects(layer):
            return
        is_wanted = selected.wants_query(layer, sequence)
        w = self.weights.resident_layer(layer) if is_wanted else None
        if w is None:
            if early:
                selected.expect(layer, sequence, None, None)
            return
        is_due = selected.issue_point.is_early(layer) == early
        if is_due or (early and selected.issue_point.is_looking(position)):
            expected = selected.expected(layer, x, early=early)
            q = self.decoder.queries(layer, w, expected, slice(0, 1), position)
            if early:
                selected.issue_point.guess(layer, q)
            if is_due:
                query = Query(q, 1, position, position // self.geometry.cell_tokens)
                selected.expect(layer, sequence, query, self._page_bias(w))

    def _wish(self, sequence: Sequence, layer: int, query: Query, decodes: bool) -> None:
        """Ask for a layer's pages ahead of time: what the predictor says, or a window's spans."""
        window = self._window(layer)
        if window is None:
            self.store.prefetch(sequence.table, layer)
        else:
            first = query.position if decodes else query.cell * self.geometry.cell_tokens
            spans = self.attention.spans_wanted(first, query.cell, window)
            self.store.prefetch(sequence.table, layer, list(spans))

    def _window(self, layer: int) -> int | None:
        return self.config.windows[layer] if self.config.windows else None

    def _page_bias(self, w: LayerTensors) -> torch.Tensor | None:
        """The key bias that quantised pages leave out; full pages hold keys as they are."""
        return None if self.geometry.layout.is_full else self.decoder.key_bias(w)

    def _seal(self, sequence: Sequence, layer: int, cell: int, bias: torch.Tensor | None) -> None:
        """Send a raw cell home, unless it is there already (after an interrupted sweep)."""
        first = cell * self._cell_records
        if cell < 0 or sequence.table.num_records(layer) > first:
            return
        k, v = (part.transpose(0, 1) for part in sequence.raw.cell(layer, cell))
        if bias is not None:
            cells, rope = self.geometry.cell_tokens, self.decoder.ropes[layer]
            k = k.float() - rope.turn_bias(bias, cell * cells, cells)
        try:
            near, records = seal(k, v, self.geometry.layout_of(layer))
        except FloatingPointError as error:
            raise ModelError(
                f"layer {layer}: keys or values of tokens {cell * self.geometry.cell_tokens} "
                "and on cannot be "
                f"quantised ({error}). Use --kv-bits full."
            ) from error
        self.store.write(sequence.table, layer, first, near, records)

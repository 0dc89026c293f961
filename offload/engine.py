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
from ..kernels.threads import torch_alone
from ..prefetch.foresight import make_foresight
from ..prefetch.registry import make_selector
from .attention import Query, TieredAttention
from .decoder import Decoder, Mixed
from .errors import ModelError
from .footprint import MOST_VERIFIED
from .geometry import Geometry
from .mode import Mode
from .model_config import ModelConfig
from .pager import PageStore
from .selected_attention import Noted, SelectedAttention
from .sequence import Sequence
from .sequences import Sequences
from .weights import LayerTensors, WeightStore
from .whole_token import make_whole_token


def rows_stand_alone(device: torch.device) -> bool:
    """Whether a row's bits are its own in any company, as compiled kernels give them. Then tokens
    can be verified together, and some rows of a cell attended without the others."""
    return dispatch.compiled_for(torch.empty(0, device=device)) is not None


# rows (cell, residual (cell_tokens, residual_size), rows of it that are new)
OnRows = Callable[[int, torch.Tensor, slice], None]


@dataclass
class _CellRows:
    """One cell's share of a sweep: residual rows and which of them are new."""

    cell: int
    rows: slice
    x: torch.Tensor  # (cell_tokens, residual_size)
    given: torch.Tensor | None  # (num_layers, cell_tokens, size), see PerLayer


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
        self.device, self.overlap = device, overlap
        self.decoder = Decoder(config, device, weights.is_resident)
        self._num_kv_layers, self._size = len(config.kv_layers), config.hidden_size
        # Of each layer its number among those that attend, and among those that keep a state.
        layers = range(config.num_layers)
        self._kv, self._state = (
            [those.index(layer) if layer in those else None for layer in layers]
            for those in (config.kv_layers, config.state_layers)
        )
        layouts = geometry.layouts(config.kv_pages)
        self.attention = TieredAttention(
            layouts,
            geometry.cell_tokens,
            list(map(geometry.span_tokens_of, layouts)),
            store,
            [self.decoder.ropes[layer] for layer in config.kv_layers],
            device,
            config.attention_softcap,
            weights.null_scores,
            config.chunked,
        )
        self.sequences = Sequences(config, store, geometry, device, sweep_cells)
        self.selected: SelectedAttention | None = None
        self.choose_pages(mode or Mode())

    def choose_pages(self, mode: Mode, *, audits: bool = True) -> None:
        """From the next decoded token on, attend in full to the pages that `mode` says. Modes other
        than exact want a layout with mean values. audits: whether estimates are checked meanwhile.
        Not while tokens are verified that were not taken in."""
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

    def close(self) -> None:
        """Let go of what was prepared of the weights: who holds a closed session holds none."""
        self.decoder.close()
        self.whole_token = None

    # ---- running -----------------------------------------------------------------------------

    @torch_alone
    @torch.inference_mode()
    def prefill(
        self,
        sequence: Sequence,
        on_rows: OnRows | None = None,
        on_progress: Callable[[int], None] | None = None,
        stop_at: int | None = None,
        check: Callable[[], None] | None = None,
    ) -> torch.Tensor | None:
        """Process pending tokens up to `stop_at` (default: all); returns the last row's residual
        (1, residual_size).

        on_rows gets every new row's residual after the last layer; without it the layers from the
        last one on that keeps something compute only what later tokens need. on_progress(length) is
        called after each sweep; what it raises stops the run between two sweeps, and the sequence
        is whole. check() is called before each layer; what it raises stops the run too, and the
        sweep has to be made again."""
        stop = len(sequence.tokens) if stop_at is None else stop_at
        last = None
        self.sequences.settle(sequence)
        while sequence.length < stop:
            sweep = self._next_sweep(sequence, stop)
            end = sweep[-1]
            sequence.is_settled = False
            sequence.will_write(end.cell)
            stops = [part.cell * self.geometry.cell_tokens + part.rows.stop for part in sweep]
            if sequence.states is not None:
                sequence.states.begin(sequence.length, stops)
            for layer in range(self.config.num_layers):
                if check is not None:
                    check()
                needs_all = on_rows is not None or layer < self.config.last_keeper
                self._sweep_layer(sequence, layer, sweep, stop, needs_all)
            if sequence.states is not None:
                sequence.states.end()
            sequence.prefilled(stops[-1])
            sequence.is_settled = True
            last = end.x[end.rows.stop - 1 : end.rows.stop]
            if on_rows is not None:
                for part in sweep:
                    on_rows(part.cell, part.x, part.rows)
            if on_progress is not None:
                on_progress(sequence.length)
        return last

    @torch_alone
    @torch.inference_mode()
    def decode(self, sequence: Sequence) -> torch.Tensor:
        """Process the one pending token; returns its residual (1, residual_size)."""
        self.sequences.settle(sequence)
        position = sequence.length
        token = sequence.tokens[position : position + 1]
        entering = self.weights.entering(token, self.weights.embed(token), slice(0, 1))
        sequence.will_write(position // self.geometry.cell_tokens)
        if sequence.states is not None:
            sequence.states.begin(position, [position + 1])
        whole = self.whole_token and self.whole_token.run(sequence, *entering)
        residual = self._decode_by_layers(sequence, *entering) if whole is None else whole
        if sequence.states is not None:
            sequence.states.end()
        sequence.decoded()
        return residual

    def room_to_verify(self, sequence: Sequence) -> int:
        """How many tokens `verify` takes at most now: they lie in one cell."""
        cells = self.geometry.cell_tokens
        return min(MOST_VERIFIED, cells - sequence.length % cells)

    @torch_alone
    @torch.inference_mode()
    def verify(self, sequence: Sequence, tokens: list[int]) -> torch.Tensor:
        """The residuals (num_tokens, residual_size) of tokens behind the processed ones: of each
        the bits that `decode` would give, while weights and pages are read once for all. Not in
        deadline mode, which attends to what has arrived.

        The sequence stays as it is, but that the tokens' keys and values lie behind its end:
        `take_in` makes them part of it, one by one."""
        self.sequences.settle(sequence)
        position, count = sequence.length, len(tokens)
        cell, row = divmod(position, self.geometry.cell_tokens)
        x, given = self.weights.entering(tokens, self.weights.embed(tokens), slice(0, count))
        sequence.will_write(cell)
        notes: list[list[Noted]] = [[] for _ in tokens]
        for layer in range(self.config.num_layers):
            w, kv = self.weights.layer(layer), self._kv[layer]
            bias, x = self._page_bias(w), self.decoder.predicted(w, x, slice(0, count))
            if row == 0:
                self._seal(sequence, kv, cell - 2, bias)
            q, own, gate = self.decoder.project(layer, w, x, slice(0, count), position)
            if own is not None:
                sequence.raw.write(kv, cell, row, *own)
            query = Query(q, count, position, cell)
            if self._selects(kv):
                first = x[:, : self._size]  # of streams, what is worked on
                attended = self.selected.run_several(kv, sequence, query, bias, first, w, notes)
            else:
                self._wish_ahead(sequence, kv, query, decodes=True)
                attended = self.attention.run_several(kv, sequence, query, self._window(kv), bias)
            mixed = self.decoder.attention_output(w, attended, gate, slice(0, count))
            x = self.decoder.mix(layer, w, x, [mixed], slice(0, count))
            x = self.decoder.end(layer, w, x, slice(0, count), given)
        sequence.verified = deque(notes)
        return x

    def take_in(self, sequence: Sequence) -> None:
        """Make the first token behind the sequence's end, which was verified, part of it."""
        notes = sequence.verified.popleft() if sequence.verified else []
        sequence.decoded()
        for noted in notes:
            self.selected.note(sequence, noted)

    def _decode_by_layers(self, sequence: Sequence, x: torch.Tensor, given) -> torch.Tensor:
        """The pending token's residual after all layers. x, given: see WeightStore.entering."""
        position, rows = sequence.length, slice(0, 1)
        cell, row = divmod(position, self.geometry.cell_tokens)
        for layer in range(self.config.num_layers):
            w, kv, mixed = self.weights.layer(layer), self._kv[layer], []
            x = self.decoder.predicted(w, x, rows)
            selects = self._selects(kv)
            following = self._following(layer) if selects or kv is None else None
            if following is not None:
                self._rehearse(sequence, following, x, position, early=True)
            if kv is not None:
                bias = self._page_bias(w)
                if row == 0:
                    self._seal(sequence, kv, cell - 2, bias)
                q, gate = self.decoder.project_row(
                    layer, w, x, position, sequence.raw, kv, cell, row
                )
                query = Query(q, 1, position, cell)
                if selects:
                    attended = self.selected.run(kv, sequence, query, bias, x[:, : self._size], w)
                else:
                    attended = self._attend(sequence, kv, [query], bias)[0]
                mixed.append(self.decoder.attention_output(w, attended, gate, rows))
            if self._state[layer] is not None:
                state = sequence.states.of(0, self._state[layer])
                mixed.append(self.decoder.recur(layer, w, x, rows, *state))
            if following is None and not self.weights.reads_experts:
                x = self.decoder.mix(layer, w, x, mixed, rows)
                x = self.decoder.end(layer, w, x, rows, given)
                continue
            between = self.decoder.add_mixed(layer, w, x, mixed, rows)
            if following is not None:
                self._rehearse(sequence, following, between, position, early=False)
            self._expect_experts(layer, between)
            before, x = x, self.decoder.add_mlp(layer, w, between, rows, x)
            x = self.decoder.end(layer, w, x, rows, given)
            if following is not None:
                self.selected.note_changes(self._kv[following], sequence, before, between, x)
        return x

    def _expect_experts(self, layer: int, x: torch.Tensor) -> None:
        """Have the experts of the next layer that has some read, where they are not in memory, once
        this layer's are under way: the ones that its router would choose for the residual
        x (1, hidden_size) before this layer's MLP."""
        if not self.weights.reads_experts or self.config.experts_of(layer) is None:
            return
        later = range(layer + 1, self.config.num_layers)
        following = next((i for i in later if self.config.experts_of(i) is not None), None)
        if following is not None:
            w = self.weights.layer(following)
            w.expect_experts(self.decoder.likely_experts(following, w, x))

    def _following(self, layer: int) -> int | None:
        """The next layer, if decode chooses among its pages."""
        following = layer + 1
        is_layer = following < self.config.num_layers
        return following if is_layer and self._selects(self._kv[following]) else None

    @torch_alone
    @torch.inference_mode()
    def logits(self, residual: torch.Tensor) -> torch.Tensor:
        """Residual rows (rows, residual_size) after the last layer -> (rows, vocab_size)."""
        return self.decoder.head_output(self.weights.logits(residual))

    def _next_sweep(self, sequence: Sequence, stop: int) -> list[_CellRows]:
        cells, sweep, start = self.geometry.cell_tokens, [], sequence.length
        while start < stop and len(sweep) < self.sequences.sweep_cells:
            cell = start // cells
            end = min((cell + 1) * cells, stop)
            rows = slice(start - cell * cells, end - cell * cells)
            x = torch.zeros(cells, self.config.hidden_size, device=self.device)
            tokens = sequence.tokens[start:end]
            x[rows] = self.weights.embed(tokens)
            sweep.append(_CellRows(cell, rows, *self.weights.entering(tokens, x, rows)))
            start = end
        return sweep

    def _sweep_layer(
        self, sequence, layer: int, sweep: list[_CellRows], stop: int, needs_all: bool
    ):
        """One layer for a whole sweep: keys and values first, then attention, then, cell after
        cell, states and the MLP. Unless it needs all, what later tokens need of the layer is at
        most keys, values and states, and its output for the row before `stop` alone goes on."""
        w, kv, state = self.weights.layer(layer), self._kv[layer], self._state[layer]
        wanted = {index: part.rows for index, part in enumerate(sweep)}
        if not needs_all:
            end = sweep[-1].rows.stop
            is_end = self._ends_at(sweep[-1], stop)
            wanted = {len(sweep) - 1: slice(end - 1, end)} if is_end else {}
        attended = {} if kv is None else self._attend_cells(sequence, layer, w, sweep, wanted)
        entered = [part.x if self.config.parallel_mlp else None for part in sweep]
        for index, part in enumerate(sweep):
            mixed = []
            if index in attended:
                query, out, gate = attended[index]
                placed, rows = self._placed(query, out), wanted[index]
                mixed.append(self.decoder.attention_output(w, placed, gate, rows))
            if state is not None:
                states = sequence.states.of(index, state)
                mixed.append(self.decoder.recur(layer, w, part.x, part.rows, *states))
            if index in wanted:
                self._mix(layer, w, part, mixed, wanted[index])
        self._end_layer(layer, w, [(sweep[i], rows, entered[i]) for i, rows in wanted.items()])

    def _attend_cells(
        self, sequence, layer: int, w: LayerTensors, sweep: list[_CellRows], wanted: dict
    ) -> dict[int, tuple[Query, torch.Tensor, torch.Tensor | None]]:
        """Keys and values of a sweep's cells go to their places, if the layer has some; of cells of
        which some rows are wanted: queries, what they attended to, and the gate of that."""
        kv, queries, gates = self._kv[layer], [], []
        bias, shares = self._page_bias(w), self.config.shares_kv(layer)
        for index, part in enumerate(sweep):
            if shares and index not in wanted:
                continue
            position, new = part.cell * self.geometry.cell_tokens, part.rows
            rows = wanted[index] if shares else new
            part.x = self.decoder.predicted(w, part.x, rows)
            q, own, gate = self.decoder.project(layer, w, part.x, rows, position)
            if own is not None:
                self._seal(sequence, kv, part.cell - 2, bias)
                sequence.raw.write(kv, part.cell, new.start, *(of[new] for of in own))
            if index in wanted:
                queries.append(self._query(part.cell, q, wanted[index]))
                gates.append(gate)
        if not queries:
            return {}
        outs = self._attend(sequence, kv, queries, bias)
        return dict(zip(wanted, zip(queries, outs, gates, strict=True), strict=True))

    def _placed(self, query: Query, out: torch.Tensor) -> torch.Tensor:
        """What was attended to, at its rows of a cell."""
        cells = self.geometry.cell_tokens
        attended = out.new_zeros(cells, out.shape[1])
        attended[query.position % cells :][: query.rows] = out
        return attended

    def _mix(self, layer: int, w: LayerTensors, part: _CellRows, mixed: Mixed, rows: slice) -> None:
        """The second half of a layer; with routed experts `_end_layer` is a part of it."""
        routed = self.config.experts_of(layer) is not None
        mix = self.decoder.add_mixed if routed else self.decoder.mix
        part.x = mix(layer, w, part.x, mixed, rows)

    def _end_layer(self, layer: int, w: LayerTensors, parts: list) -> None:
        """Routed experts, once for all cells of a sweep, and what follows the MLP. parts: cells,
        rows, and the residual that entered the layer, where MLPs read that."""
        if self.config.experts_of(layer) is not None and parts:
            cells = [(part.x, rows, entered) for part, rows, entered in parts]
            for (part, *_), x in zip(parts, self.decoder.add_routed(layer, w, cells), strict=True):
                part.x = x
        for part, rows, _ in parts:
            part.x = self.decoder.end(layer, w, part.x, rows, part.given)

    def _ends_at(self, part: _CellRows, stop: int) -> bool:
        return part.cell * self.geometry.cell_tokens + part.rows.stop >= stop

    def _query(self, cell: int, q: torch.Tensor, rows: slice) -> Query:
        """Those of a cell's queries q (kv_heads, groups * cell_tokens, head_dim) that are attended
        for the sake of `rows`: all of them where a row's bits depend on how many there are, and
        two at least, since one is decoded."""
        cells, first, count = self.geometry.cell_tokens, 0, self.geometry.cell_tokens
        if rows_stand_alone(self.device):
            first, count = min(rows.start, cells - 2), max(2, rows.stop - rows.start)
        if count < cells:
            q = q.unflatten(1, (-1, cells))[:, :, first : first + count].flatten(1, 2)
        return Query(q, count, cell * cells + first, cell)

    # From here on keys and values are spoken of: `kv` is a layer's number among those that attend.

    def _attend(self, sequence, kv: int, queries: list[Query], bias) -> list[torch.Tensor]:
        self._wish_ahead(sequence, kv, queries[0], decodes=queries[0].rows == 1)
        return self.attention.run(kv, sequence, queries, self._window(kv), bias)

    def _wish_ahead(self, sequence, kv: int, query: Query, *, decodes: bool) -> None:
        """Ask for all pages of a layer and of the next one, unless that one selects from them.
        query: the first, of a cell or of one or more tokens that are decoded."""
        if self.overlap:
            following = (kv + 1) % self._num_kv_layers
            if not decodes and self.config.shares_kv(self.config.kv_layers[following]):
                following = 0  # prefill passes those by, but for its last token
            self._wish(sequence, kv, query, decodes)
            if not (decodes and self._selects(following)):
                self._wish(sequence, following, query, decodes)

    def _selects(self, kv: int | None) -> bool:
        """Whether decode chooses among a layer's pages: a sliding window's few are all attended."""
        return self.selected is not None and kv is not None and self._window(kv) is None

    def _rehearse(
        self, sequence: Sequence, layer: int, x: torch.Tensor, position: int, *, early: bool
    ) -> None:
        """Ask for what a layer is expected to select, from the residual (1, residual_size) of the
        layer before, as if no more than usual were added to it: at one of two points, see
        IssuePoint."""
        selected, kv = self.selected, self._kv[layer]
        is_wanted = selected.wants_query(kv, sequence)
        w = self.weights.resident_layer(layer) if is_wanted else None
        if w is None:
            if early:
                selected.expect(kv, sequence, None, None)
            return
        is_due = selected.issue_point.is_early(kv) == early
        if is_due or (early and selected.issue_point.is_looking(position)):
            expected = selected.expected(kv, x, early=early)
            q = self.decoder.queries(layer, w, expected, slice(0, 1), position)
            if early:
                selected.issue_point.guess(kv, q)
            if is_due:
                query = Query(q, 1, position, position // self.geometry.cell_tokens)
                selected.expect(kv, sequence, query, self._page_bias(w))

    def _wish(self, sequence: Sequence, kv: int, query: Query, decodes: bool) -> None:
        """Ask for a layer's pages ahead of time: what the predictor says, or a window's spans."""
        window = self._window(kv)
        if window is None:
            self.store.prefetch(sequence.table, kv)
        else:
            first = query.position if decodes else query.cell * self.geometry.cell_tokens
            spans = self.attention.spans_wanted(kv, first, query.cell, window)
            self.store.prefetch(sequence.table, kv, list(spans))

    def _window(self, kv: int) -> int | None:
        return self.config.kv_windows[kv]

    def _page_bias(self, w: LayerTensors) -> torch.Tensor | None:
        """The key bias that quantised pages leave out; full pages hold keys as they are."""
        return None if self.geometry.layout.is_full else self.decoder.key_bias(w)

    def _seal(self, sequence: Sequence, kv: int, cell: int, bias: torch.Tensor | None) -> None:
        """Send a raw cell home, unless it is there already (after an interrupted sweep)."""
        layout = self.attention.layouts[kv]
        first = cell * (count := self.geometry.cell_records_of(layout))
        if cell < 0 or sequence.table.num_records(kv) > first:
            return
        if not self.sequences.windows.keeps_pages(kv):
            self.store.skip(sequence.table, kv, count)
            return
        if first % self.geometry.records_per_span == 0:
            self.sequences.let_go(sequence, kv)
        k, v = (part.transpose(0, 1) for part in sequence.raw.cell(kv, cell))
        if bias is not None:
            cells, rope = self.geometry.cell_tokens, self.attention.ropes[kv]
            k = k.float() - rope.turn_bias(bias, cell * cells, cells)
        try:
            near, records = seal(k, v, layout)
        except FloatingPointError as error:
            first = cell * self.geometry.cell_tokens
            raise ModelError(
                f"layer {self.config.kv_layers[kv]}: keys or values of tokens {first} and on "
                f"cannot be quantised ({error}). Use --kv-bits full."
            ) from error
        self.store.write(sequence.table, kv, first, near, records)

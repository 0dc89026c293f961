"""A sweep of prefill: some cells of a sequence go through each layer together.

Weights and far planes are read once for all of them; every cell's arithmetic is the same whatever
the sweep.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..layers.attention import Query
from ..layers.decoder import Decoder, Mixed
from ..layers.layer_pages import LayerPages
from ..pages.geometry import Geometry
from ..planning.device import rows_stand_alone
from ..weights.weights import LayerTensors, WeightStore
from .sequence import Sequence


@dataclass
class CellRows:
    """One cell's share of a sweep: residual rows and which of them are new."""

    cell: int
    rows: slice
    x: torch.Tensor  # (cell_tokens, residual_size)
    given: torch.Tensor | None  # (num_layers, cell_tokens, size), see PerLayer


class Sweeper:
    """Of one model over one page store. most_cells: of a sweep; changes memory and time, never a
    result."""

    def __init__(
        self,
        decoder: Decoder,
        weights: WeightStore,
        pages: LayerPages,
        geometry: Geometry,
        device: torch.device,
        most_cells: int,
    ):
        self._config, self._decoder, self._weights = decoder.config, decoder, weights
        self._pages, self._geometry = pages, geometry
        self._device, self._most_cells = device, most_cells
        self._kv, self._state = self._config.kv_places, self._config.state_places

    def next(self, sequence: Sequence, stop: int) -> list[CellRows]:
        """The pending tokens before `stop` in as many cells as go together, as they enter the first
        layer."""
        cells, sweep, start = self._geometry.cell_tokens, [], sequence.length
        while start < stop and len(sweep) < self._most_cells:
            cell = start // cells
            end = min((cell + 1) * cells, stop)
            rows = slice(start - cell * cells, end - cell * cells)
            x = torch.zeros(cells, self._config.hidden_size, device=self._device)
            tokens = sequence.tokens[start:end]
            x[rows] = self._weights.embed(tokens)
            sweep.append(CellRows(cell, rows, *self._weights.entering(tokens, x, rows)))
            start = end
        return sweep

    def run_layer(
        self, sequence: Sequence, layer: int, sweep: list[CellRows], stop: int, needs_all: bool
    ) -> None:
        """One layer for a whole sweep: keys and values first, then attention, then, cell after
        cell, states and the MLP. Unless it needs all, what later tokens need of the layer is at
        most keys, values and states, and its output for the row before `stop` alone goes on."""
        w, kv, state = self._weights.layer(layer), self._kv[layer], self._state[layer]
        wanted = {index: part.rows for index, part in enumerate(sweep)}
        if not needs_all:
            end = sweep[-1].rows.stop
            is_end = self._ends_at(sweep[-1], stop)
            wanted = {len(sweep) - 1: slice(end - 1, end)} if is_end else {}
        attended = {} if kv is None else self._attend_cells(sequence, layer, kv, w, sweep, wanted)
        entered = [part.x if self._config.parallel_mlp else None for part in sweep]
        for index, part in enumerate(sweep):
            mixed = []
            if index in attended:
                query, out, gate = attended[index]
                placed, rows = self._placed(query, out), wanted[index]
                mixed.append(self._decoder.attention_output(layer, w, placed, gate, rows))
            if state is not None:
                assert sequence.states is not None
                before, after = sequence.states.of(index, state)
                mixed.append(self._decoder.recur(layer, w, part.x, part.rows, before, after))
            if index in wanted:
                self._mix(layer, w, part, mixed, wanted[index])
        self._end_layer(layer, w, [(sweep[i], rows, entered[i]) for i, rows in wanted.items()])

    def _attend_cells(
        self, sequence, layer: int, kv: int, w: LayerTensors, sweep: list[CellRows], wanted: dict
    ) -> dict[int, tuple[Query, torch.Tensor, torch.Tensor | None]]:
        """Keys and values of a sweep's cells go to their places, if the layer has some; of cells of
        which some rows are wanted: queries, what they attended to, and the gate of that."""
        queries, gates = [], []
        bias, shares = self._pages.bias(w), self._config.shares_kv(layer)
        for index, part in enumerate(sweep):
            if shares and index not in wanted:
                continue
            position, new = part.cell * self._geometry.cell_tokens, part.rows
            rows = wanted[index] if shares else new
            part.x = self._decoder.predicted(w, part.x, rows)
            q, own, gate = self._decoder.project(layer, w, part.x, rows, position)
            if own is not None:
                self._pages.seal(sequence, kv, part.cell - 2, bias)
                sequence.raw.write(kv, part.cell, new.start, *(of[new] for of in own))
            if index in wanted:
                queries.append(self._query(part.cell, q, wanted[index]))
                gates.append(gate)
        if not queries:
            return {}
        outs = self._pages.attend(sequence, kv, queries, bias)
        return dict(zip(wanted, zip(queries, outs, gates, strict=True), strict=True))

    def _placed(self, query: Query, out: torch.Tensor) -> torch.Tensor:
        """What was attended to, at its rows of a cell."""
        cells = self._geometry.cell_tokens
        attended = out.new_zeros(cells, out.shape[1])
        attended[query.position % cells :][: query.rows] = out
        return attended

    def _mix(self, layer: int, w: LayerTensors, part: CellRows, mixed: Mixed, rows: slice) -> None:
        """The second half of a layer; with routed experts `_end_layer` is a part of it."""
        routed = self._config.experts_of(layer) is not None
        mix = self._decoder.add_mixed if routed else self._decoder.mix
        part.x = mix(layer, w, part.x, mixed, rows)

    def _end_layer(self, layer: int, w: LayerTensors, parts: list) -> None:
        """Routed experts, once for all cells of a sweep, and what follows the MLP. parts: cells,
        rows, and the residual that entered the layer, where MLPs read that."""
        if self._config.experts_of(layer) is not None and parts:
            cells = [(part.x, rows, entered) for part, rows, entered in parts]
            for (part, *_), x in zip(parts, self._decoder.add_routed(layer, w, cells), strict=True):
                part.x = x
        for part, rows, _ in parts:
            part.x = self._decoder.end(layer, w, part.x, rows, part.given)

    def _ends_at(self, part: CellRows, stop: int) -> bool:
        return part.cell * self._geometry.cell_tokens + part.rows.stop >= stop

    def _query(self, cell: int, q: torch.Tensor, rows: slice) -> Query:
        """Those of a cell's queries q (kv_heads, groups * cell_tokens, head_dim) that are attended
        for the sake of `rows`: all of them where a row's bits depend on how many there are, and
        two at least, since one is decoded."""
        cells, first, count = self._geometry.cell_tokens, 0, self._geometry.cell_tokens
        if rows_stand_alone(self._device):
            first, count = min(rows.start, cells - 2), max(2, rows.stop - rows.start)
        if count < cells:
            q = q.unflatten(1, (-1, cells))[:, :, first : first + count].flatten(1, 2)
        return Query(q, count, cell * cells + first, cell)

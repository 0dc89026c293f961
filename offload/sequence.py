"""The state of one token sequence: its tokens, its sealed pages' table, and the recent tokens that
are still raw.

    cell      0 ........ c-2 | c-1 | c
    keys      sealed pages   | raw | raw     + the sink (the first page), raw for ever

A query in cell c sees cells c and c-1 raw and everything before sealed, so what a token sees
depends on its position alone: not on the budget, nor on the pieces in which text came. Cell c-2 is
sealed when the first token of cell c is processed. Knows no weights and computes nothing.
"""

from __future__ import annotations

from array import array
from collections import deque
from copy import copy

import torch

from ..kernels.layout import PageLayout
from ..kernels.raw_rows import store_rows
from ..prefetch.trail import Trail
from .states import States

MOST_SNAPSHOTS = 2  # of a session: of raw cells and the newest state


def raw_slots(sweep_cells: int) -> int:
    """How many raw cells are kept, where prefill takes so many at once."""
    return max(2, sweep_cells + 1)


class RawPages:
    """Keys and values of the newest cells and of the sink, in the model's own dtype: of `layout`.

    A ring: cell c lies in slot c % num_slots, and only the newest num_slots cells are there. Each
    buffer is (num_layers, num_slots, kv_heads, cell_tokens, head_dim). Values that are the keys are
    the same buffers.
    """

    def __init__(
        self, layout: PageLayout, num_layers: int, num_slots: int, cell_tokens: int, device
    ):
        kv_heads, head_dim, dtype = layout.kv_heads, layout.head_dim, layout.raw_dtype
        sink_tokens, self._shares_values = layout.page_tokens, layout.shares_values
        shape = (num_layers, num_slots, kv_heads, cell_tokens, head_dim)
        sink = (num_layers, kv_heads, sink_tokens, head_dim)
        self.keys, self.sink_keys = (
            torch.zeros(size, dtype=dtype, device=device) for size in (shape, sink)
        )
        self.values, self.sink_values = self.keys, self.sink_keys
        if not self._shares_values:
            self.values, self.sink_values = map(torch.zeros_like, (self.keys, self.sink_keys))
        self.num_slots = num_slots
        # Asked for in every layer of every decoded token, and dear where no cache holds them.
        self._row_bytes = head_dim * dtype.itemsize
        self._head_bytes = cell_tokens * self._row_bytes
        self._cell_bytes = kv_heads * self._head_bytes
        self._keys_at, self._values_at = self.keys.data_ptr(), self.values.data_ptr()
        self._sink_keys_at = self.sink_keys.data_ptr()
        self._sink_values_at = self.sink_values.data_ptr()
        self._sink_tokens, self._sink_bytes = sink_tokens, kv_heads * sink_tokens * self._row_bytes

    @staticmethod
    def num_bytes(layout: PageLayout, num_layers: int, num_slots: int, cell_tokens: int) -> int:
        tokens, kinds = num_slots * cell_tokens + layout.page_tokens, 2 - layout.shares_values
        numbers = kinds * num_layers * layout.kv_heads * tokens * layout.head_dim
        return numbers * layout.raw_dtype.itemsize

    def write(self, layer: int, cell: int, row: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Store rows [row, row + n) of a cell; k and v are (n, kv_heads, head_dim). v is not looked
        at where values are the keys."""
        stop, slot = row + k.shape[0], cell % self.num_slots
        store_rows(k, self.keys[layer, slot, :, row:stop])
        if not self._shares_values:
            store_rows(v, self.values[layer, slot, :, row:stop])
        sink_tokens = self.sink_keys.shape[2]
        if cell == 0 and row < sink_tokens:
            last = min(stop, sink_tokens)
            self.sink_keys[layer, :, row:last] = self.keys[layer, slot, :, row:last]
            self.sink_values[layer, :, row:last] = self.values[layer, slot, :, row:last]

    def places(self, layer: int, cell: int, row: int) -> list[int]:
        """Where a row is written, as LayerStep.project_into takes it; the sink's rows are kept
        twice.
        """
        places = self.run(layer, cell, row, row + 1)[:-1]
        if cell == 0 and row < self._sink_tokens:
            places += self.sink_run(layer, row)[:-1]
        return places

    def cell(self, layer: int, cell: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a cell: views, each (kv_heads, cell_tokens, head_dim)."""
        slot = cell % self.num_slots
        return self.keys[layer, slot], self.values[layer, slot]

    def run(self, layer: int, cell: int, first: int, stop: int) -> list[int]:
        """Where rows first .. stop - 1 of a cell lie, as kernels.layer_attention.Raw has it."""
        at = cell % self.num_slots * self._cell_bytes + first * self._row_bytes
        at += layer * self.num_slots * self._cell_bytes
        places = [self._keys_at + at, self._values_at + at, self._head_bytes]
        return [*places, self.num_slots * self._cell_bytes, stop - first]

    def sink_run(self, layer: int, first: int) -> list[int]:
        """The same of the sink's rows from `first` on."""
        at = layer * self._sink_bytes + first * self._row_bytes
        places = [self._sink_keys_at + at, self._sink_values_at + at]
        head_bytes = self._sink_tokens * self._row_bytes
        return [*places, head_bytes, self._sink_bytes, self._sink_tokens - first]

    def copy_from(self, other: RawPages) -> None:
        for name in ("keys", "values", "sink_keys", "sink_values"):
            getattr(self, name).copy_(getattr(other, name))


class Sequence:
    """Tokens and their KV. The first `length` are processed; `tokens` may hold more, which wait.

    Invariants
      1. Every processed token lies in exactly one of: a sealed page of the table, or a raw cell.
      2. The table holds all cells before cell(length - 1) - 1 for every layer, and never less.
      3. Rows of raw cells at or behind `length` are garbage that no mask lets through.

    states: of the layers that have one in place of keys and values; None where all have those.
    """

    def __init__(self, table, raw: RawPages, states: States | None, cell_tokens: int):
        self.table = table
        self.raw, self.states = raw, states
        self.cell_tokens = cell_tokens
        self.trail = Trail()
        self.tokens = array("i")
        # The processed ones; of those that were decoded, not prefilled, the complement: their keys
        # and values have other bits.
        self.processed = array("i")
        self.remembered = array("i")  # the same of before, where tokens are not processed now
        self.kept_tokens = 0  # where one could go on by the prefix store, as far as is known
        self.oldest_raw_cell = 0  # cells before it are gone from the ring
        # Whether the table holds no more than it should: not while something may be interrupted.
        self.is_settled = True
        # Of tokens that were verified and are not taken in: what is to be counted if they are.
        self.verified: deque[list] = deque()

    def twin(self, trail: Trail) -> Sequence:
        """Another with the same pages and raw cells, and tokens and a length of its own. What it
        processes lies behind this one's end, in cells that `will_write` was told of."""
        other = copy(self)
        other.trail = trail
        other.tokens, other.processed = self.tokens[:], self.processed[:]
        other.remembered = array("i")
        return other

    @property
    def length(self) -> int:
        return len(self.processed)

    @property
    def num_prefilled(self) -> int:
        """Of the first tokens, those that prefill processed, up to the first that was decoded."""
        if min(self.processed, default=0) >= 0:
            return self.length
        return next(i for i, token in enumerate(self.processed) if token < 0)

    def as_computed(self) -> array:
        """All tokens as `processed` has them: as they were or will be. Pending ones count as they
        were processed before, as far as that is known."""
        computed, before = self.processed + self.pending(), self.remembered
        for index in range(self.length, min(len(before), len(computed))):
            if before[index] not in (computed[index], ~computed[index]):
                break  # from here on it is another text
            computed[index] = before[index]
        return computed

    def prefilled(self, length: int) -> None:
        """Tokens up to `length` were processed by prefill."""
        self.processed.extend(self.tokens[self.length : length])

    def decoded(self) -> None:
        """One more token was processed by decoding it."""
        self.processed.append(~self.tokens[self.length])

    def pending(self) -> array:
        """Tokens that were appended but not processed yet."""
        return self.tokens[self.length :]

    def will_write(self, newest_cell: int) -> None:
        """Raw cells up to `newest_cell` are about to be written; older ones leave the ring."""
        self.oldest_raw_cell = max(self.oldest_raw_cell, newest_cell - self.raw.num_slots + 1)

    def resume_point(self, length: int) -> int:
        """The most of the first `length` tokens, all of them processed, behind which one can go on:
        what a query there sees must still be there (see RawPages), and the states."""
        oldest = self.oldest_raw_cell
        if self.states is not None:
            return self.states.newest_before(length, oldest + 1 if oldest else 0)
        return length if max(0, length // self.cell_tokens - 1) >= oldest else 0

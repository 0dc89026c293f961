"""The state of one token sequence: its tokens, its sealed pages' table, and the recent tokens that
are still raw.

    cell      0 ........ c-2 | c-1 | c
    keys      sealed pages   | raw | raw     + the sink (the first page), raw for ever

A query in cell c sees cells c and c-1 raw and everything before sealed, so what a token sees
depends on its position alone: not on the budget, nor on the pieces in which text came. Cell c-2 is
sealed when the first token of cell c is processed. Knows no weights and computes nothing.
"""

from __future__ import annotations

import math
from array import array
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Items
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from ...kernels.layout import PageLayout
from ...kernels.raw_rows import store_rows
from ...kernels.token_step import THE_SINK, RawRows
from ...prefetch.trail import Trail
from ..layers.states import LayerState, States

if TYPE_CHECKING:
    from ..layers.selected_attention import Noted

MOST_SNAPSHOTS = 2  # of a session: of raw cells and the newest state


def raw_slots(sweep_cells: int) -> int:
    """How many raw cells are kept, where prefill takes so many at once."""
    return max(2, sweep_cells + 1)


class RawPages:
    """Keys and values of the newest cells and of the sink, in the model's own dtype: of `layout`.

    A ring: cell c lies in slot c % num_slots, and only the newest num_slots cells are there.
    layouts: of each layer that keeps pages; pages_of: as PageTable has it. keys and values: of each
    layer (num_slots, kv_heads, cell_tokens, head_dim), sink_keys and sink_values (kv_heads,
    page_tokens, head_dim). Layers lie one behind the other in memory. Values that are the keys are
    the same buffers. table: where each layer's rows lie, as TokenStep.run takes it.
    """

    def __init__(
        self,
        layouts: Items[PageLayout],
        pages_of: Items[int],
        num_slots: int,
        cell_tokens: int,
        device: torch.device,
    ):
        cells = [(num_slots, of.kv_heads, cell_tokens, of.head_dim) for of in layouts]
        sinks = [(of.kv_heads, of.page_tokens, of.head_dim) for of in layouts]
        self.dtype, self.num_slots = layouts[0].raw_dtype, num_slots
        self._shares_values, self._buffers = layouts[0].shares_values, []

        def views(shapes: list[tuple[int, ...]]) -> list[torch.Tensor]:
            sizes = [math.prod(shape) for shape in shapes]
            buffer = torch.zeros(sum(sizes), dtype=self.dtype, device=device)
            self._buffers.append(buffer)
            parts = zip(buffer.split(sizes), shapes, strict=True)
            made = [part.view(shape) for part, shape in parts]
            return [made[of] for of in pages_of]

        self.keys, self.sink_keys = views(cells), views(sinks)
        self.values, self.sink_values = self.keys, self.sink_keys
        if not self._shares_values:
            self.values, self.sink_values = views(cells), views(sinks)
        self.sink_tokens = layouts[0].page_tokens
        # Asked for in every layer of every decoded token, and dear where no cache holds them.
        self._at = [_Strides.of(*layer) for layer in zip(*self._views, strict=True)]
        self.table = torch.tensor(self._at, dtype=torch.int64)

    @property
    def _views(self) -> tuple[list[torch.Tensor], ...]:
        return self.keys, self.values, self.sink_keys, self.sink_values

    @staticmethod
    def num_bytes(layouts: Items[PageLayout], num_slots: int, cell_tokens: int) -> int:
        return sum(
            (2 - of.shares_values)
            * of.kv_heads
            * (num_slots * cell_tokens + of.page_tokens)
            * of.head_dim
            * of.raw_dtype.itemsize
            for of in layouts
        )

    def write(self, layer: int, cell: int, row: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Store rows [row, row + n) of a cell; k and v are (n, kv_heads, head_dim). v is not looked
        at where values are the keys."""
        stop, places = row + k.shape[0], [(k, self.sink_keys), (v, self.sink_values)]
        for here, (rows, sinks) in zip(self.cell(layer, cell), places, strict=True):
            store_rows(rows, here[:, row:stop])
            sink = sinks[layer]
            if cell == 0 and row < sink.shape[1]:
                last = min(stop, sink.shape[1])
                sink[:, row:last] = here[:, row:last]
            if self._shares_values:
                return

    def places(self, cell: int, row: int) -> list[RawRows]:
        """Where a row is written; the sink's rows are kept twice."""
        places = [self.rows(cell, row, row + 1)]
        if cell == 0 and row < self.sink_tokens:
            places.append(RawRows(THE_SINK, row, 1))
        return places

    def cell(self, layer: int, cell: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a cell: views, each (kv_heads, cell_tokens, head_dim)."""
        slot = cell % self.num_slots
        return self.keys[layer][slot], self.values[layer][slot]

    def rows(self, cell: int, first: int, stop: int) -> RawRows:
        """Rows first .. stop - 1 of a cell."""
        return RawRows(cell % self.num_slots, first, stop - first)

    def sink_rows(self, first: int) -> RawRows:
        """The sink's rows from `first` on."""
        return RawRows(THE_SINK, first, self.sink_tokens - first)

    def at(self, layer: int, rows: RawRows) -> tuple[int, int, int]:
        """Where the rows lie in a layer: the addresses of the first head's keys and values, and
        bytes from head to head."""
        of = self._at[layer]
        skipped = rows.first * of.row_bytes
        if rows.slot == THE_SINK:
            return of.sink_keys_at + skipped, of.sink_values_at + skipped, of.sink_head_bytes
        skipped += rows.slot * of.cell_bytes
        return of.keys_at + skipped, of.values_at + skipped, of.head_bytes

    def copy_from(self, other: RawPages) -> None:
        for own, theirs in zip(self._buffers, other._buffers, strict=True):
            own.copy_(theirs)


class _Strides(NamedTuple):
    """Where one layer's raw rows lie, in the order of TokenStep.run."""

    keys_at: int
    values_at: int
    sink_keys_at: int
    sink_values_at: int
    cell_bytes: int
    head_bytes: int
    sink_head_bytes: int
    row_bytes: int

    @staticmethod
    def of(
        keys: torch.Tensor,
        values: torch.Tensor,
        sink_keys: torch.Tensor,
        sink_values: torch.Tensor,
    ) -> _Strides:
        cell, head, row, _ = (stride * keys.itemsize for stride in keys.stride())
        return _Strides(
            keys.data_ptr(),
            values.data_ptr(),
            sink_keys.data_ptr(),
            sink_values.data_ptr(),
            cell,
            head,
            sink_keys.shape[1] * row,
            row,
        )


@dataclass
class Snapshot:
    """What it takes to go on behind a sequence's first `length` tokens as long as their pages are
    there: raw cells, the state of recurrent layers, and the last token's logits (vocab,).
    sealed_records: how many each layer had."""

    length: int
    oldest_raw_cell: int
    sealed_records: list[int]
    raw: RawPages
    state: torch.Tensor | None
    logits: torch.Tensor


class Verified(NamedTuple):
    """What a token was found to do, should it become part of the sequence: what is to be counted,
    and for each layer with a state what makes the one behind it, given the one before it."""

    notes: list[Noted]
    replays: list[Callable[[LayerState, LayerState], None]]


class Sequence:
    """Tokens and their KV. The first `length` are processed; `tokens` may hold more, which wait.

    Invariants
      1. Every processed token lies in exactly one of: a sealed page of the table, or a raw cell.
      2. The table counts all cells before cell(length - 1) - 1 for every layer, and never less. It
         holds their pages, but for what nobody will see any more through a layer's window.
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
        self.snapshots: list[Snapshot] = []  # of this sequence, from which one may go on
        self.kept_tokens = 0  # where one could go on by the prefix store, as far as is known
        self.oldest_raw_cell = 0  # cells before it are gone from the ring
        # Whether the table holds no more than it should: not while something may be interrupted.
        self.is_settled = True
        self.verified: deque[Verified] = deque()  # tokens that are not taken in yet

    def twin(self, trail: Trail) -> Sequence:
        """Another with the same pages and raw cells, and tokens and a length of its own. What it
        processes lies behind this one's end, in cells that `will_write` was told of."""
        other = copy(self)
        other.trail, other.verified = trail, deque()
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

    def left_after(self, length: int) -> int:
        """How many tokens are processed when those from `length` on are gone: up to where one can
        go on, by raw cells or a snapshot."""
        if length >= self.length:
            return self.length
        places = (s.length for s in self.snapshots if s.length <= length)
        return max(self.resume_point(length), *places, 0)

    def resume_point(self, length: int) -> int:
        """The most of the first `length` tokens, all of them processed, behind which one can go on:
        what a query there sees must still be there (see RawPages), and the states."""
        oldest = self.oldest_raw_cell
        if self.states is not None:
            return self.states.newest_before(length, oldest + 1 if oldest else 0)
        return length if max(0, length // self.cell_tokens - 1) >= oldest else 0

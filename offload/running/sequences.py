"""Sequences of one page store: opened, forked, brought back to an earlier length, closed.

Whatever changes raw cells or the table first says how many tokens count as processed until it is
done, so that an interruption leaves less, and never something else. Computes nothing.
"""

from __future__ import annotations

import torch

from ..layers.states import States
from ..models.model_config import ModelConfig
from ..pages.geometry import Geometry
from ..pages.page_table import PageTable
from ..pages.pager import PageStore
from ..pages.windows import Windows
from .sequence import RawPages, Sequence, Snapshot, raw_slots


class Sequences:
    """sweep_cells: how many cells prefill takes at once, at most."""

    def __init__(
        self,
        config: ModelConfig,
        store: PageStore,
        geometry: Geometry,
        device: torch.device,
        sweep_cells: int,
    ):
        self._config, self._store, self._geometry = config, store, geometry
        self._device, self.sweep_cells = device, sweep_cells
        self._layouts = geometry.layouts(range(config.num_page_layers))
        self.windows = Windows(config, geometry)

    def open(self, expected_tokens: int) -> Sequence:
        """An empty sequence. expected_tokens: how long it may become, for the policy."""
        spans = -(-expected_tokens // self._geometry.most_span_tokens)
        return self._sequence(self._store.open_table(spans))

    def fork(self, sequence: Sequence) -> Sequence:
        """A sequence that shares all sealed pages and owns a copy of the raw ones."""
        self.settle(sequence)
        table = self._store.fork(sequence.table)
        try:
            return self._forked(sequence, table)
        except BaseException:
            self._store.close_table(table)
            raise

    def _forked(self, sequence: Sequence, table: PageTable) -> Sequence:
        other = self._sequence(table)
        other.raw.copy_from(sequence.raw)
        if other.states is not None and sequence.states is not None:
            other.states.copy_from(sequence.states)
        other.tokens = sequence.tokens[:]
        other.processed, other.oldest_raw_cell = sequence.processed[:], sequence.oldest_raw_cell
        other.kept_tokens = sequence.kept_tokens
        for layer in range(self._config.num_page_layers):  # what only its snapshots see
            self.let_go(other, layer)
        return other

    def rewind(self, sequence: Sequence, length: int) -> None:
        """Make `length` the number of processed tokens, or less, see `Sequence.resume_point`; the
        tokens stay. Where the raw cells that its neighbours saw are gone, it becomes 0: a sealed
        copy of them would give other bits.
        """
        self.begin_anew(sequence, sequence.resume_point(length))
        self.settle(sequence)

    def snapshot(
        self, sequence: Sequence, logits: torch.Tensor, old: Snapshot | None = None
    ) -> Snapshot:
        """Of a sequence as it is, in the memory of an old one that nobody needs."""
        length, state = sequence.length, None
        raw = self.new_raw() if old is None else old.raw
        raw.copy_from(sequence.raw)
        if sequence.states is not None:
            state = sequence.states.at(length).clone()
        sealed = list(map(sequence.table.num_records, range(sequence.table.num_layers)))
        return Snapshot(length, sequence.oldest_raw_cell, sealed, raw, state, logits)

    def rewind_to(self, sequence: Sequence, snapshot: Snapshot) -> None:
        """The same, where the raw cells or the state are gone, and a snapshot was taken."""
        length, states = snapshot.length, sequence.states
        processed = sequence.processed[:length]
        self.begin_anew(sequence)
        # What was sealed behind it is not of its raw cells, see `pass_over`.
        self._store.truncate(sequence.table, snapshot.sealed_records)
        sequence.raw.copy_from(snapshot.raw)
        sequence.oldest_raw_cell = snapshot.oldest_raw_cell
        if states is not None:
            states.forget_behind(length)
            if not states.knows(length):
                assert snapshot.state is not None
                states.name(states.room().copy_(snapshot.state), length)
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
        """Drop what lies in the table beyond the processed tokens, and the snapshots that saw it:
        something was interrupted, and the tokens that it was sealed for may be others by now. And
        what was verified and not taken in: the text goes on otherwise."""
        sequence.verified.clear()
        if not sequence.is_settled:
            length = sequence.length
            if length == 0:  # all is written anew: what no query saw from where it was, too
                sequence.oldest_raw_cell = 0
            sequence.snapshots = [s for s in sequence.snapshots if s.length <= length]
            self._store.truncate(sequence.table, self._sealed_records(length))
            sequence.is_settled = True

    def let_go(self, sequence: Sequence, layer: int) -> None:
        """Drop the spans of a layer that no query of the sequence will see any more. Called before
        another one begins."""
        if self.windows.bounds(layer):
            self._store.drop(sequence.table, layer, self.windows.spans_seen(layer, sequence))

    def pass_over(self, sequence: Sequence, layer: int, num_records: int) -> None:
        """Count a layer's first records as if they were there, where it has fewer: no query of the
        sequence will see them. They are whole spans, where the layer keeps pages; in one of which a
        snapshot sees the beginning, the rest is zeros."""
        self.let_go(sequence, layer)
        store, table = self._store, sequence.table
        have = table.num_records(layer)
        if have < num_records and table.ends_in_extent(layer):
            count = -have % table.records_per_span
            near = torch.zeros(count, store.near_record_bytes[layer], dtype=torch.uint8)
            records = torch.zeros(count, store.record_bytes, dtype=torch.uint8)
            store.write(table, layer, have, near, records)
            have += count
        if have < num_records:
            store.skip(table, layer, num_records - have)

    def close(self, sequence: Sequence) -> None:
        self._store.close_table(sequence.table)

    def new_raw(self) -> RawPages:
        """Empty raw pages, as a sequence or a snapshot of one needs them."""
        return RawPages(
            self._layouts,
            self._config.kv_pages,
            raw_slots(self.sweep_cells),
            self._geometry.cell_tokens,
            self._device,
        )

    def _sequence(self, table: PageTable) -> Sequence:
        states, recurrent = None, self._config.recurrent
        if recurrent:
            num_copies = States.num_copies(self.sweep_cells)
            states = States(recurrent, num_copies, self._geometry.cell_tokens, self._device)
        return Sequence(table, self.new_raw(), states, self._geometry.cell_tokens)

    def _sealed_records(self, length: int) -> list[int]:
        """The most that each layer's table may hold of a text of `length` tokens."""
        cells = max(0, length // self._geometry.cell_tokens - 1)
        return [cells * self._geometry.cell_records_of(layout) for layout in self._layouts]

"""Some records of a layer, wherever they lie: what attention over a selection is given.

    near_plane   what a selection is made from: always there, on the compute device
    prefetch     wishes for records that the next selection is expected to hold
    fetch        the selection, attended in place: views of memory, or of the hot records' frames

Knows tables and records, and no codec. The owner of the tables is `pager`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch

from ..prefetch.stats import Stats
from .hot_records import HotRecords
from .page_table import PageTable, Tier
from .planes import Planes
from .record_map import TIERS, RecordMap, make_record_map
from .selected import Selected, Source
from .span_addresses import SpanAddresses, TableAddresses, table_addresses

_ON_DISK = TIERS.index(Tier.DISK)


class RecordReader:
    """Reads by record number; a layer's records are numbered from 0. hot: None without a disk
    tier, or where nobody selects."""

    def __init__(self, planes: Planes, hot: HotRecords | None, stats: Stats, record_bytes: int):
        self._planes, self._hot, self._stats = planes, hot, stats
        self._record_bytes = record_bytes
        self._maps: dict[tuple[PageTable, int], RecordMap] = {}
        self._addresses: dict[tuple[PageTable, int], SpanAddresses] = {}
        self._tables: dict[PageTable, tuple[int, TableAddresses | None]] = {}

    def near_plane(self, table: PageTable, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Near planes, (num_frames, near_record_bytes) uint8 on the compute device, and which rows
        of them, (num_records,) int64, are the layer's records, in order."""
        return self._planes.near_frames(layer), self._map(table, layer).near_rows

    def addresses(self, table: PageTable, layer: int) -> SpanAddresses | None:
        """Where the layer's spans start in memory; None where they are not read in place."""
        planes, where = self._planes, self._map(table, layer)
        if planes.must_copy or planes.compute_device.type != "cpu":
            return None
        found = self._addresses.get((table, layer))
        if found is None or found.where is not where:
            arenas = {tier: planes.frames(tier) for tier in (Tier.DEVICE, Tier.HOST)}
            found = SpanAddresses(where, planes.near_frames(layer), arenas)
            self._addresses[table, layer] = found
        return found

    def table_addresses(self, table: PageTable) -> TableAddresses | None:
        """Where all layers' records start, if all lie in memory and are read in place."""
        found = self._tables.get(table)
        if found is None or found[0] != table.version:
            layers = [self.addresses(table, layer) for layer in range(table.num_layers)]
            whole = None if None in layers else table_addresses(layers)
            found = self._tables[table] = table.version, whole
        return found[1]

    def prefetch(self, table: PageTable, layer: int, records: Sequence[int]) -> None:
        """Wishes for records, most urgent first, in place of earlier ones for the layer.

        What is in memory, or not there at all, is passed over. Never blocks.
        """
        if self._hot is None:
            return
        where = self._map(table, layer)
        wanted = np.asarray(records, dtype=np.int64)
        wanted = wanted[(wanted >= 0) & (wanted < len(where.tier))]
        wanted = wanted[where.tier[wanted] == _ON_DISK]
        wanted = wanted[np.sort(np.unique(wanted, return_index=True)[1])]  # each once, in order
        self._hot.wish(where.frame[wanted], (table, layer))

    def any_on_disk(self, table: PageTable, layer: int) -> bool:
        """Whether reading ahead could be of use for a layer."""
        return _ON_DISK in self._map(table, layer).tiers

    def lacked_bytes(self, table: PageTable, layer: int) -> float:
        """What the layer's selections had to read from disk lately, ahead or not; a mean."""
        return self._hot.lacked((table, layer)) * self._record_bytes if self._hot else 0.0

    def is_ready(self, table: PageTable, layer: int, records: Sequence[int]) -> np.ndarray:
        """Which of the records (bool) could be fetched now without waiting."""
        where, wanted = self._map(table, layer), np.asarray(records, dtype=np.int64)
        is_ready = where.tier[wanted] != _ON_DISK
        if self._hot is not None:
            on_disk = np.flatnonzero(~is_ready)
            is_ready[on_disk] = self._hot.ready(where.frame[wanted[on_disk]])
        return is_ready

    def fetch(
        self, table: PageTable, layer: int, records: Sequence[int], *, is_look: bool = False
    ) -> Iterator[Selected]:
        """The records (ascending, each once), a batch at a time: as many as the hot records hold.

        is_look: they are no selection, and say nothing about what the next one will be.

        Reading begins with this call; what an earlier one began and nobody took is let go. Each
        batch is for a `with` block, before the next is asked for, which is being read meanwhile.
        Asking for one blocks until it is there. Raises StorageError when records cannot be read or
        are damaged.
        """
        where, wanted = self._map(table, layer), np.asarray(records, dtype=np.int64)
        if self._hot is None:
            assert _ON_DISK not in where.tiers, "no frames for records from disk"
            return iter([self._select(where, wanted, None)] if len(wanted) else [])
        on_disk = where.frame[wanted[where.tier[wanted] == _ON_DISK]]
        self._hot.open_selection(on_disk, None if is_look else (table, layer))
        # A batch ends where it would hold more records from disk than it may.
        num_before = np.maximum(np.cumsum(where.tier[wanted] == _ON_DISK) - 1, 0)
        ends = np.flatnonzero(np.diff(num_before // self._hot.most_demanded)) + 1
        batches = np.split(wanted, ends) if len(wanted) else []
        begun = deque()
        if batches:
            begun.append(self._begin(where, batches[0], (table, layer), waits=True))
            self._begin_more(where, batches, (table, layer), begun, 0)
        return self._batches(where, batches, (table, layer), begun)

    def _batches(self, where: RecordMap, batches, group, begun: deque) -> Iterator[Selected]:
        """begun: frames of the batches whose reading has begun."""
        for i, batch in enumerate(batches):
            if not begun:
                begun.append(self._begin(where, batch, group, waits=True))
            self._begin_more(where, batches, group, begun, i)
            yield self._select(where, batch, begun.popleft())

    def _begin_more(self, where: RecordMap, batches, group, begun: deque, i: int) -> None:
        """Begins to read what there is room for, of the batches from the i-th on."""
        while i + len(begun) < len(batches):
            frames = self._begin(where, batches[i + len(begun)], group, waits=False)
            if frames is None:
                return
            begun.append(frames)

    def _begin(self, where: RecordMap, batch: np.ndarray, group, *, waits: bool):
        """Frames of the batch's records from disk; None where there is no room for them now."""
        on_disk = batch[where.tier[batch] == _ON_DISK]
        return self._hot.begin(where.frame[on_disk], group, waits=waits)

    def count(self, table: PageTable, layer: int, records: np.ndarray) -> None:
        """Counts records that were attended where they lie in memory."""
        where = self._map(table, layer)
        for index in where.tiers:
            num = int((where.tier[records] == index).sum())
            self._stats.resident += num
            self._stats.bytes_read[TIERS[index].value] += num * self._record_bytes

    def forget(self, table: PageTable) -> None:
        """The table is closed."""
        if self._hot is not None:
            for key in self._maps:
                if key[0] is table:
                    self._hot.leave(key)
        self._maps = {key: kept for key, kept in self._maps.items() if key[0] is not table}
        self._addresses = {
            key: kept for key, kept in self._addresses.items() if key[0] is not table
        }
        self._tables.pop(table, None)

    def _select(self, where: RecordMap, records: np.ndarray, frames) -> Selected:
        """frames: where the records from disk are being read to; waits for them."""
        planes, sources, release = self._planes, [], None
        device = planes.compute_device
        for index in where.tiers:
            tier, places = TIERS[index], np.flatnonzero(where.tier[records] == index)
            if not len(places):
                continue
            if tier is Tier.DISK:
                self._hot.finish(frames)
                release, arena, rows = partial(self._hot.release, frames), self._hot.frames, frames
            else:
                self._stats.resident += len(places)
                self._stats.bytes_read[tier.value] += len(places) * self._record_bytes
                arena, rows = planes.frames(tier), where.frame[records[places]]
            rows = torch.from_numpy(rows)
            if tier is not Tier.DEVICE and planes.must_copy:  # one copy for all of them
                arena = arena.index_select(0, rows).to(device)
                rows = torch.arange(len(places))
            sources.append(Source(arena, rows, torch.from_numpy(places)))
        near_rows = where.near_rows[torch.from_numpy(records).to(device)]
        return Selected(planes.near_frames(where.layer), near_rows, sources, release)

    def _map(self, table: PageTable, layer: int) -> RecordMap:
        found = self._maps.get((table, layer))
        if found is None or found.version != table.version:
            found = make_record_map(table, layer, self._planes.compute_device)
            self._maps[table, layer] = found
        return found

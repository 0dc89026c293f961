"""Some records of a layer, wherever they lie: what attention over a selection is given.

    near_plane   what a selection is made from: always there, on the compute device
    prefetch     wishes for records that the next selection is expected to hold
    fetch        the selection, attended in place: views of memory, or of the hot records' frames

Knows tables and records, and no codec. The owner of the tables is `pager`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from ...kernels.token_step import AtHand
from ...prefetch.stats import Stats
from .hot_records import HotRecords
from .page_table import PageTable, Tier
from .planes import Planes
from .record_map import TIERS, RecordMap, make_record_map
from .selected import Placed, Selected, Source
from .span_addresses import SpanAddresses, TableAddresses

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

_ON_DISK = TIERS.index(Tier.DISK)


class _Demand:
    """A selection's records from disk: what is there is begun first, the rest as there is room, and
    all are given as they come. numbers: (n,) int64, in record order; group: whose selection they
    are. hot: None where nothing is on disk."""

    def __init__(self, hot: HotRecords | None, numbers: np.ndarray, group, is_look: bool):
        assert hot is not None or not len(numbers), "no frames for records from disk"
        self._hot, self._numbers = hot, numbers
        self._begun: deque[tuple[np.ndarray, np.ndarray]] = deque()  # indices, frames
        self._left = np.arange(len(numbers))  # indices of those that were not begun
        if hot is not None:
            is_there = hot.open_selection(numbers, None if is_look else group)
            self._left = np.argsort(~is_there, kind="stable")
            self._begin(waits=False)

    def is_any_there(self) -> bool:
        """Whether the first part needs no waiting."""
        if self._hot is None or not len(self._numbers):
            return False
        return bool(self._hot.ready(self._numbers).any())

    def parts(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Some of the records, their indices (ascending) and their frames, pinned until they are
        released: what is there, then what has come meanwhile. Blocks until there is more."""
        while self._begun or len(self._left):
            assert self._hot is not None
            if not self._begun:
                self._begin(waits=True)
            begun, frames = self._begun.popleft()
            for come in self._hot.arrivals(frames):
                come = come[np.argsort(begun[come])]
                yield begun[come], frames[come]
                self._begin(waits=False)

    def _begin(self, *, waits: bool) -> None:
        """Begins to read what there is room for. waits: for room for one of them."""
        if self._hot is None or not len(self._left):
            return
        frames = self._hot.begin(self._numbers[self._left], waits=waits)
        if len(frames):
            self._begun.append((self._left[: len(frames)], frames))
            self._left = self._left[len(frames) :]


class RecordReader:
    """Reads by record number; a layer's records are numbered from 0. hot: None without a disk
    tier, or where nobody selects."""

    def __init__(self, planes: Planes, hot: HotRecords | None, stats: Stats, record_bytes: int):
        self._planes, self._hot, self._stats = planes, hot, stats
        self._record_bytes = record_bytes
        self._maps: dict[tuple[PageTable, int], RecordMap] = {}
        self._addresses: dict[tuple[PageTable, int], SpanAddresses] = {}
        self._tables: dict[PageTable, tuple[int, TableAddresses | None]] = {}

    @property
    def reads_in_place(self) -> bool:
        """Whether what is in memory is read where it lies, by the CPU."""
        return not self._planes.must_copy and self._planes.compute_device.type == "cpu"

    def near_plane(self, table: PageTable, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Near planes, (num_frames, near_record_bytes) uint8 on the compute device, and which rows
        of them, (num_records,) int64, are the layer's records, in order."""
        return self._planes.near_frames(layer), self._map(table, layer).near_rows

    def addresses(self, table: PageTable, layer: int) -> SpanAddresses | None:
        """Where the layer's spans start in memory; None where they are not read in place. A GPU
        reads those in its own memory so."""
        planes = self._planes
        tiers = (Tier.DEVICE, Tier.HOST) if self.reads_in_place else (Tier.DEVICE,)
        if planes.must_copy and planes.compute_device.type != "cuda":
            return None
        where = self._map(table, layer)
        found = self._addresses.get((table, layer))
        if found is None or found.where is not where:
            arenas = {tier: planes.frames(tier) for tier in tiers}
            found = SpanAddresses(where, planes.near_frames(layer), arenas)
            self._addresses[table, layer] = found
        return found

    def table_addresses(self, table: PageTable) -> TableAddresses | None:
        """Where all layers' records start, if they are read in place."""
        if not self.reads_in_place:
            return None
        found = self._tables.get(table)
        if found is None or found[0] != table.version:
            each = (self.addresses(table, layer) for layer in range(table.num_readers))
            layers = [layer for layer in each if layer is not None]
            whole = TableAddresses(layers) if len(layers) == table.num_readers else None
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
        self, table: PageTable, layer: int, records: ArrayLike, *, is_look: bool = False
    ) -> Iterator[Selected]:
        """The records (ascending, each once), in parts: what is there, then what comes from disk,
        as it comes.

        is_look: they are no selection, and say nothing about what the next one will be.

        Reading begins with this call, as far as the hot records have room; what an earlier one
        began and nobody took is let go. Each part is for a `with` block, before the next is asked
        for. Asking for one blocks until it is there. Raises StorageError when records cannot be
        read or are damaged.
        """
        return self._fetch(table, layer, records, self._select, is_look)

    def fetch_in_place(self, table: PageTable, layer: int, records: ArrayLike) -> Iterator[Placed]:
        """The same by addresses, where `reads_in_place`."""
        return self._fetch(table, layer, records, partial(self._place, table), is_look=False)

    def _fetch(self, table: PageTable, layer: int, records, make, is_look: bool) -> Iterator:
        """make: a part, of a map, records, positions, and frames of those from disk."""
        where, wanted = self._map(table, layer), np.asarray(records, dtype=np.int64)
        is_on_disk = where.tier[wanted] == _ON_DISK
        demand = _Demand(self._hot, where.frame[wanted[is_on_disk]], (table, layer), is_look)
        return self._parts(where, wanted, is_on_disk, demand, make)

    def _parts(self, where: RecordMap, wanted, is_on_disk, demand: _Demand, make) -> Iterator:
        on_disk, waiting = np.flatnonzero(is_on_disk), ~is_on_disk  # in memory, not given yet
        if waiting.any() and not demand.is_any_there():
            yield make(where, wanted, np.flatnonzero(waiting), None)
            waiting[:] = False
        for come, frames in demand.parts():
            waiting[on_disk[come]] = True
            yield make(where, wanted, np.flatnonzero(waiting), frames)
            waiting[:] = False
        if waiting.any():
            yield make(where, wanted, np.flatnonzero(waiting), None)

    def at_hand(self) -> AtHand | None:
        """Where records from disk may be read now, by the numbers of `table_addresses`, until the
        next call."""
        return self._hot.at_hand() if self._hot is not None else None

    def use(self, table: PageTable, layer: int, records: np.ndarray) -> None:
        """A layer's selection was attended, all of which lies in memory or was at hand."""
        where = self._map(table, layer)
        tiers = where.tier[records]
        self._count(where, tiers)
        if self._hot is not None:
            self._hot.use(where.frame[records[tiers == _ON_DISK]], (table, layer))

    def clear_hot(self) -> None:
        """What was read from disk before is not at hand any more: for measurements that compare."""
        if self._hot is not None:
            self._hot.clear()

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

    def _select(self, where: RecordMap, wanted, positions, frames) -> Selected:
        planes, sources, records = self._planes, [], wanted[positions]
        device, tiers = planes.compute_device, where.tier[records]
        for index in where.tiers:
            tier, places = TIERS[index], np.flatnonzero(tiers == index)
            if not len(places):
                continue
            if tier is Tier.DISK:
                assert self._hot is not None
                arena, rows = self._hot.frames, torch.from_numpy(frames)
            else:
                arena, rows = planes.frames(tier), torch.from_numpy(where.frame[records[places]])
            if tier is not Tier.DEVICE and planes.must_copy:  # one copy for all of them
                arena = arena.index_select(0, rows).to(device)
                rows = torch.arange(len(places))
            sources.append(Source(arena, rows, torch.from_numpy(places)))
        self._count(where, tiers)
        near, rows = planes.near_frames(where.layer), where.near_rows
        rows = rows[torch.from_numpy(records).to(device)]
        return Selected(torch.from_numpy(positions), near, rows, sources, release=self._end(frames))

    def _place(self, table: PageTable, where: RecordMap, wanted, positions, frames) -> Placed:
        records = wanted[positions]
        addresses = self.addresses(table, where.layer)
        assert addresses is not None, "records are not read in place"
        record_at = addresses.record_at[records]
        if frames is not None:
            assert self._hot is not None
            record_at[where.tier[records] == _ON_DISK] = self._hot.addresses(frames)
        self._count(where, where.tier[records])
        at = torch.from_numpy(positions), torch.from_numpy(record_at)
        return Placed(*at, release=self._end(frames))

    def _end(self, frames: np.ndarray | None) -> Callable[[], None] | None:
        if frames is None:
            return None
        assert self._hot is not None
        return partial(self._hot.release, frames)

    def _count(self, where: RecordMap, tiers: np.ndarray) -> None:
        """Counts what is read from memory; what comes from disk is counted there."""
        for index in where.tiers:
            if index != _ON_DISK:
                num = int((tiers == index).sum())
                self._stats.resident += num
                self._stats.bytes_read[TIERS[index].value] += num * self._record_bytes

    def _map(self, table: PageTable, layer: int) -> RecordMap:
        found = self._maps.get((table, layer))
        if found is None or found.version != table.version:
            found = make_record_map(table, layer, self._planes.compute_device)
            self._maps[table, layer] = found
        return found

"""What a caller does with the traffic from and to disk: wishes, demands, writes.

Only the calling thread drops, holds and releases slots. So whatever is wished for, a demand finds
a slot: a free one, a ready one that it drops, or the next that the I/O threads fill; nobody waits
in a circle. A wrong wish costs the time of its read.

Knows extents, not tables, policies or predictors.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Sequence

import numpy as np
import torch

from ...prefetch.stats import Stats
from ..errors import StorageError
from ..pages.page_table import Extent
from ..pages.tier import copy_rows
from .io_threads import IoThreads, Write
from .reads import Urgency
from .staging import Slot, SlotState

# What is attended to in one call: threads are woken for each.
_HELD_BYTES = 1 << 20


class Transfers:
    """One store's traffic. After a failure every call raises it, save `forget`."""

    def __init__(self, io: IoThreads, stats: Stats):
        self._io, self._stats = io, stats
        self.check, self.close = io.check, io.close
        self.check_integrity = io.check_integrity

    def wish(self, extents: Sequence[Extent], group: Hashable) -> None:
        """Asks for extents to be read when there is time and room, in order. Never blocks."""
        if not self._io.has_threads:
            return
        self._io.check()
        wishes = self._io.wishes
        wishes.open_batch()
        for extent in extents:
            slot = self._io.staging.find(extent)
            if slot is None or slot.state is SlotState.HELD:
                wishes.add([extent], group)
            elif slot.wish is None or slot.is_unwanted:
                slot.wish, slot.is_unwanted = wishes.make(extent, group), False
            else:
                wishes.renew(slot.wish, group)
        self._io.pump()

    @property
    def batch(self) -> int:
        """Number of the latest call of `wish`."""
        return self._io.wishes.batch

    @property
    def buffer_bytes(self) -> int:
        """Host memory of all slots and write buffers."""
        return self._io.buffer_bytes

    def move_on(self, group: Hashable, batch: int) -> None:
        """The group's turn is over: its wishes up to that batch were wrong."""
        self._io.wishes.drop(group, batch)
        unwanted = self._io.staging.drop_stale(group, batch)
        if unwanted:
            self._io.reads.cancel(np.array(unwanted, dtype=np.int64))
        self._io.pump()

    def is_ready(self, extent: Extent, num_records: int) -> bool:
        self._io.pump()
        slot = self._io.staging.find(extent)
        return slot is not None and self._has(slot, num_records)

    def demand(self, extent: Extent, num_records: int) -> Slot:
        """The slot that holds the extent's first records, held for the caller; waits for it."""
        self._io.check()
        slot = self._io.staging.find(extent)
        if slot is not None and self._has(slot, num_records):
            self._stats.hits += 1
        else:
            if self._io.wishes.remove(extent) is not None or slot is not None:
                self._stats.late += 1
            else:
                self._stats.misses += 1
            started = time.perf_counter()
            try:
                slot = self._bring(extent, num_records)
            finally:
                self._stats.stall_s += time.perf_counter() - started
        self._io.staging.hold(slot)
        return slot

    @property
    def most_held(self) -> int:
        """How many slots should be held at once: few calls to attend to them, and enough others to
        be filled meanwhile."""
        return max(1, min(len(self._io.staging.slots) // 3, _HELD_BYTES // self._io.slot_bytes))

    def demand_all(self, wanted: Sequence[tuple[Extent, int]]) -> list[Slot]:
        """`demand` for several extents and numbers of records, which are waited for together."""
        self._io.check()
        slots = []
        under_way = [self._io.staging.find(extent) for extent, _ in wanted]
        self._hurry([slot.index for slot in under_way if slot is not None])
        try:
            for extent, num_records in wanted:
                slots.append(self.demand(extent, num_records))
        except BaseException:
            self.release_all(slots)
            raise
        return slots

    def place(self, slot: Slot) -> int:
        """The address of a held slot's first record; the others follow it."""
        return self._io.place(slot.index)

    def release_all(self, slots: Sequence[Slot]) -> None:
        """The caller is done with these slots."""
        for slot in slots:
            self._io.staging.release(slot)
        self._io.pump()

    def rows(self, slot: Slot, num_records: int) -> torch.Tensor:
        """A held slot's records, (num_records, record_bytes) uint8 in host memory."""
        return self._io.rows(slot.index, num_records)

    def release(self, slot: Slot) -> None:
        """The caller is done with a slot that `demand` gave it."""
        self._io.staging.release(slot)
        self._io.pump()

    def write(self, extent: Extent, first: int, records: torch.Tensor) -> None:
        """Sends records, (num_records, record_bytes) uint8, to frames first .. of an extent.

        Returns when they have been copied; a failure to write them surfaces at a later call.
        """
        self._io.check()
        if self._io.free_buffer() is None:
            started = time.perf_counter()
            try:
                self._io.wait(lambda: self._io.free_buffer() is not None)
            finally:
                self._stats.write_stall_s += time.perf_counter() - started
        buffer = self._io.free_buffer()
        assert buffer is not None
        copy_rows(self._io.rows(buffer, len(records)), records)
        self._io.write(Write(extent, first, len(records), buffer))

    def flush(self) -> None:
        """Waits until all that was written is on disk."""
        self._io.wait(lambda: not self._io.writing)

    def forget(self, extent: Extent) -> None:
        """The extent's records will change: waits for what is under way and drops what was read.

        Never raises: after a failure no frame is written to again.
        """
        self._io.wishes.remove(extent)
        slot = self._io.staging.find(extent)
        try:
            self._io.wait(lambda: not self._io.is_unwritten(extent))
            if slot is not None and slot.state is SlotState.READING:
                self._io.reads.cancel(np.array([slot.index], dtype=np.int64))
                self._wait_for(slot)
        except (StorageError, RuntimeError):
            return
        slot = self._io.staging.find(extent)
        if slot is not None and slot.state is SlotState.READY:
            self._io.staging.drop(slot)
        elif slot is not None:
            self._io.staging.detach(slot)

    @staticmethod
    def _has(slot: Slot, num_records: int) -> bool:
        """Whether that many records can be used now."""
        there = slot.state in (SlotState.READY, SlotState.HELD)
        return there and slot.num_records >= num_records

    def _bring(self, extent: Extent, num_records: int) -> Slot:
        """A ready slot with the extent's records."""
        slot = self._io.staging.find(extent)
        if slot is not None and slot.state is SlotState.READING:
            slot.is_unwanted = False
            self._wait_for(slot)
            slot = self._io.staging.find(extent)
            if slot is not None and self._has(slot, num_records):
                return slot
        if slot is not None and slot.state is SlotState.READY:  # read before the latest append
            self._io.staging.drop(slot)
        self._io.wait(lambda: not self._io.is_unwritten(extent))
        self._io.wait(self._make_room)
        slot = self._io.prepare(extent, num_records, None)
        self._io.read([slot], Urgency.DEMAND)
        # Interrupted here, the slot becomes ready with nobody to hold it, and is dropped first.
        self._wait_for(slot)
        return slot

    def _wait_for(self, slot: Slot) -> None:
        self._hurry([slot.index])
        extent = slot.extent
        self._io.wait(lambda: slot.state is not SlotState.READING or slot.extent is not extent)

    def _hurry(self, slots: list[int]) -> None:
        """Somebody waits for what is on its way to these slots."""
        tags = np.array(slots, dtype=np.int64)
        self._io.reads.promote(tags)
        self._io.reads.expect(tags)

    def _make_room(self) -> bool:
        """True when a slot is free, if need be after dropping a ready one: asked for once more."""
        if self._io.staging.num_free:
            return True
        if (slot := self._io.staging.latest_ready()) is not None:
            wish = slot.wish
            self._io.staging.drop(slot)
            if wish is not None:
                self._io.wishes.put_back(wish)
            return True
        assert self._io.staging.any_reading(), "every staging slot is held by the caller"
        return False

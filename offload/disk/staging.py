"""Which staging slot holds which extent on its way from disk. Bookkeeping only.

    FREE --prepare_read--> READING --complete_read(True)--> READY --hold--> HELD --release--> FREE
                              |                               |
                              └---complete_read(False)--------└--drop (counted as waste)----> FREE

Knows no thread, file or byte; `io_threads` moves the data.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from enum import Enum

import numpy as np

from ...prefetch.queue import Wish
from ...prefetch.stats import Stats
from ..pages.page_table import Extent
from .reads import State


class SlotState(Enum):
    FREE = "free"
    READING = "reading"
    READY = "ready"
    HELD = "held"


@dataclass(slots=True, eq=False)
class Slot:
    """One buffer of a span's size.

    S1: a slot that is not FREE has an extent. (What a FREE one has is of an interrupted call.)
    S2: a HELD slot has holders, and its bytes do not change.
    S3: is_unwanted only while READING: nobody waits any more, so completing frees the slot.
    """

    index: int
    state: SlotState = SlotState.FREE
    extent: Extent | None = None  # S1
    num_records: int = 0  # of the extent's first records, once READY
    wish: Wish | None = None  # who wished for it; None: it was demanded
    holders: int = 0  # S2
    is_unwanted: bool = False  # S3


class Staging:
    """All slots of a store.

    S4: an extent is found in at most one slot. A held slot whose extent was written to or freed is
        found no longer, and is free once it is released.

    An interruption loses no slot: `state` alone says which are free, and changes last when one is
    taken and first when it is freed.
    """

    def __init__(self, num_slots: int, stats: Stats):
        assert num_slots >= 2, "one slot to compute on and one to fill"
        self.slots = [Slot(i) for i in range(num_slots)]
        self._found: dict[Extent, Slot] = {}  # S4
        self._stats = stats

    @property
    def num_free(self) -> int:
        return sum(slot.state is SlotState.FREE for slot in self.slots)

    def find(self, extent: Extent) -> Slot | None:
        """The slot that holds the extent's records or is being filled with them."""
        slot = self._found.get(extent)
        return None if slot is None or slot.state is SlotState.FREE else slot

    def any_reading(self) -> bool:
        return any(slot.state is SlotState.READING for slot in self.slots)

    def next_free(self) -> Slot:
        """The slot that `prepare_read` will take."""
        return next(slot for slot in self.slots if slot.state is SlotState.FREE)

    def refresh(self, states: np.ndarray) -> None:
        """Completes what the reader has read since; states: by slot, see `reads.State`.

        What is READING here and not under way there never will be: its call was interrupted.
        """
        now = None
        for slot in self.slots:
            if slot.state is SlotState.READING:
                now = states[: len(self.slots)].tolist() if now is None else now
                if now[slot.index] not in (State.QUEUED, State.READING):
                    self.complete_read(slot, success=now[slot.index] == State.READY)

    def prepare_read(self, extent: Extent, num_records: int, wish: Wish | None) -> Slot:
        """Takes a free slot for the extent's first records.

        If the caller still holds another with the same extent, that one is found no longer (S4).
        """
        slot = self.next_free()
        self._clear(slot)
        slot.extent, slot.num_records, slot.wish = extent, num_records, wish
        self._found[extent] = slot
        slot.state = SlotState.READING
        return slot

    def complete_read(self, slot: Slot, success: bool) -> None:
        """The records are there, or never will be."""
        assert slot.state is SlotState.READING
        if success:
            slot.state = SlotState.READY
            if slot.is_unwanted:
                self.drop(slot)
        else:
            self._make_free(slot)

    def hold(self, slot: Slot) -> None:
        """Keeps the slot's bytes until as many releases."""
        assert slot.state in (SlotState.READY, SlotState.HELD)
        slot.holders = slot.holders + 1 if slot.state is SlotState.HELD else 1
        slot.state = SlotState.HELD

    def release(self, slot: Slot) -> None:
        assert slot.state is SlotState.HELD
        if slot.holders == 1:
            self._make_free(slot)
        else:
            slot.holders -= 1

    def detach(self, slot: Slot) -> None:
        """A held slot's extent has other records now: holders keep the old ones (S4)."""
        assert slot.state is SlotState.HELD and slot.extent is not None
        del self._found[slot.extent]

    def drop(self, slot: Slot) -> None:
        """Frees a slot that was read in vain."""
        assert slot.state is SlotState.READY
        self._stats.wasted += 1
        self._make_free(slot)

    def latest_ready(self) -> Slot | None:
        """The ready slot whose turn is expected last, if any is ready; one that nobody wishes for
        any more (a demand that was interrupted) before all others.
        """
        ready = [slot for slot in self.slots if slot.state is SlotState.READY]
        orders = [float("inf") if slot.wish is None else slot.wish.order for slot in ready]
        return ready[orders.index(max(orders))] if ready else None

    def drop_stale(self, group: Hashable, batch: int) -> list[int]:
        """Drops what the group's wishes up to that batch brought or are bringing; returns which
        slots are still being filled, for nobody."""
        unwanted = []
        for slot in self.slots:
            wish = slot.wish
            if wish is not None and wish.group == group and wish.batch <= batch:
                if slot.state is SlotState.READY:
                    self.drop(slot)
                elif slot.state is SlotState.READING:
                    slot.is_unwanted = True
                    unwanted.append(slot.index)
        return unwanted

    def check(self) -> None:
        """Asserts S1 to S4."""
        for slot in self.slots:
            assert slot.extent is not None or slot.state is SlotState.FREE, "S1"
            assert slot.holders > 0 or slot.state is not SlotState.HELD, "S2"
            assert not slot.is_unwanted or slot.state is SlotState.READING, "S3"
            if slot.state in (SlotState.READING, SlotState.READY):
                assert slot.extent is not None and self._found.get(slot.extent) is slot, "S4"
        assert all(slot.extent is extent for extent, slot in self._found.items()), "S4"

    def _make_free(self, slot: Slot) -> None:
        assert slot.state is not SlotState.FREE, "freed twice"
        slot.state = SlotState.FREE
        self._clear(slot)

    def _clear(self, slot: Slot) -> None:
        """What a free slot still has."""
        if slot.extent is not None and self._found.get(slot.extent) is slot:
            del self._found[slot.extent]
        slot.extent, slot.wish, slot.num_records = None, None, 0
        slot.holders, slot.is_unwanted = 0, False

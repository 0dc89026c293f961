"""Slots of what comes from disk: whatever is interrupted, none is lost and none is taken for
another's.
"""

from __future__ import annotations

import numpy as np
import pytest
from interruptions import functions_of, interrupted_after

from ebbtide.offload.disk.staging import SlotState, Staging
from ebbtide.offload.pages.page_table import Extent, Tier
from ebbtide.prefetch.stats import Stats


def extents(count: int) -> list[Extent]:
    return [Extent(Tier.DISK, 4 * i, 0, i, np.zeros(4, np.uint32), 0) for i in range(count)]


def take(staging: Staging, extent: Extent) -> None:
    staging.prepare_read(extent, 4, None)


def fail(staging: Staging, extent: Extent) -> None:
    staging.complete_read(staging.find(extent), success=False)


def drop(staging: Staging, extent: Extent) -> None:
    staging.drop(staging.find(extent))


def hold(staging: Staging, extent: Extent) -> None:
    staging.hold(staging.find(extent))


def release(staging: Staging, extent: Extent) -> None:
    staging.release(staging.find(extent))


def made(state: SlotState) -> tuple[Staging, list[Extent]]:
    """Two slots of three in use, the first one in that state."""
    staging, all_extents = Staging(3, Stats()), extents(4)
    for extent in all_extents[:2]:
        take(staging, extent)
    first = staging.find(all_extents[0])
    if state is not SlotState.READING:
        staging.complete_read(first, success=True)
    if state is SlotState.HELD:
        staging.hold(first)
    return staging, all_extents


@pytest.mark.parametrize(
    ("state", "change"),
    [
        (SlotState.READING, take),
        (SlotState.READING, fail),
        (SlotState.READY, drop),
        (SlotState.READY, hold),
        (SlotState.HELD, hold),
        (SlotState.HELD, release),
    ],
)
def test_no_slot_is_lost_wherever_a_change_is_interrupted(state, change):
    count, is_interrupted = 0, True
    while is_interrupted:
        count += 1
        staging, (first, second, third, fourth) = made(state)
        changed = third if change is take else first
        is_interrupted = interrupted_after(
            count,
            functions_of(Staging),
            lambda s=staging, e=changed: change(s, e),
            instructions=True,
        )
        staging.check()
        assert staging.find(second) is staging.slots[1]
        # What was interrupted is there or not; as a read, it is ended by whoever looks next.
        for extent in (first, third):
            slot = staging.find(extent)
            if slot is None:
                continue
            assert slot.extent is extent
            if slot.state is SlotState.READING:
                staging.complete_read(slot, success=True)
            while slot.state is SlotState.HELD:
                staging.release(slot)
            if slot.state is SlotState.READY:
                staging.drop(slot)
        assert staging.num_free == 2
        for extent in (third, fourth):
            take(staging, extent)
        assert staging.find(third) is not staging.find(fourth) and staging.find(first) is None
        staging.check()
    assert count > 10

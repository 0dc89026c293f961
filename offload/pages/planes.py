"""The bytes of extents: near planes on the compute device, far planes in their home tier.

    put ---> memory tiers: an arena's frames; disk: `transfer`'s write buffers and the scratch file
    get <--- views of an arena's frames, or of a staging slot filled from disk

Knows extents, not tables: who shares what, and when an extent may be written to, is `pager`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ...prefetch.stats import Stats
from ..disk.extent_file import crcs_of
from ..disk.transfer import Transfers
from .page_table import Extent, Tier
from .tier import MemoryTier, copy_rows


@dataclass(slots=True)
class Pages:
    """One span's records, to be read until the end of the `with` block, and never written to.

    near: (num_records, near_record_bytes) uint8; records: (num_records, record_bytes) uint8,
    both on the compute device. A handle can neither allocate nor evict.
    """

    near: torch.Tensor
    records: torch.Tensor
    _release: Callable[[], None] | None = None

    def __enter__(self) -> Pages:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Gives the slot back, if there is one. May be called again."""
        release, self._release = self._release, None
        if release is not None:
            release()


class Planes:
    """All arenas of a store, and its traffic with the disk.

    num_extents: whole extents per tier. near_record_bytes: of each arena of near planes, which
    holds num_near_extents; near_arenas: the arena of each layer that reads. transfers: None without
    disk frames. num_copies: slots of an extent's size on the compute device, for records that it
    cannot read where they are.

    L1: an extent's near planes lie in its layer's arena from its near_base on, wherever its records
        are, so the two planes are never out of step.
    """

    def __init__(
        self,
        num_extents: Mapping[Tier, int],
        records_per_span: int,
        record_bytes: int,
        near_record_bytes: Sequence[int],
        num_near_extents: Sequence[int],
        near_arenas: Sequence[int],
        compute_device: torch.device,
        transfers: Transfers | None,
        num_copies: int,
        stats: Stats,
    ):
        self._records_per_span, self._record_bytes = records_per_span, record_bytes
        self._transfers, self._stats = transfers, stats
        device, host = (num_extents[t] * records_per_span for t in (Tier.DEVICE, Tier.HOST))
        self.compute_device = compute_device
        self._near = [
            MemoryTier(count * records_per_span, num_bytes, compute_device)
            for count, num_bytes in zip(num_near_extents, near_record_bytes, strict=True)
        ]
        self._near_of = [self._near[arena] for arena in near_arenas]  # by layer
        self._arenas = {
            Tier.DEVICE: MemoryTier(device, record_bytes, compute_device),
            Tier.HOST: MemoryTier(host, record_bytes, "cpu", compute_device),
        }
        self._copies = MemoryTier(num_copies * records_per_span, record_bytes, compute_device)
        self.must_copy = num_copies > 0
        self._free_copies = list(range(num_copies))

    def put(self, extent: Extent, start: int, near: torch.Tensor, records: torch.Tensor) -> None:
        """Stores records in frames start .. of an extent that nobody else sees.

        near: (num_records, near_record_bytes) uint8; records: (num_records, record_bytes) uint8.
        """
        count = len(records)
        if near.numel():
            copy_rows(self._near_of[extent.layer].records(extent.near_base + start, count), near)
            self._stats.near_bytes_written += near.numel()
        if extent.tier is Tier.DISK:
            self._traffic.write(extent, start, records)
            return
        arena = self._arenas[extent.tier]
        copy_rows(arena.records(extent.base + start, count), records)
        if arena.device.type == "cpu":
            view = arena.raw(extent.base + start, count)
            extent.crcs[start : start + count] = crcs_of(view, self._record_bytes)
        self._stats.bytes_written[extent.tier.value] += records.numel()

    def get(self, extent: Extent, num_records: int) -> Pages:
        """An extent's first records on the compute device; blocks until they are there."""
        pages = self.get_in_place(extent, num_records)
        if extent.tier is not Tier.DISK:
            self._stats.resident += 1
            self._stats.bytes_read[extent.tier.value] += pages.records.numel()
        if self.must_copy and extent.tier is not Tier.DEVICE:
            return self._copy(pages)
        return pages

    def get_in_place(self, extent: Extent, num_records: int) -> Pages:
        """The same, with the records where they are, or in a staging slot when they are on disk."""
        near = self._near_of[extent.layer].records(extent.near_base, num_records)
        if extent.tier is not Tier.DISK:
            return Pages(near, self._arenas[extent.tier].records(extent.base, num_records))
        transfers = self._traffic
        slot = transfers.demand(extent, num_records)
        return Pages(near, transfers.rows(slot, num_records), lambda: transfers.release(slot))

    def near_frames(self, layer: int) -> torch.Tensor:
        """The layer's near planes and those of others like it, (num_frames, near_record_bytes)
        uint8 on the compute device."""
        return self._near_of[layer].frames

    def frames(self, tier: Tier) -> torch.Tensor:
        """A memory tier's records, (num_frames, record_bytes) uint8."""
        return self._arenas[tier].frames

    def forget(self, extent: Extent) -> None:
        """The extent's bytes will change: waits until nothing of them is under way."""
        if extent.tier is Tier.DISK:
            self._traffic.forget(extent)

    def overhead_bytes(self) -> dict[Tier, int]:
        """Bytes besides the frames of records: near planes, and copies where there are any."""
        tier = Tier.HOST if self.compute_device.type == "cpu" else Tier.DEVICE
        return {tier: sum(near.num_bytes for near in self._near) + self._copies.num_bytes}

    def close(self) -> None:
        """Lets go of all arenas; views that are still held keep theirs."""
        for arena in (*self._near, self._copies, *self._arenas.values()):
            arena.close()

    def check(self, extents: Iterable[Extent], deep: bool) -> None:
        """Asserts L1; deep: also that memory still holds what was written to it."""
        assert len(set(self._free_copies)) == len(self._free_copies)
        for extent in extents:
            stop = extent.near_base + self._records_per_span
            assert stop <= len(self.near_frames(extent.layer)), "L1"
            arena = self._arenas.get(extent.tier)
            if deep and arena is not None and arena.device.type == "cpu":
                crcs = crcs_of(arena.raw(extent.base, extent.filled), self._record_bytes)
                same = np.array_equal(crcs, extent.crcs[: extent.filled])
                assert same, "somebody wrote to a record"

    @property
    def _traffic(self) -> Transfers:
        assert self._transfers is not None, "an extent on disk without disk frames"
        return self._transfers

    def _copy(self, pages: Pages) -> Pages:
        """The same records on the compute device; the slot they came from is free again.

        The copy waits for the bytes, not for computing: later copies into the same place are queued
        behind the kernels that read it.
        """
        assert self._free_copies, "every copy slot is held by the caller"
        index = self._free_copies.pop()
        rows = self._copies.records(index * self._records_per_span, len(pages.records))
        try:
            with pages:
                copy_rows(rows, pages.records)
        except BaseException:
            self._free_copies.append(index)
            raise
        return Pages(pages.near, rows, lambda: self._free_copies.append(index))

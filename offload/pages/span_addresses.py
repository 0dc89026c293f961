"""Where the spans of one layer start in memory, so that many of them are attended in one call.

Made from a record map and kept as long as it is; of all layers together, as long as the page table
stays as it is. Knows addresses, no bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from .page_table import Tier
from .record_map import TIERS, RecordMap

_ON_DISK = TIERS.index(Tier.DISK)


class SpanRun(NamedTuple):
    """Consecutive spans that all lie in memory, at home or on a visit, for a `with` block.

    near_at, record_at: (num_records,) int64 on the compute device, where each record's planes
    start. reads: what
    attending to them reads from each memory tier, in records. The bytes stay until the end of the
    block, and those at home until the table changes.
    """

    first: int
    stop: int
    near_at: torch.Tensor
    record_at: torch.Tensor
    reads: tuple[tuple[Tier, int], ...]
    release: Callable[[], None] | None = None

    def __enter__(self) -> SpanRun:
        return self

    def __exit__(self, *_) -> None:
        if self.release is not None:
            self.release()


class SpanAddresses:
    """Of a layer's records. near_frames: on the compute device. arenas: the frames (num_frames,
    record_bytes) of each tier that it reads where they lie.

    near_at (tensor), record_at (array): (num_records,) int64, where each near record and each
    record starts; 0 for records of other tiers.
    """

    def __init__(self, where: RecordMap, near_frames: torch.Tensor, arenas: dict):
        self.where = where
        self.near_at = where.near_rows * near_frames.stride(0) + near_frames.data_ptr()
        self.record_at = np.zeros(len(where.tier), dtype=np.int64)
        for tier, frames in arenas.items():
            there = where.tier == TIERS.index(tier)
            self.record_at[there] = where.frame[there] * frames.stride(0) + frames.data_ptr()
        self._record_at = torch.from_numpy(self.record_at).to(near_frames.device)
        self._tiers = set(arenas)
        self._record_bytes = next(iter(arenas.values())).shape[1]
        self._runs: dict[tuple[int, int], SpanRun] = {}

    @property
    def arrays(self) -> tuple[int, int, int]:
        """The addresses of three int64 arrays: where each near record and each record starts, and
        the number of each record's frame."""
        frame_at = self.where.frame.ctypes.data
        return self.near_at.data_ptr(), self._record_at.data_ptr(), frame_at

    def run(self, first: int, stop: int) -> SpanRun:
        """The spans from `first` on that are in memory, up to `stop`; none if `first` is not."""
        found = self._runs.get((first, stop))
        if found is None:
            found = self._runs[first, stop] = self._find(first, stop)
        return found

    def visiting(self, first: int, stop: int, places: dict[int, int], release) -> SpanRun:
        """The spans first .. stop - 1, of which some, by span, lie at these addresses for now."""
        run, where = self._make(first, stop), self.where
        within = np.arange(where.records_per_span) * self._record_bytes
        record_at = run.record_at.numpy().copy()
        for span, place in places.items():
            start = (span - first) * where.records_per_span
            part = record_at[start : start + where.records_per_span]
            part[:] = within[: len(part)] + place
        return run._replace(record_at=torch.from_numpy(record_at), release=release)

    def _find(self, first: int, stop: int) -> SpanRun:
        end = first
        while end < stop and self.where.extent(end).tier in self._tiers:
            end += 1
        return self._make(first, end)

    def _make(self, first: int, stop: int) -> SpanRun:
        where = self.where
        rows = slice(first * where.records_per_span, stop * where.records_per_span)
        counts = Counter(where.tier[rows].tolist())
        reads = tuple((TIERS[i], n) for i, n in sorted(counts.items()) if TIERS[i] is not Tier.DISK)
        return SpanRun(first, stop, self.near_at[rows], self._record_at[rows], reads)


class TableAddresses:
    """Of all layers that read a table's pages. num_records: each layer's; tables: (num_layers, 3)
    int64, each layer's `arrays`."""

    def __init__(self, layers: list[SpanAddresses]):
        self._layers = layers  # they hold the arrays
        self.num_records = [len(layer.where.tier) for layer in layers]
        self.tables = torch.tensor([layer.arrays for layer in layers], dtype=torch.int64)
        self._counted: tuple[list[range], dict[Tier, int] | None] = [], {}

    @cached_property
    def any_on_disk(self) -> bool:
        return any(_ON_DISK in layer.where.tiers for layer in self._layers)

    def reads(self, spans: list[range]) -> dict[Tier, int] | None:
        """What attending to each layer's `spans` reads from each tier, in records; None where some
        of them are on disk."""
        if self._counted[0] != spans:
            self._counted = spans, self._count(spans)
        return self._counted[1]

    def _count(self, spans: list[range]) -> dict[Tier, int] | None:
        reads: Counter[Tier] = Counter()
        for layer, wanted in zip(self._layers, spans, strict=True):
            if wanted:
                run = layer.run(wanted.start, wanted.stop)
                if run.stop < wanted.stop:
                    return None
                reads.update(dict(run.reads))
        return dict(reads)

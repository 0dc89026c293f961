"""Which frames hold which records: tiers, extents, reference counts, page tables. Bookkeeping only.

Knows no tensor, no file and no thread; `pager` moves the bytes. The life of an extent:

    free frames --allocate--> owned by one table --share--> shared (refs > 1)
                                    |    ^                        |
                                 release └--------release---------┘
                                    v
                               free frames

A shared extent is never written to: who wants to append allocates another and replaces the entry
(`PageStore._copy_on_write`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import numpy as np


class Tier(Enum):
    """Where frames lie, fastest first; the value is the name that statistics and errors use."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"


class TierUsage(NamedTuple):
    """Bytes of a tier's frames: all there are, in use now, and the most that ever were."""

    capacity_bytes: int
    used_bytes: int
    peak_bytes: int


class NoFrames(Exception):
    """A tier has no free extent. The pager turns it into DoesNotFit, which needs bytes."""


@dataclass(eq=False, slots=True)
class Extent:
    """The frames of one layer's span, contiguous in one tier. Compared by identity.

    E1: frames base .. base + records_per_span - 1 of `tier` belong to no other live extent.
    E2: records_seen <= filled <= records_per_span, for every table that refers here: a table that
        was truncated sees fewer than there are, and may not show the rest again.
    E3: refs is the number of (table, layer, span) entries that refer here; 0 means freed.
    E4: crcs, uint32, has an entry for each frame, and is a part of the tier's own array. 0: the
        frame is empty, its write is still in flight, or its record never passed through the CPU.
    E5: layer and span never change: every table refers to it from there, and errors name them.
    E6: near planes near_base .. near_base + records_per_span - 1 of the layer's arena of near
        planes belong to no other live extent.
    """

    tier: Tier
    base: int  # E1
    layer: int  # E5
    span: int  # E5
    crcs: np.ndarray  # E4
    near_base: int  # E6
    filled: int = 0  # E2
    refs: int = 1  # E3

    def trim(self, num_records: int) -> None:
        """Forgets the records after the first `num_records`, which no table sees any more."""
        self.filled = num_records
        self.crcs[num_records:] = 0


class PageTable:
    """(layer, span) -> extent, for one sequence. Records of a layer are numbered from 0.

    num_layers: those that keep pages. pages_of: of every layer that reads some, the number of the
    one whose they are, if not each has its own; the first num_layers do. So whoever reads names the
    layer for which that is done, and what is foreseen and counted belongs to it.

    P1: a layer with n records has ceil(n / records_per_span) entries, each an extent or, where
        nobody will read the span any more (`drop`) or ever (`skip`), None.
    P2: tables never hand out frames; only `Extents` does, so that counts stay in one place.
    P3: version grows with every change, so that what was derived from a table can be kept.
    """

    def __init__(
        self,
        num_layers: int,
        records_per_span: int,
        expected_spans: int | None = None,
        pages_of: Sequence[int] | None = None,
    ):
        self.records_per_span = records_per_span
        self.expected_spans = expected_spans  # per layer, a hint to the policy; None: unknown
        self._pages_of = range(num_layers) if pages_of is None else pages_of
        self.is_open = True
        self.version = 0  # P3
        self._extents: list[list[Extent | None]] = [[] for _ in range(num_layers)]  # P1
        self._num_records = [0] * num_layers

    @property
    def num_layers(self) -> int:
        return len(self._num_records)

    @property
    def num_readers(self) -> int:
        """How many layers read pages, their own or others'."""
        return len(self._pages_of)

    def num_records(self, layer: int) -> int:
        """Records of the pages that a layer reads, those that were dropped included."""
        return self._num_records[self._pages_of[layer]]

    def ends_in_extent(self, layer: int) -> bool:
        """Whether the layer's last span is partly filled, and kept."""
        extents = self._extents[layer]
        return self._num_records[layer] % self.records_per_span > 0 and extents[-1] is not None

    def num_kept(self, layer: int) -> int:
        """Of the layer's records, those that were neither dropped nor skipped."""
        kept = enumerate(self._extents[self._pages_of[layer]])
        return sum(self.records_seen(layer, span) for span, extent in kept if extent is not None)

    def num_spans(self, layer: int) -> int:
        """Spans of these, the last one perhaps partly filled."""
        return len(self._extents[self._pages_of[layer]])

    def extent(self, layer: int, span: int) -> Extent:
        """Where a span of them lies. The span was not dropped."""
        extent = self._extents[self._pages_of[layer]][span]
        assert extent is not None, f"span {span} of layer {layer} was dropped"
        return extent

    def entries(self, layer: int) -> list[Extent | None]:
        """Of every span of the layer; None where it was dropped or skipped."""
        return list(self._extents[self._pages_of[layer]])

    def records_seen(self, layer: int, span: int) -> int:
        """How many of the span's records this table sees; the last span may be partly filled."""
        left = self.num_records(layer) - span * self.records_per_span
        return max(0, min(left, self.records_per_span))

    def extents_needed(self, layer: int, num_records: int, kept: int | None = None) -> int:
        """How many extents appending that many records takes, with the copy of a shared one. kept:
        the records behind which they are appended, less those that are let go of; default: all."""
        kept = self._num_records[layer] if kept is None else kept
        num_spans = -(-kept // self.records_per_span)
        needed = -(-(kept + num_records) // self.records_per_span) - num_spans
        is_shared = kept % self.records_per_span and self.extent(layer, num_spans - 1).refs > 1
        freed = self._extents[layer][num_spans:]
        needed -= sum(extent is not None and extent.refs == 1 for extent in freed)
        return needed + bool(is_shared and num_records)

    def append(self, layer: int, num_records: int, fresh: Extent | None = None) -> None:
        """Counts records appended to the last span, or to `fresh` as the first of a new one."""
        if fresh is not None:
            assert self.records_seen(layer, self.num_spans(layer)) == 0
            self._extents[layer].append(fresh)
        extent = self._extents[layer][-1]
        seen = self.records_seen(layer, self.num_spans(layer) - 1)
        assert extent is not None and extent.refs == 1, "written to what others see"
        assert extent.filled == seen, "written to what others see"
        assert seen + num_records <= self.records_per_span
        extent.filled += num_records
        self._num_records[layer] += num_records
        self.version += 1

    def skip(self, layer: int, num_records: int) -> None:
        """Counts records that nobody will read, and that are not kept. The span in which they begin
        has no others."""
        assert not self.ends_in_extent(layer), "a span's rest is skipped"
        entries, count = self._extents[layer], self._num_records[layer] + num_records
        entries += [None] * (-(-count // self.records_per_span) - len(entries))
        self._num_records[layer] = count
        self.version += 1

    def drop(self, layer: int, but: Sequence[range]) -> list[Extent]:
        """Lets go of the layer's spans outside of these ranges; returns their extents."""
        dropped = []
        for span, extent in enumerate(self._extents[layer]):
            if extent is not None and not any(span in kept for kept in but):
                self._extents[layer][span] = None
                dropped.append(extent)
        self.version += bool(dropped)
        return dropped

    def replace(self, layer: int, span: int, extent: Extent) -> Extent:
        """Points an entry at another extent and returns the one it pointed at (copy-on-write)."""
        old, self._extents[layer][span] = self.extent(layer, span), extent
        self.version += 1
        return old

    def fork(self) -> PageTable:
        """A table that sees the same records. The caller shares every extent (`Extents.share`)."""
        other = PageTable(
            self.num_layers, self.records_per_span, self.expected_spans, self._pages_of
        )
        other._extents = [list(extents) for extents in self._extents]
        other._num_records = list(self._num_records)
        return other

    def truncate(self, num_records: int | Sequence[int]) -> list[Extent]:
        """Keeps the first `num_records` of every layer, or so many of each; returns the extents it
        let go of."""
        dropped = []
        self.version += 1
        if isinstance(num_records, int):
            num_records = [num_records] * self.num_layers
        for layer, (extents, count) in enumerate(zip(self._extents, num_records, strict=True)):
            num_spans = -(-count // self.records_per_span)
            dropped += [extent for extent in extents[num_spans:] if extent is not None]
            self._num_records[layer] = min(self._num_records[layer], count)
            del extents[num_spans:]
        return dropped

    def restore(self) -> None:
        """Makes P1 and P3 hold after a change that was interrupted: entries come first and go
        last, so that there may be too many."""
        for extents, count in zip(self._extents, self._num_records, strict=True):
            del extents[-(-count // self.records_per_span) :]
        self.version += 1

    def extents(self) -> Iterable[Extent]:
        """Every entry's extent, layer by layer."""
        return (extent for extents in self._extents for extent in extents if extent is not None)

    def check(self) -> None:
        """Asserts P1 and this table's side of E2."""
        for layer, extents in enumerate(self._extents):
            assert len(extents) == -(-self._num_records[layer] // self.records_per_span), "P1"
            for span, extent in enumerate(extents):
                seen = self.records_seen(layer, span)
                assert seen > 0, "P1"
                if extent is not None:
                    assert seen <= extent.filled <= self.records_per_span, "E2"
                    assert (extent.layer, extent.span) == (layer, span), "E5"


class Extents:
    """Hands out the frames of all tiers, an extent at a time, each with its near planes.

    near_arenas: which arena of near planes, by number, is each layer's; by default all have one.
    spans_at_once: how many extents each layer takes while another takes one; by default all as
    many. most_spans: the most that a layer has at a time; None, the default: as many as there are.
    Arenas share out all extents by what their layers take.

    X1: per tier, free + used extents = all extents, and no base is in both.
    X2: a tier's frames that do not make a whole extent are never used.
    X3: per arena of near planes, as X1.
    """

    def __init__(
        self,
        num_frames: Mapping[Tier, int],
        records_per_span: int,
        near_arenas: Sequence[int] | None = None,
        spans_at_once: Sequence[int] | None = None,
        most_spans: Sequence[int | None] | None = None,
    ):
        self.records_per_span = records_per_span
        self.num_extents = {t: num_frames.get(t, 0) // records_per_span for t in Tier}  # X2
        self._free = {t: self._all_but(n, ()) for t, n in self.num_extents.items()}
        self._used: dict[Tier, dict[int, Extent]] = {t: {} for t in Tier}  # X1
        self._near_arenas, total = near_arenas, sum(self.num_extents.values())
        self._bounded = {n: most for n, most in enumerate(most_spans or ()) if most is not None}
        self._num_used: Counter[int] = Counter()  # extents by layer
        taken: Counter[int] = Counter()
        bounded: Counter[int] = Counter()
        for layer, arena in enumerate(near_arenas or (0,)):
            bounded[arena] += self._bounded.get(layer, 0)
            share = spans_at_once[layer] if spans_at_once else 1
            taken[arena] += 0 if layer in self._bounded else share
        shared, shares = max(0, total - bounded.total()), max(1, taken.total())
        self.num_near_extents = [
            min(total, bounded[arena] - (-shared * taken[arena] // shares))
            for arena in sorted(taken)
        ]
        self._free_near = [self._all_but(n, ()) for n in self.num_near_extents]  # X3
        self.peak_used = dict.fromkeys(Tier, 0)
        # Of every frame, where whoever reads many at once finds them; see E4.
        self.crcs = {
            t: np.zeros(n * records_per_span, dtype=np.uint32) for t, n in self.num_extents.items()
        }

    def num_free(self, tier: Tier) -> int:
        """Extents for which a tier has room."""
        return len(self._free[tier])

    def num_free_near(self, layer: int) -> int:
        """Extents for which there is room among the layer's near planes."""
        return len(self._free_near[self._near_arena(layer)])

    def num_used(self, tier: Tier) -> int:
        """Extents that lie in a tier."""
        return len(self._used[tier])

    @property
    def num_bounded(self) -> int:
        """Extents in use of the layers that have at most so many."""
        return sum(self._num_used[layer] for layer in self._bounded)

    def num_lacking(self, wanted: Mapping[int, int]) -> int:
        """How many extents are not there where layers want so many more. What layers may come to
        have that have at most so many is theirs, and passed over here."""
        wanted = {layer: count for layer, count in wanted.items() if layer not in self._bounded}
        owed = {layer: most - self._num_used[layer] for layer, most in self._bounded.items()}
        taken: Counter[int] = Counter()
        for layer, count in (wanted | owed).items():
            taken[self._near_arena(layer)] += count
        near = (count - len(self._free_near[arena]) for arena, count in taken.items())
        return max(0, taken.total() - sum(map(len, self._free.values())), *near)

    def usage(self, tier: Tier, record_bytes: int) -> TierUsage:
        """The same in bytes, with the peak."""
        counts = self.num_extents[tier], self.num_used(tier), self.peak_used[tier]
        return TierUsage(*(count * self.records_per_span * record_bytes for count in counts))

    def allocate(self, tier: Tier, layer: int, span: int) -> Extent:
        """An empty extent with one reference. Raises NoFrames when the tier is full, or the layer's
        arena of near planes."""
        free_near = self._free_near[self._near_arena(layer)]
        if not self._free[tier] or not free_near:
            raise NoFrames(tier)
        base = self._free[tier].pop()
        crcs = self.crcs[tier][base : base + self.records_per_span]
        crcs[:] = 0
        extent = Extent(tier, base, layer, span, crcs, free_near.pop())
        self._used[tier][extent.base] = extent
        self._num_used[layer] += 1
        self.peak_used[tier] = max(self.peak_used[tier], len(self._used[tier]))
        return extent

    def owner(self, tier: Tier, frame: int) -> Extent:
        """The extent that a frame in use belongs to."""
        return self._used[tier][frame // self.records_per_span * self.records_per_span]

    def share(self, extent: Extent) -> None:
        """Counts one more entry that refers to the extent."""
        assert extent.refs > 0, "shared after it was freed"
        extent.refs += 1

    def release(self, extent: Extent) -> None:
        """Counts one entry less; the last one frees the frames."""
        assert extent.refs > 0, "released twice"
        extent.refs -= 1
        if extent.refs == 0:
            del self._used[extent.tier][extent.base]
            self._free[extent.tier].append(extent.base)
            self._free_near[self._near_arena(extent.layer)].append(extent.near_base)
            self._num_used[extent.layer] -= 1

    def unfilled(self, tables: Iterable[PageTable]) -> Iterable[tuple[Extent, int]]:
        """Extents of which these tables, all that are open, see fewer records than fit, and how
        many they see."""
        seen = {extent: 0 for used in self._used.values() for extent in used.values()}
        for table in tables:
            for extent in table.extents():
                count = table.records_seen(extent.layer, extent.span)
                seen[extent] = max(seen.get(extent, 0), count)
        return ((e, count) for e, count in seen.items() if count < self.records_per_span)

    def restore(self, tables: Iterable[PageTable]) -> None:
        """Makes all counts right after a change that was interrupted: what these tables, all that
        are open, do not show is free."""
        refs = Counter(extent for table in tables for extent in table.extents())
        for extent, count in refs.items():
            extent.refs = count
        self._num_used = Counter(extent.layer for extent in refs)
        for tier, count in self.num_extents.items():
            used = {extent.base: extent for extent in refs if extent.tier is tier}
            self._used[tier], self._free[tier] = used, self._all_but(count, used)
        for arena, count in enumerate(self.num_near_extents):
            near = {e.near_base for e in refs if self._near_arena(e.layer) == arena}
            self._free_near[arena] = self._all_but(count, near)

    def _all_but(self, count: int, used: Container[int]) -> list[int]:
        """Where extents begin, of so many, that are not in use: the lowest last, so that memory is
        touched, and files grow, from the start."""
        bases = (number * self.records_per_span for number in reversed(range(count)))
        return [base for base in bases if base not in used]

    def _near_arena(self, layer: int) -> int:
        return self._near_arenas[layer] if self._near_arenas else 0

    def check(self, tables: Iterable[PageTable]) -> None:
        """Asserts E1 to E6, X1, X3 and P1 over all tables that are open."""
        tables = list(tables)
        for table in tables:
            table.check()
        refs = Counter(extent for table in tables for extent in table.extents())
        live = {extent for used in self._used.values() for extent in used.values()}
        assert set(refs) == live, "E3: frames that no table refers to, or freed ones that one does"
        assert self._num_used == Counter(extent.layer for extent in live)
        for extent in live:
            assert extent.refs == refs[extent], "E3"
            assert len(extent.crcs) == self.records_per_span, "E4"
            assert not extent.crcs[extent.filled :].any(), "E4"
        for tier, count in self.num_extents.items():
            free, used = set(self._free[tier]), set(self._used[tier])
            assert len(free) == len(self._free[tier]), "X1: a base is free twice"
            assert not free & used, "X1: a base is free and used"
            # All bases are multiples of records_per_span, so distinct ones never overlap: E1.
            assert free | used == {e * self.records_per_span for e in range(count)}, "X1"
            assert all(e.base == b and e.tier is tier for b, e in self._used[tier].items()), "E1"
        for arena, free in enumerate(self._free_near):
            used = [e.near_base for e in live if self._near_arena(e.layer) == arena]
            every = [e * self.records_per_span for e in range(self.num_near_extents[arena])]
            assert sorted(free + used) == every, "E6, X3"

"""The page store: records of many layers, each at home in one tier, read back in time.

    write --policy--> a home for each new span, then its bytes
    spans <---------- all of a layer's pages, where they lie or staged (`span_reader`)
    records <-------- some records of a layer, where they lie (`record_reader`)

The far plane is written once and never moves; a fork shares it. Knows no attention, no model and no
codec: records are rows of bytes. `page_table` says where they are, `policy` where new ones go,
`planes` holds the bytes, `transfer` moves what is on disk. One thread calls; the I/O threads are
`transfer`'s own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch

from ...prefetch.registry import make_predictor
from ...prefetch.source import Predictor
from ...prefetch.stats import Stats
from ..disk.disk import ALIGNMENT_BYTES, ScratchFile
from ..disk.extent_file import ExtentFile
from ..disk.io_threads import IoThreads
from ..disk.transfer import Transfers
from ..errors import DoesNotFit, InputError
from .eviction import make_eviction
from .hot_records import HotRecords
from .page_table import Extent, Extents, PageTable, Tier, TierUsage
from .planes import Planes
from .policy import Homes, make_policy
from .record_reader import RecordReader
from .span_reader import SpanReader
from .store_options import StoreOptions


class PageStore:
    """See the head of this file; `close` it, or use it as a context manager.

    num_layers: those that keep pages; pages_of: see PageTable. near_record_bytes: of every layer,
    or of each; layers of one size share an arena of near planes. spans_at_once: how many spans each
    layer has where the one with the longest has one; by default all as many. most_spans: of layers
    that let go of old spans (`drop`), the most that they have at a time; None, the default: of one
    that keeps all. spans_first: so many spans of the fastest memory are for the former, which have
    what is free of it, since every step reads what they have.
    frames: records per tier; whole spans are used. spill: opens the scratch file, if there are disk
    frames. options: how all of it moves.

    G1: bytes are written to an extent only while one table refers to it (`_writable`).
    G2: disk frames are not written to while a read or an earlier write of them is under way
        (`Planes.forget`).
    G3: a change that is interrupted, at whatever instruction, leaves `_is_changing` set; the next
        call makes all that was derived from tables anew (`_restore`). Nothing undoes it before.

    Errors: DoesNotFit (nothing was written); StorageError, which every call after it repeats;
    InputError for a spill folder, policy or predictor that cannot be used.
    """

    def __init__(
        self,
        num_layers: int,
        record_bytes: int,
        near_record_bytes: int | Sequence[int],
        records_per_span: int,
        frames: Mapping[Tier, int],
        compute_device: torch.device | str = "cpu",
        spill: Callable[[], ScratchFile] | None = None,
        *,
        pages_of: Sequence[int] | None = None,
        spans_at_once: Sequence[int] | None = None,
        most_spans: Sequence[int | None] | None = None,
        spans_first: int = 0,
        options: StoreOptions | None = None,
    ):
        options = options or StoreOptions()
        self.num_layers, self.records_per_span = num_layers, records_per_span
        self.record_bytes = record_bytes
        if isinstance(near_record_bytes, int):
            near_record_bytes = [near_record_bytes] * num_layers
        assert len(near_record_bytes) == num_layers
        self.near_record_bytes = tuple(near_record_bytes)  # by layer
        self._pages_of = pages_of or range(num_layers)
        spans_at_once = spans_at_once or [1] * num_layers
        most_spans = most_spans or [None] * num_layers
        self.compute_device = torch.device(compute_device)
        self.stats = Stats(bytes_read={t.value: 0 for t in Tier})
        self.stats.bytes_written = dict(self.stats.bytes_read)
        predictor = _predictor(options.predictor)
        self._tables: set[PageTable] = set()
        self._is_changing = False  # G3

        near_sizes = list(dict.fromkeys(self.near_record_bytes))
        near_arenas = [near_sizes.index(size) for size in self.near_record_bytes]
        self._extents = Extents(frames, records_per_span, near_arenas, spans_at_once, most_spans)
        policy = options.policy
        policy = make_policy(policy) if isinstance(policy, str) else policy
        self._homes = Homes(policy, self._extents, spans_at_once, most_spans, spans_first)
        eviction = options.eviction
        if isinstance(eviction, str):
            eviction = make_eviction(eviction, len(self._extents.crcs[Tier.DISK]))
        self._transfers = self._hot = None
        if self._extents.num_extents[Tier.DISK]:
            assert spill is not None, "disk frames need a scratch file"
            assert record_bytes % ALIGNMENT_BYTES == 0, "records go to disk without being padded"
            owner = partial(self._extents.owner, Tier.DISK)
            crcs = self._extents.crcs[Tier.DISK]
            io = IoThreads(
                ExtentFile(spill(), record_bytes, crcs, owner, options.read_delay),
                records_per_span,
                record_bytes,
                self.stats,
                num_slots=options.staging_slots,
                num_buffers=options.write_buffers,
                num_threads=options.io_threads if options.overlap else 0,
                num_hot=options.hot_records,
                compute_device=self.compute_device,
                stall_limit_s=options.stall_limit_s,
            )
            self._transfers = Transfers(io, self.stats)
            if options.hot_records:
                self._hot = HotRecords(
                    io, len(crcs), records_per_span, record_bytes, eviction, self.stats
                )

        is_copied = options.copy_to_compute or self.compute_device.type != "cpu"
        self._planes = Planes(
            self._extents.num_extents,
            records_per_span,
            record_bytes,
            near_sizes,
            self._extents.num_near_extents,
            [near_arenas[layer] for layer in self._pages_of],
            self.compute_device,
            self._transfers,
            options.staging_slots if is_copied else 0,
            self.stats,
        )

        self.records = RecordReader(self._planes, self._hot, self.stats, record_bytes)
        self.spans = SpanReader(
            self._check,
            self._planes,
            self.records,
            self._transfers,
            predictor,
            self.stats,
            record_bytes,
        )

    # ---- tables ------------------------------------------------------------------------------

    def open_table(self, expected_spans: int | None = None) -> PageTable:
        """An empty table. expected_spans: how many the layers with the longest spans may reach, for
        the policy; may be changed on the table as more becomes known."""
        table = PageTable(self.num_layers, self.records_per_span, expected_spans, self._pages_of)
        self._tables.add(table)
        return table

    def fork(self, table: PageTable) -> PageTable:
        """A table with the same records, shared until one of the two appends to them."""
        with self._change(table):
            other = table.fork()
            for extent in other.extents():
                self._extents.share(extent)
            self._tables.add(other)
        return other

    def truncate(self, table: PageTable, num_records: int | Sequence[int]) -> None:
        """Keeps the first `num_records` of every layer, or so many of each."""
        with self._change(table):
            for extent in table.truncate(num_records):
                self._release(extent)

    def drop(self, table: PageTable, layer: int, but: Sequence[range]) -> None:
        """Lets go of a layer's spans outside of these ranges, which nobody will read any more."""
        with self._change(table):
            for extent in table.drop(layer, but):
                self._release(extent)

    def skip(self, table: PageTable, layer: int, num_records: int) -> None:
        """Counts records of a layer as if they were written, which nobody will ever read: they
        begin in a span that has no others."""
        with self._change(table):
            table.skip(layer, num_records)

    def close_table(self, table: PageTable) -> None:
        """Frees what no other table shares. May be called again, and after a failure."""
        if table not in self._tables:
            return
        self._restore()
        self._is_changing, table.is_open = True, False
        self.records.forget(table)
        self.spans.forget()
        self._tables.discard(table)
        for extent in table.truncate(0):
            self._release(extent)
        self._is_changing = False

    def close(self) -> None:
        """Joins the I/O threads and gives all memory and the scratch file back. May be called
        again. Raises StorageError when the disk does not answer any more."""
        for table in list(self._tables):
            table.is_open = False
        self._tables.clear()
        self._planes.close()
        if self._transfers is not None:
            self._transfers.close()

    def __enter__(self) -> PageStore:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    # ---- writing -----------------------------------------------------------------------------

    def write(
        self,
        table: PageTable,
        layer: int,
        first_record: int,
        near: torch.Tensor,
        records: torch.Tensor,
    ) -> None:
        """Appends records to a layer: first_record is how many it has.

        near: (num_records, near_record_bytes of the layer) uint8; records: (num_records,
        record_bytes) uint8; both may be overwritten afterwards. Raises DoesNotFit, before anything
        is written, when the tiers have no room, and StorageError, perhaps for an earlier write.
        """
        self._check(table)
        num_records = len(records)
        near_shape = num_records, self.near_record_bytes[layer]
        assert near.shape == near_shape and near.dtype == torch.uint8
        assert records.shape == (num_records, self.record_bytes) and records.dtype == torch.uint8
        assert first_record == table.num_records(layer), "records are appended in order"
        self._check_room(table, layer, num_records)
        done = 0
        while done < num_records:
            span, start = divmod(first_record + done, self.records_per_span)
            count = min(num_records - done, self.records_per_span - start)
            rows = slice(done, done + count)
            with self._change(table):
                fresh = self._allocate(table, layer, span) if start == 0 else None
                extent = fresh or self._writable(table, layer, span, start)
                self._planes.put(extent, start, near[rows], records[rows])
                table.append(layer, count, fresh)
            done += count
        self.stats.given_bytes += num_records * self.record_bytes

    def flush(self) -> None:
        """Waits until all that was written is on disk, and is counted; raises if it is not."""
        if self._transfers is not None:
            self._transfers.flush()

    def num_lacking(self, wanted: Mapping[int, int]) -> int:
        """How many spans are not there where layers want so many more, besides those of layers that
        have at most so many. Takes none."""
        self._restore()
        return self._extents.num_lacking(wanted)

    def _check_room(self, table: PageTable, layer: int, num_records: int) -> None:
        needed = table.extents_needed(layer, num_records)
        free = sum(self._extents.num_free(tier) for tier in Tier)
        free = min(free, self._extents.num_free_near(layer))
        if needed > free:
            tiers = [t for t in Tier if self._extents.num_extents[t]] or [Tier.HOST]
            span_bytes = self.records_per_span * self.record_bytes
            raise DoesNotFit(
                f"the page store is full: layer {layer} needs {needed} more spans of {span_bytes} "
                f"bytes, and {free} are free in {', '.join(t.value for t in tiers)}, near planes "
                "included",
                tier=tiers[-1].value,
                needed_bytes=needed * span_bytes,
                available_bytes=free * span_bytes,
            )

    def _allocate(self, table: PageTable, layer: int, span: int) -> Extent:
        """A new extent, in the tier that is chosen for it."""
        tier = self._homes.choose(layer, span, table.expected_spans)
        return self._extents.allocate(tier, layer, span)

    def _writable(self, table: PageTable, layer: int, span: int, start: int) -> Extent:
        """The extent of a partly filled span, with exactly `start` records and no other owner."""
        extent = table.extent(layer, span)
        if extent.refs > 1:
            return self._copy_on_write(table, layer, span, start)
        if extent.filled > start:  # the table was truncated, or another one that saw more is gone
            self._forget(extent)
            extent.trim(start)
        return extent

    def _copy_on_write(self, table: PageTable, layer: int, span: int, start: int) -> Extent:
        """Gives the table an extent of its own with a copy of the first `start` records."""
        old = table.extent(layer, span)
        new = self._allocate(table, layer, span)
        with self._planes.get_in_place(old, start) as pages:
            self._planes.put(new, 0, pages.near, pages.records)
        new.filled = start
        table.replace(layer, span, new)
        self._release(old)
        return new

    # ---- the rest ----------------------------------------------------------------------------

    def usage(self) -> dict[Tier, TierUsage]:
        """Bytes of records per tier; staging and near planes are not in it (`reserved_bytes`)."""
        return {tier: self._extents.usage(tier, self.record_bytes) for tier in Tier}

    def reserved_bytes(self) -> dict[Tier, int]:
        """All that the store takes of each tier, staging and near planes included. Host memory is
        given out as it is touched; device memory at once; disk as the scratch file grows."""
        reserved = {tier: usage.capacity_bytes for tier, usage in self.usage().items()}
        for tier, num_bytes in self._planes.overhead_bytes().items():
            reserved[tier] += num_bytes
        if self._transfers is not None:
            reserved[Tier.HOST] += self._transfers.buffer_bytes
        if self._hot is not None:
            reserved[Tier.HOST] += self._hot.num_bytes
        return reserved

    def check_integrity(self, deep: bool = False) -> None:
        """Asserts every numbered invariant; deep: also that memory holds what was written."""
        self._restore()
        self._extents.check(self._tables)
        self._planes.check({e for table in self._tables for e in table.extents()}, deep)
        if self._transfers is not None:
            self._transfers.check_integrity()
        if self._hot is not None:
            self._hot.check()

    def _forget(self, extent: Extent) -> None:
        """The extent's bytes will change: nothing of them may be under way, or be found."""
        self._planes.forget(extent)
        if self._hot is not None and extent.tier is Tier.DISK:
            self._hot.forget(extent)

    def _release(self, extent: Extent) -> None:
        """One reference less; the last one frees the frames, once nothing of them is under way."""
        if extent.refs == 1:
            self._forget(extent)
        self._extents.release(extent)

    def _check(self, table: PageTable) -> None:
        """Every call's first line: our own mistakes, then failures that came in meanwhile."""
        assert table in self._tables, "the table is closed or another store's"
        if self._transfers is not None:
            self._transfers.check()
        self._restore()

    @contextmanager
    def _change(self, table: PageTable) -> Iterator[None]:
        """Around what changes a table and the counts of extents: see G3."""
        self._check(table)
        self._is_changing = True
        yield
        self._is_changing = False

    def _restore(self) -> None:
        """After a change that was interrupted: tables are right, and all else is made from them.
        What no table shows is not under way either, and its frames are free."""
        if not self._is_changing:
            return
        for table in self._tables:
            table.restore()
        for extent, num_seen in self._extents.unfilled(self._tables):
            self._forget(extent)
            extent.trim(num_seen)
        self._extents.restore(self._tables)
        self._is_changing = False


def _predictor(predictor: Predictor | str) -> Predictor:
    if not isinstance(predictor, str):
        return predictor
    try:
        return make_predictor(predictor)
    except ValueError as error:
        raise InputError(str(error)) from error

"""Spans of a layer, wherever they lie: what attention to all of a layer's pages is given.

    prefetch     wishes for spans that are needed soon
    fetch        one span: views of memory, or of a staging slot that was filled in the background
    fetch_run    some spans that follow each other, by address, where they are read in place
    fetch_table  those of all layers, by address, where none is on disk

Knows tables, and neither codec nor model. The owner of the tables is `pager`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from ...prefetch.source import Predictor
from ...prefetch.stats import Stats
from ...prefetch.walk import Walk
from ..disk.transfer import Transfers
from .page_table import PageTable, Tier
from .planes import Pages, Planes
from .record_reader import RecordReader
from .span_addresses import SpanAddresses, SpanRun, TableAddresses


class SpanReader:
    """Reads by span number. check: called first with each table that is read, raises what came in
    meanwhile; transfers: None without a disk tier."""

    def __init__(
        self,
        check: Callable[[PageTable], None],
        planes: Planes,
        records: RecordReader,
        transfers: Transfers | None,
        predictor: Predictor,
        stats: Stats,
        record_bytes: int,
    ):
        self._check, self._planes, self._records = check, planes, records
        self._transfers, self._predictor = transfers, predictor
        self._stats, self._record_bytes = stats, record_bytes
        self._walk = Walk()

    def fetch(
        self, table: PageTable, layer: int, span: int, num_records: int | None = None
    ) -> Pages:
        """The span's first `num_records` (default: all) on the compute device, for a `with` block.

        Blocks until they are there. Raises StorageError when they cannot be read or are damaged.
        """
        self._check(table)
        seen = table.records_seen(layer, span)
        count = seen if num_records is None else num_records
        assert 0 < count <= seen, f"{count} records asked of {seen}"
        self._follow(table, layer, span)
        return self._planes.get(table.extent(layer, span), count)

    def look_at(self, table: PageTable, layer: int, span: int) -> Pages:
        """The span's records where they are, for a `with` block that copies them elsewhere. Nothing
        is foreseen from it, and reads from disk are counted as any others. Raises StorageError."""
        self._check(table)
        return self._planes.get_in_place(table.extent(layer, span), table.records_seen(layer, span))

    def fetch_run(self, table: PageTable, layer: int, first: int, stop: int) -> SpanRun | None:
        """Some of the spans first .. stop - 1, from the first on, by address, for a `with` block:
        all that lie in memory at home, or a few from disk with what lies between them.

        None where the first is not read in place: `fetch` it. Blocks and raises as `fetch` does.
        """
        self._check(table)
        addresses = self._records.addresses(table, layer)
        if addresses is None:
            return None
        run = addresses.run(first, stop)
        if run.stop == first and not self._records.reads_in_place:
            return None
        if run.stop == first:
            run = self._fetch_staged(table, layer, first, stop, addresses)
        extent = addresses.where.extent
        num_staged = sum(extent(span).tier is Tier.DISK for span in range(first, run.stop))
        self._stats.resident += run.stop - first - num_staged
        for tier, count in run.reads:
            self._stats.bytes_read[tier.value] += count * self._record_bytes
        if self._transfers is not None and not num_staged:
            for span in range(first, run.stop):
                self._follow(table, layer, span)
        return run

    def fetch_table(self, table: PageTable, spans: list[range]) -> TableAddresses | None:
        """What `fetch_run` gives of each layer's spans, for all layers at once, until the table
        changes; None where some of them are on disk or records are not read in place.
        """
        self._check(table)
        addresses = self._records.table_addresses(table)
        reads = None if addresses is None else addresses.reads(spans)
        if reads is None:
            return None
        self._stats.resident += sum(map(len, spans))
        for tier, count in reads.items():
            self._stats.bytes_read[tier.value] += count * self._record_bytes
        if self._transfers is not None:
            for layer, wanted in enumerate(spans):
                for span in wanted:
                    self._follow(table, layer, span)
        return addresses

    def _fetch_staged(
        self, table: PageTable, layer: int, first: int, stop: int, addresses: SpanAddresses
    ) -> SpanRun:
        """As many spans as hold no more from disk than may be held at once."""
        transfers, extent, on_disk, end = self._transfers, addresses.where.extent, [], first
        assert transfers is not None, "an extent on disk without disk frames"
        while end < stop:
            if extent(end).tier is Tier.DISK:
                if len(on_disk) == transfers.most_held:
                    break
                on_disk.append(end)
            end += 1
        for span in range(first, end):
            self._follow(table, layer, span)
        wanted = [(extent(span), table.records_seen(layer, span)) for span in on_disk]
        slots = transfers.demand_all(wanted)
        places = {s: transfers.place(slot) for s, slot in zip(on_disk, slots, strict=True)}
        return addresses.visiting(first, end, places, partial(transfers.release_all, slots))

    def prefetch(self, table: PageTable, layer: int, spans: Sequence[int] | None = None) -> None:
        """Wishes for spans, most urgent first; None: as the predictor says. Never blocks.

        What is in memory, or not there at all, is passed over.
        """
        self._check(table)
        if self._transfers is None:
            return
        num_spans = table.num_spans(layer)
        if spans is None:
            spans = self._predictor.predict(layer, num_spans)
        entries = table.entries(layer)
        extents = [entries[span] for span in spans if 0 <= span < num_spans]
        on_disk = [extent for extent in extents if extent and extent.tier is Tier.DISK]
        self._transfers.wish(on_disk, (table, layer))

    def is_ready(self, table: PageTable, layer: int, span: int) -> bool:
        """Whether fetching the whole span now would not wait."""
        extent = table.extent(layer, span)
        if extent.tier is not Tier.DISK or self._transfers is None:
            return True
        return self._transfers.is_ready(extent, table.records_seen(layer, span))

    def _follow(self, table: PageTable, layer: int, span: int) -> None:
        """When a fetch ends a pass, tells the predictor and drops what was wished for in vain."""
        transfers = self._transfers
        ended = self._walk.follow((table, layer), span, transfers.batch if transfers else 0)
        if ended is not None:
            _, layer_left = ended.group
            self._predictor.record(layer_left, ended.spans)
            if ended.is_left and transfers is not None:
                transfers.move_on(ended.group, ended.batch)

    def forget(self) -> None:
        """A table is closed: nothing follows from what was read last."""
        self._walk.forget()

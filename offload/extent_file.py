"""Extents in a scratch file: where they lie, and that they come back as they were written.

Every record has a CRC from the moment it is written; a read compares it. Knows one request at a
time: threads, slots and queues are `transfer`'s.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable

from .disk import ScratchFile
from .errors import StorageError
from .page_table import Extent


def crcs_of(view: memoryview, record_bytes: int) -> list[int]:
    """CRC-32 of each record of a flat view; 4 GB/s, and other threads run meanwhile."""
    ends = range(record_bytes, len(view) + 1, record_bytes)
    return [zlib.crc32(view[end - record_bytes : end]) for end in ends]


class ExtentFile:
    """Frame f of the disk tier lies at byte f * record_bytes of the scratch file.

    read_delay: seconds that each read takes longer, for tests and simulations.
    """

    def __init__(
        self,
        file: ScratchFile,
        record_bytes: int,
        read_delay: Callable[[], float] | None = None,
    ):
        self.directory = file.directory
        self._file = file
        self._record_bytes = record_bytes
        self._read_delay = read_delay

    def read(self, extent: Extent, view: memoryview) -> None:
        """Fills a view with the extent's first records, as many as it has room for.

        Raises StorageError when they cannot be read or are not what was written.
        """
        self._read(extent, 0, view)

    def read_record(self, extent: Extent, index: int, view: memoryview) -> None:
        """Fills a view of one record's size with record `index`. Raises as `read` does."""
        self._read(extent, index, view)

    def _read(self, extent: Extent, first: int, view: memoryview) -> None:
        if self._read_delay is not None:
            time.sleep(self._read_delay())
        self._file.read_into(view, (extent.base + first) * self._record_bytes)
        for record, crc in enumerate(crcs_of(view, self._record_bytes), first):
            if crc != extent.crcs[record]:
                raise StorageError(
                    f"layer {extent.layer}, span {extent.span}: record {record} came back from "
                    f"{self.directory} other than it was written (CRC {crc:08x}); "
                    "the disk or the memory is failing"
                )

    def write(self, extent: Extent, first: int, view: memoryview) -> None:
        """Writes a view's records to frames first .. of the extent, and notes their CRCs."""
        crcs = crcs_of(view, self._record_bytes)
        self._file.write_from(view, (extent.base + first) * self._record_bytes)
        extent.crcs[first : first + len(crcs)] = crcs

    def close(self) -> None:
        self._file.close()

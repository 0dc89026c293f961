"""Records in a scratch file: where they lie, and that they come back as they were written.

Every record has a CRC from the moment it is written; a read compares it. Knows one request at a
time: threads and queues are `reads`'s, slots `transfer`'s.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable

import numpy as np

from ...kernels import dispatch
from ..errors import StorageError
from ..pages.page_table import Extent
from .disk import ScratchFile, Way


def crcs_of(view: memoryview, record_bytes: int) -> np.ndarray:
    """CRC-32 of each record of a flat writable view, uint32; other threads run meanwhile."""
    crcs = np.empty(len(view) // record_bytes, dtype=np.uint32)
    native = dispatch.compiled_for()
    if native is not None:
        address = np.frombuffer(view, dtype=np.uint8).ctypes.data
        native.crcs_of(address, len(crcs), record_bytes, crcs.ctypes.data)
    else:
        for i in range(len(crcs)):
            crcs[i] = zlib.crc32(view[i * record_bytes : (i + 1) * record_bytes])
    return crcs


class ExtentFile:
    """Frame f of the disk tier lies at byte f * record_bytes of the scratch file.

    crcs: (num_frames,) uint32, of each frame's record; filled in as they are written. owner: the
    extent that a frame belongs to, for errors to name. read_delay: seconds that each read takes
    longer, for tests and simulations.
    """

    def __init__(
        self,
        file: ScratchFile,
        record_bytes: int,
        crcs: np.ndarray,
        owner: Callable[[int], Extent],
        read_delay: Callable[[], float] | None = None,
    ):
        self.directory, self.record_bytes, self.crcs = file.directory, record_bytes, crcs
        self._file, self._owner = file, owner
        self._read_delay = read_delay

    def read(self, frame: int, view: memoryview) -> None:
        """Fills a view with the records of frames `frame` and on, as many as it has room for.

        Raises StorageError when they cannot be read or are not what was written.
        """
        self.read_unchecked(frame, view)
        crcs = crcs_of(view, self.record_bytes)
        wrong = np.flatnonzero(crcs != self.crcs[frame : frame + len(crcs)])
        if len(wrong):
            raise self.damage(frame + int(wrong[0]), int(crcs[wrong[0]]))

    def read_unchecked(self, frame: int, view: memoryview) -> None:
        """The same without comparing CRCs."""
        if self._read_delay is not None:
            time.sleep(self._read_delay())
        self._file.read_into(view, frame * self.record_bytes)

    def write(self, frame: int, view: memoryview) -> None:
        """Writes a view's records to frames `frame` and on, and notes their CRCs."""
        crcs = crcs_of(view, self.record_bytes)
        self._file.write_from(view, frame * self.record_bytes)
        self.crcs[frame : frame + len(crcs)] = crcs

    @property
    def descriptor(self) -> int | None:
        """What `preadv` reads from, to the same effect as `read_unchecked`; None when only that
        will do: the portable way, delays, and files whose reading is redefined."""
        usual = type(self._file)._read_some is ScratchFile._read_some
        usual = usual and "_read_some" not in vars(self._file)
        if not usual or self._file.way is Way.PORTABLE or self._read_delay is not None:
            return None
        return self._file.descriptor

    @property
    def drops_cache(self) -> bool:
        """Whether the page cache is told to let go of what was read from `descriptor`."""
        return self._file.way is Way.NOCACHE

    def count_reads(self, num_reads: int, num_bytes: int, seconds: float) -> None:
        """Adds reads that went by `descriptor` to the scratch file's counters."""
        self._file.count("read", num_bytes, seconds, num_reads)

    def read_error(self, num_bytes: int, error: OSError) -> StorageError:
        """What a read by `descriptor` that failed is told as."""
        return self._file.error("read", num_bytes, error)

    def damage(self, frame: int, crc: int) -> StorageError:
        """What a record is told as that came back with this CRC, and not its own."""
        extent = self._owner(frame)
        return StorageError(
            f"layer {extent.layer}, span {extent.span}: record {frame - extent.base} came back "
            f"from {self.directory} other than it was written (CRC {crc:08x}); "
            "the disk or the memory is failing"
        )

    def close(self) -> None:
        self._file.close()

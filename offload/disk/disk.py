"""The scratch file: bytes at offsets, on disk, unseen by anybody else and gone with the process.

Three ways behind one interface, selectable everywhere that has the system calls:

    o_direct   Linux: aligned preadv/pwritev past the page cache
    nocache    preadv/pwritev; macOS: F_NOCACHE, elsewhere the cache is told to let go after reads;
               also what o_direct becomes on a filesystem that does not know it
    portable   seek, then read or write; the file keeps its name until it is closed

Knows no records, no checksums and no threads, but may be called from several at once.
"""

from __future__ import annotations

import errno
import io
import mmap
import os
import threading
import time
import weakref
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

from ..errors import StorageError
from .scratch import create_named, create_unnamed, sweep
from .spill_dir import KEPT_FREE_BYTES as KEPT_FREE_BYTES  # part of this file's face, too
from .spill_dir import check_space as check_space
from .spill_dir import default_spill_dir, dir_error, format_bytes
from .spill_dir import volume_warnings as volume_warnings

__all__ = [
    "ALIGNMENT_BYTES",
    "KEPT_FREE_BYTES",
    "DiskCounters",
    "ScratchFile",
    "Way",
    "check_space",
    "volume_warnings",
]

ALIGNMENT_BYTES = 4096  # what direct I/O asks of addresses, offsets and lengths
STEP_BYTES = 64 << 20  # growing by this much at a time costs 16 system calls per GiB


class Way(Enum):
    """How bytes travel; the value is what an option calls it."""

    DIRECT = "o_direct"
    NOCACHE = "nocache"
    PORTABLE = "portable"


def default_way() -> Way:
    """The fastest way that this system has."""
    if not hasattr(os, "preadv"):
        return Way.PORTABLE
    return Way.DIRECT if hasattr(os, "O_DIRECT") else Way.NOCACHE


@dataclass
class DiskCounters:
    """What a scratch file did: amounts, requests (one per call) and the seconds they took."""

    bytes_read: int = 0
    bytes_written: int = 0
    num_reads: int = 0
    num_writes: int = 0
    read_s: float = 0.0
    write_s: float = 0.0


class ScratchFile:
    """A private file that grows, in `directory` (default: the user's cache folder).

    F1: the file has mode 0600 whatever the umask, was made by this process (O_EXCL), and has no
        name from the start where the system can, else none after `close`.
    F2: all bytes below size_bytes are reserved where the system can, so writing to them does not
        fail for want of room.
    F3: offsets, lengths and addresses are multiples of ALIGNMENT_BYTES, in every way, so that
        whatever runs one way runs all three.

    step_bytes: by how much the file grows at a time, up to most_bytes, and beyond them by no more
    than is written.

    Errors: InputError for a folder that cannot be used, StorageError for the rest.
    """

    def __init__(
        self,
        directory: Path | str | None = None,
        way: Way | str | None = None,
        step_bytes: int = STEP_BYTES,
        most_bytes: int | None = None,
    ):
        self.directory = Path(directory) if directory is not None else default_spill_dir()
        self.way = Way(way) if way is not None else default_way()
        self.size_bytes = 0  # F2
        self.counters = DiskCounters()
        self._step_bytes, self._most_bytes = step_bytes, most_bytes
        self._counting = threading.Lock()
        self._growing = threading.Lock()
        self._position = threading.Lock()  # portable: a seek and its read belong together
        try:
            self.num_swept = sweep(self.directory)
            self._fd, self._path = self._open()
        except OSError as error:
            raise dir_error(self.directory, error) from error
        self._file = io.FileIO(self._fd, "r+")
        # Also at the interpreter's end, and never in a child process that inherited us.
        self._finalizer = weakref.finalize(self, _dispose, self._file, self._path, os.getpid())

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fills the whole view from the file. Raises StorageError when that cannot be done."""
        self._move(self._read_some, view, offset, "read")

    def write_from(self, view: memoryview, offset: int) -> None:
        """Writes the whole view, growing the file as needed. Raises StorageError on failure."""
        self.reserve(offset + len(view))
        self._move(self._write_some, view, offset, "write")

    @property
    def descriptor(self) -> int:
        """The open file, for readers of their own."""
        return self._fd

    def sync(self) -> None:
        """Brings all to the disk and lets the cache go, so that a measurement reads the disk."""
        os.fsync(self._fd)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Gives the file and its room back. May be called again."""
        self._finalizer()

    def snapshot(self) -> DiskCounters:
        """A copy of the counters."""
        with self._counting:
            return replace(self.counters)

    # ---- moving bytes ------------------------------------------------------------------------

    def _move(self, some, view: memoryview, offset: int, verb: str) -> None:
        """Repeats `some` until the whole view has moved: systems may move less than asked."""
        assert offset % ALIGNMENT_BYTES == 0 and len(view) % ALIGNMENT_BYTES == 0, "F3"
        started = time.perf_counter()
        done = 0
        while done < len(view):
            try:
                moved = some(view[done:], offset + done)
            except InterruptedError:
                continue
            except OSError as error:
                raise self.error(verb, len(view), error) from error
            before, done = done, done + moved
            if done < len(view):
                # The rest must start on a boundary again, so part of it moves twice; less than a
                # block is what a file that ends there gives, again and again.
                done -= done % ALIGNMENT_BYTES
            if done == before:
                text = "the file is shorter than it should be" if verb == "read" else "no progress"
                raise self.error(verb, len(view), OSError(errno.EIO, text))
        self.count(verb, len(view), time.perf_counter() - started)

    def count(self, verb: str, num_bytes: int, seconds: float, num_requests: int = 1) -> None:
        """Adds requests to the counters: of this object, or made by `descriptor`."""
        with self._counting:
            c = self.counters
            if verb == "read":
                c.bytes_read, c.num_reads = c.bytes_read + num_bytes, c.num_reads + num_requests
                c.read_s += seconds
            else:
                c.bytes_written += num_bytes
                c.num_writes += num_requests
                c.write_s += seconds

    def _read_some(self, view: memoryview, offset: int) -> int:
        """One read; returns how many bytes it brought."""
        if self.way is Way.PORTABLE:
            with self._position:
                self._file.seek(offset)
                return self._file.readinto(view) or 0
        num_bytes = os.preadv(self._fd, [view], offset)
        if self.way is Way.NOCACHE and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._fd, offset, num_bytes, os.POSIX_FADV_DONTNEED)
        return num_bytes

    def _write_some(self, view: memoryview, offset: int) -> int:
        """One write; returns how many bytes it took."""
        if self.way is Way.PORTABLE:
            with self._position:
                self._file.seek(offset)
                return self._file.write(view) or 0
        return os.pwritev(self._fd, [view], offset)

    # ---- room --------------------------------------------------------------------------------

    def reserve(self, end: int) -> None:
        """Makes the file reach `end`, a step at a time (F2). Raises StorageError on failure."""
        if end <= self.size_bytes:
            return
        with self._growing:
            while self.size_bytes < end:
                # The last step of a nearly full disk may be too large: then just what is needed.
                step_end = self.size_bytes + self._step_bytes
                if self._most_bytes is not None:  # what others count on is not taken from them
                    step_end = min(step_end, self._most_bytes)
                for size in (step_end, end):
                    size = max(size, end)
                    try:
                        self._allocate(self.size_bytes, size - self.size_bytes)
                    except OSError as error:
                        if size > end and error.errno in (errno.ENOSPC, errno.EDQUOT):
                            continue
                        raise self.error("write", end - self.size_bytes, error) from error
                    self.size_bytes = size
                    break

    def _allocate(self, offset: int, num_bytes: int) -> None:
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(self._fd, offset, num_bytes)
                return
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENODEV):
                    raise
        self._file.truncate(offset + num_bytes)

    def error(self, verb: str, num_bytes: int, error: OSError) -> StorageError:
        """What happened, how much, where, and what to do."""
        reason = error.strerror or str(error)
        text = (
            f"could not {verb} {format_bytes(num_bytes)} of scratch in {self.directory}: {reason}"
        )
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            text += f" (the scratch file has {format_bytes(self.size_bytes)}"
            try:
                text += f", {format_bytes(check_space(self.directory, 0))} are free"
            except Exception:  # the advice is worth more than the amount
                pass
            text += "); free some space, choose another volume with --spill-dir, or use fewer "
            text += "bytes with a smaller --context or --kv-bits"
        else:
            text += "; check the volume, or choose another with --spill-dir"
        return StorageError(text)

    # ---- opening -----------------------------------------------------------------------------

    def _open(self) -> tuple[int, str | None]:
        """A new empty file as (descriptor, path); path is None when it has no name (F1)."""
        if self.way is Way.DIRECT:
            try:
                fd = create_unnamed(self.directory, getattr(os, "O_DIRECT", 0))
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                fd = None
            if fd is not None:
                if _direct_works(fd):
                    return fd, None
                os.close(fd)
            self.way = Way.NOCACHE
        if self.way is Way.NOCACHE:
            fd = create_unnamed(self.directory, 0)
            if not hasattr(os, "posix_fadvise"):
                import fcntl

                fcntl.fcntl(fd, getattr(fcntl, "F_NOCACHE", 48), 1)
            return fd, None
        return create_named(self.directory, getattr(os, "O_BINARY", 0))


def _direct_works(fd: int) -> bool:
    """Whether one aligned block can be written and read: some filesystems fail only then."""
    block = mmap.mmap(-1, ALIGNMENT_BYTES)
    try:
        return os.pwritev(fd, [block], 0) == os.preadv(fd, [block], 0) == ALIGNMENT_BYTES
    except OSError as error:
        if error.errno == errno.EINVAL:
            return False
        raise


def _dispose(file: io.FileIO, path: str | None, pid: int) -> None:
    """Closes the file and takes its name away."""
    file.close()
    if path is not None and os.getpid() == pid:
        try:
            os.unlink(path)
        except FileNotFoundError:
            pass

"""A file's bytes from the system's cache where they lie there, and past it where they do not.

What is read again and again and does not fit in the cache is never found there: the system lets go
of each part shortly before it is read once more, and copying it through costs a core (1.4 GB in
parts of 30 MiB: 0.4 to 0.7 GB/s with 1 to 2 s of processor time; past the cache 1.8 to 2.0 GB/s
with 0.05). What does fit is read from memory, ten times as fast. So the system is asked which parts
it has (mincore). Where it cannot be asked, or has no way past its cache, all goes through it.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from .errors import StorageError
from .open_file import read_at

# What reading past the cache asks of places, lengths and addresses, and what the cache holds.
BLOCK_BYTES = mmap.PAGESIZE
_ASKED_BYTES = 1 << 20  # of which all lie in the cache, or count as if none did


def whole_blocks(num_bytes: int) -> int:
    """The room of so many bytes, in whole blocks."""
    return -(-num_bytes // BLOCK_BYTES) * BLOCK_BYTES


class PastCacheReader:
    """Reads a file that is whole and stays as it is; several threads may read. descriptor: of the
    file, open as usual, and closed by whoever opened it. name: for messages."""

    def __init__(self, descriptor: int, name: str):
        self._descriptor, self._name = descriptor, name
        self._direct = self._map = None
        mincore, size = _mincore(), os.fstat(descriptor).st_size
        if mincore is None or size == 0:
            return
        try:  # addresses alone: none of them is ever read
            mapped = mmap.mmap(descriptor, size, prot=mmap.PROT_READ)
        except (OSError, ValueError):
            return
        self._direct = _opened_past_cache(descriptor)
        if self._direct is not None:
            self._map = np.frombuffer(mapped, np.uint8)

    def read(self, view: memoryview, offset: int) -> None:
        """Fill the view from a byte of the file on. Past the cache go whole blocks, to where blocks
        begin. Raises StorageError."""
        for start, stop, descriptor in self._runs(view, offset):
            try:
                self._fill(view, start, stop, descriptor, offset)
            except StorageError:
                if descriptor == self._descriptor:
                    raise
                # A file system may have no such reads of some places. What is wrong comes again.
                self._fill(view, start, stop, self._descriptor, offset)

    def _fill(self, view: memoryview, start: int, stop: int, descriptor: int, offset: int) -> None:
        """Bytes of the view, from, to; offset: in the file, of its first."""
        while start < stop:
            before = start
            start += read_at(descriptor, view[start:stop], self._name, offset + start)
            if descriptor == self._direct:  # one that ended early goes on where it may
                start -= start % BLOCK_BYTES
            if start == before:
                raise StorageError(f"{self._name} is shorter than what was written")

    def close(self) -> None:
        """May be called again; not while others read."""
        self._map = None
        if self._direct is not None:
            os.close(self._direct)
            self._direct = None

    def _runs(self, view: memoryview, offset: int) -> Iterator[tuple[int, int, int]]:
        """Parts of the view, from, to, and what to read them by."""
        if self._map is None or not _is_aligned(view, offset):
            yield 0, len(view), self._descriptor
            return
        begun, by = 0, None
        for start in range(0, len(view), _ASKED_BYTES):
            size = min(_ASKED_BYTES, len(view) - start)
            has_it = self._is_cached(offset + start, size)
            descriptor = self._descriptor if has_it else self._direct
            if by is not None and descriptor != by:
                yield begun, start, by
                begun = start
            by = descriptor
        if by is not None:
            yield begun, len(view), by

    def _is_cached(self, offset: int, size: int) -> bool:
        there = np.empty(-(-size // BLOCK_BYTES), np.uint8)
        if _mincore()(self._map.ctypes.data + offset, size, there.ctypes.data) != 0:
            return False
        return bool((there & 1).all())


def _is_aligned(view: memoryview, offset: int) -> bool:
    address = np.frombuffer(view, np.uint8).ctypes.data if len(view) else 0
    return not (address % BLOCK_BYTES or offset % BLOCK_BYTES or len(view) % BLOCK_BYTES)


def _opened_past_cache(descriptor: int) -> int | None:
    """The same file once more, for reads past the cache; None where there are none."""
    direct = None
    try:
        path = Path(f"/proc/self/fd/{descriptor}")
        direct = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        # Some file systems fail only now.
        block = mmap.mmap(-1, BLOCK_BYTES)
        os.preadv(direct, [block], 0)
        return direct
    except OSError:
        if direct is not None:
            os.close(direct)
        return None


@functools.cache
def _mincore() -> Callable[[int, int, int], int] | None:
    """Linux's; None elsewhere."""
    if not hasattr(os, "O_DIRECT") or not Path("/proc/self/fd").is_dir():
        return None
    try:
        found = ctypes.CDLL(None).mincore
    except (OSError, AttributeError):
        return None
    found.argtypes, found.restype = (
        [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p],
        ctypes.c_int,
    )
    return found

"""A file's bytes from the system's cache where they lie there, and past it where they do not.

What is read again and again and does not fit in the cache is never found there: the system lets go
of each part shortly before it is read once more, and copying it through costs a core (1.4 GB in
parts of 30 MiB: 0.4 to 0.7 GB/s with 1 to 2 s of processor time; past the cache 1.8 to 2.0 GB/s
with 0.05). What does fit is read from memory, ten times as fast. So the system is asked which parts
it has (mincore). Where that is not to be had, or no way past the cache, all goes through it.

Reads past the cache want whole blocks of the file, in memory where pages begin. What lies otherwise
is read into buffers that do, a piece each, and copied: 5 GB/s by one core, of a disk that gives 2.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from queue import SimpleQueue

import numpy as np

from ..errors import StorageError
from ..pages.tier import aligned_bytes
from .open_file import read_at

# What reading past the cache asks of places, lengths and addresses, and what the cache holds.
BLOCK_BYTES = mmap.PAGESIZE
_ASKED_BYTES = 1 << 20  # of which all lie in the cache, or count as if none did
# A disk serves several reads faster than one, and one is copied while others are read.
_PIECE_BYTES, _PIECES_AT_ONCE = 2 << 20, 4


def whole_blocks(num_bytes: int) -> int:
    """The room of so many bytes, in whole blocks."""
    return -(-num_bytes // BLOCK_BYTES) * BLOCK_BYTES


class EndsEarly(StorageError):
    """A file ends before what is read of it does."""


class BounceBuffers:
    """Threads that read into a buffer of whole blocks each, and copy from there. most_read: the
    most bytes that are read in one go."""

    def __init__(self, most_read: int):
        size = self.num_bytes(most_read) // _PIECES_AT_ONCE
        self._buffers: SimpleQueue[np.ndarray] = SimpleQueue()
        for _ in range(_PIECES_AT_ONCE):
            self._buffers.put(aligned_bytes(size).numpy())
        self._threads = ThreadPoolExecutor(_PIECES_AT_ONCE, "ebbtide-files")

    @staticmethod
    def num_bytes(most_read: int) -> int:
        """Of all buffers."""
        return _PIECES_AT_ONCE * (whole_blocks(min(most_read, _PIECE_BYTES)) + BLOCK_BYTES)

    def fill(self, view: memoryview, offset: int, read: Callable[[np.ndarray, int, int], None]):
        """Fill the view from a byte of a file on. read(buffer, offset, least): fills a buffer of
        whole blocks from where a block begins, with so many bytes at least. Raises what that
        raises, once nothing is written any more."""
        pieces: list[Future] = []
        start = 0
        while start < len(view):  # to where blocks begin, but for both ends
            stop = min(start + _PIECE_BYTES - (offset + start) % BLOCK_BYTES, len(view))
            pieces.append(self._threads.submit(self._copy, view[start:stop], offset + start, read))
            start = stop
        wait(pieces)
        for piece in pieces:
            piece.result()

    def _copy(self, view: memoryview, offset: int, read) -> None:
        within = offset % BLOCK_BYTES
        buffer = self._buffers.get()
        try:
            least = within + len(view)
            read(buffer[: whole_blocks(least)], offset - within, least)
            np.frombuffer(view, np.uint8)[:] = buffer[within:least]
        finally:
            self._buffers.put(buffer)

    def close(self) -> None:
        """May be called again; not while others read."""
        self._threads.shutdown()
        while not self._buffers.empty():
            self._buffers.get()


class PastCacheReader:
    """Reads a file that is whole and stays as it is; several threads may read. descriptor: of the
    file, open as usual, and closed by whoever opened it. name: for messages. bounce: for what does
    not lie as reads past the cache want it; without them that goes through the cache."""

    def __init__(self, descriptor: int, name: str, bounce: BounceBuffers | None = None):
        self._descriptor, self._name, self._bounce = descriptor, name, bounce
        self._direct = self._map = None
        self._is_told = False
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
            self._is_told = _may_be_told(descriptor)

    @property
    def has_way(self) -> bool:
        """Whether anything is read past the cache."""
        return self._direct is not None

    def read(self, view: memoryview, offset: int) -> None:
        """Fill the view from a byte of the file on. Raises EndsEarly for a file that is too short,
        StorageError for what else goes wrong."""
        for start, stop, is_cached in self._runs(view, offset):
            part, place = view[start:stop], offset + start
            try:
                if is_cached:
                    self._fill(part, place)
                elif _is_aligned(part, place):
                    self._fill_blocks(np.frombuffer(part, np.uint8), place, len(part))
                else:
                    assert self._bounce is not None  # _runs: or it is read through the cache
                    self._bounce.fill(part, place, self._fill_blocks)
            except StorageError:
                if is_cached:
                    raise
                # A file system may have no such reads of some places. What is wrong comes again.
                self._fill(part, place)

    def _fill(self, view: memoryview, offset: int) -> None:
        """Through the cache."""
        done = 0
        while done < len(view):
            count = read_at(self._descriptor, view[done:], self._name, offset + done)
            if count == 0:
                raise self._ends_early()
            done += count

    def _fill_blocks(self, blocks: np.ndarray, offset: int, least: int) -> None:
        """Past the cache; `least` bytes, where the file may end within the last block."""
        view, done = blocks.data, 0
        assert self._direct is not None
        while done < least:
            count = read_at(self._direct, view[done:], self._name, offset + done)
            whole = count if done + count >= least else count - count % BLOCK_BYTES
            if whole == 0:
                raise self._ends_early()
            done += whole  # one that ended early goes on where it may

    def _ends_early(self) -> EndsEarly:
        return EndsEarly(f"{self._name} is shorter than what was written")

    def close(self) -> None:
        """May be called again; not while others read."""
        self._map = None
        if self._direct is not None:
            os.close(self._direct)
            self._direct = None

    def _runs(self, view: memoryview, offset: int) -> Iterator[tuple[int, int, bool]]:
        """Parts of the view, from, to, and whether they lie in the cache, or are read through it.
        They begin where blocks of the file do, but for the first."""
        if self._map is None or (self._bounce is None and not _is_aligned(view, offset)):
            yield 0, len(view), True
            return
        begun, latest, within = 0, None, offset % BLOCK_BYTES
        for place in range(-within, len(view), _ASKED_BYTES):
            size = min(_ASKED_BYTES, len(view) - place)
            is_cached = self._is_cached(offset + place, size)
            if latest is not None and is_cached != latest:
                yield begun, place, latest
                begun = place
            latest = is_cached
        if latest is not None:
            yield begun, len(view), latest

    def _is_cached(self, offset: int, size: int) -> bool:
        if not self._is_told:
            return False
        there, mincore = np.empty(-(-size // BLOCK_BYTES), np.uint8), _mincore()
        assert mincore is not None and self._map is not None
        if mincore(self._map.ctypes.data + offset, size, there.ctypes.data) != 0:
            return False
        return bool((there & 1).all())


def _is_aligned(view: memoryview, offset: int) -> bool:
    address = np.frombuffer(view, np.uint8).ctypes.data if len(view) else 0
    return not (address % BLOCK_BYTES or offset % BLOCK_BYTES or len(view) % BLOCK_BYTES)


def _may_be_told(descriptor: int) -> bool:
    """Whether Linux says what its cache has of an open file: to whoever owns it or may write to it.
    To others it says since 5.2 that all is there."""
    if os.fstat(descriptor).st_uid == os.geteuid():
        return True
    return os.access(f"/proc/self/fd/{descriptor}", os.W_OK)


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

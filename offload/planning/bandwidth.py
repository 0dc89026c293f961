"""How fast this machine's disk and memory are, measured in a fraction of a second each.

For plans, which say what speed to expect. Measures as the page store reads, whole extents at
random and in order, several at a time; and as weights that stream are read, by one thread and in
large pieces. Cached for the process, since a plan may ask often. A busy machine
measures slow; a file that the system keeps in memory (the portable way) measures fast.
"""

from __future__ import annotations

import functools
import mmap
import os
import random
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from ..disk.disk import ALIGNMENT_BYTES, ScratchFile, Way
from ..disk.spill_dir import default_spill_dir, dir_error, format_bytes
from ..errors import DoesNotFit
from ..pages.tier import aligned_bytes
from .budget import auto_disk_bytes

_PIECE_EXTENTS = 32  # of 512 KiB: a layer of some millions of weights
_SAMPLE_BYTES = 64 << 20
_LEAST_SAMPLE_BYTES = 1 << 20  # two extents: less than that says nothing of an order


@dataclass(frozen=True)
class DiskSpeed:
    """Bytes per second of a spill folder: one writer, num_threads readers of whole extents.
    sequential: the better of that in order and of one reader of _PIECE_EXTENTS in one go. caveat:
    what `disk_caveat` says of the sample."""

    way: str
    extent_bytes: int
    num_threads: int
    write_bytes_per_s: float
    sequential_bytes_per_s: float
    random_bytes_per_s: float
    caveat: str = ""

    @property
    def bytes_per_s(self) -> float:
        """The most that reading reached: layers lie in order, and so do neighbouring pages."""
        return max(self.sequential_bytes_per_s, self.random_bytes_per_s)


@dataclass(frozen=True)
class MemorySpeed:
    """Bytes per second that are read from memory, by one thread and by num_threads."""

    num_threads: int
    one_thread_bytes_per_s: float
    all_threads_bytes_per_s: float

    @property
    def bytes_per_s(self) -> float:
        """The most that was reached: on a busy machine one thread can be faster than all."""
        return max(self.one_thread_bytes_per_s, self.all_threads_bytes_per_s)


def measure_disk(
    directory: Path | str | None = None,
    way: Way | str | None = None,
    extent_bytes: int = 512 << 10,
    num_threads: int = 4,
    seconds: float = 0.25,
    disk_memory: int | str = "auto",
) -> DiskSpeed:
    """Writes up to 64 MiB of scratch, and no more than disk_memory, and reads it back, in about
    `seconds`; cached.

    disk_memory: bytes, or "auto", as a budget has it. Raises DoesNotFit where that leaves too
    little to measure with, and what `ScratchFile` raises.
    """
    allowed = disk_memory
    if not isinstance(allowed, int):
        where = _folder(directory)
        try:
            allowed = auto_disk_bytes(where)
        except OSError as error:
            raise dir_error(where, error) from error
    least_bytes = max(_LEAST_SAMPLE_BYTES, 2 * extent_bytes)
    if allowed < least_bytes:
        raise DoesNotFit(
            f"The disk's speed is {disk_caveat(allowed, least_bytes)}.",
            tier="disk",
            needed_bytes=least_bytes,
            available_bytes=allowed,
        )
    most_bytes, chosen = min(_SAMPLE_BYTES, allowed), Way(way) if way is not None else None
    folder = _folder(directory)
    return _measure_disk(folder, chosen, extent_bytes, num_threads, seconds, most_bytes)


def _folder(directory: Path | str | None) -> str:
    given = default_spill_dir() if directory is None else Path(directory).expanduser()
    return os.path.realpath(given)


def disk_caveat(allowed_bytes: int, least_bytes: int = _LEAST_SAMPLE_BYTES) -> str:
    """What is to be known of a disk's speed that was measured with so many bytes at most; "" where
    they are enough."""
    if allowed_bytes >= _SAMPLE_BYTES:
        return ""
    allowed = f"--disk-memory allows {format_bytes(allowed_bytes)}"
    if allowed_bytes < least_bytes:
        return f"not measured: that writes {format_bytes(least_bytes)} or more, and {allowed}"
    return f"less certain than usual: {allowed}, and no more was written to measure it"


def measure_memory(num_threads: int | None = None, num_bytes: int = 64 << 20) -> MemorySpeed:
    """Sums an array that is larger than the caches, a few times; cached.

    num_threads: default all cores that this process may use.
    """
    if num_threads is None:
        affinity = getattr(os, "sched_getaffinity", None)
        num_threads = len(affinity(0)) if affinity else os.cpu_count() or 1
    return _measure_memory(num_threads, num_bytes)


@functools.lru_cache(maxsize=16)
def _measure_disk(
    directory: str,
    way: Way | None,
    extent_bytes: int,
    num_threads: int,
    seconds: float,
    most_bytes: int,
) -> DiskSpeed:
    assert extent_bytes % ALIGNMENT_BYTES == 0
    file = ScratchFile(directory, way, step_bytes=16 << 20, most_bytes=most_bytes)
    try:
        block = mmap.mmap(-1, extent_bytes)
        block[:] = random.Random(0).randbytes(extent_bytes)  # some disks compress
        num_extents, started = 0, time.perf_counter()
        while num_extents < 2 or (
            (num_extents + 1) * extent_bytes <= most_bytes
            and time.perf_counter() - started < seconds / 3
        ):
            file.write_from(memoryview(block), num_extents * extent_bytes)
            if file.way is not Way.DIRECT:
                file.sync()  # else this would measure the cache
            num_extents += 1
        write_s = time.perf_counter() - started
        in_order, at_random = (
            _read_rate(file, num_extents, extent_bytes, num_threads, seconds / 3, is_random)
            for is_random in (False, True)
        )
        count = min(_PIECE_EXTENTS, num_extents)
        piece = extent_bytes * count
        in_pieces = _read_rate(file, num_extents // count, piece, 1, seconds / 3, False)
    finally:
        file.close()
    written = num_extents * extent_bytes / write_s
    sequential = max(in_order, in_pieces)
    caveat = disk_caveat(most_bytes)
    way_name = file.way.value
    return DiskSpeed(way_name, extent_bytes, num_threads, written, sequential, at_random, caveat)


def _read_rate(
    file: ScratchFile,
    num_extents: int,
    extent_bytes: int,
    num_threads: int,
    seconds: float,
    is_random: bool,
) -> float:
    """Bytes per second of several threads that read extents for so long."""
    rates = [0.0] * num_threads
    errors: list[BaseException] = []

    def read(thread: int) -> None:
        view = aligned_bytes(extent_bytes).numpy().data
        chance, place = random.Random(thread), thread * num_extents // num_threads
        try:
            file.read_into(view, place * extent_bytes)  # memory that was never touched is slow
            count, took, began = 0, 0.0, time.perf_counter()
            while took < seconds:
                place = chance.randrange(num_extents) if is_random else (place + 1) % num_extents
                file.read_into(view, place * extent_bytes)
                count, took = count + 1, time.perf_counter() - began
            rates[thread] = count * extent_bytes / took
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=read, args=(i,), daemon=True) for i in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return sum(rates)


@functools.lru_cache(maxsize=4)
def _measure_memory(num_threads: int, num_bytes: int) -> MemorySpeed:
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np

    # Where weights and pages lie: small pages of the system are read at two thirds of the speed.
    array = aligned_bytes(num_bytes // 8 * 8).numpy().view(np.int64)
    array.fill(1)  # integer sums run at memory speed on one core
    rates = []
    for count in (1, num_threads):
        with ThreadPoolExecutor(count) as pool:
            parts = np.array_split(array, count)
            best_s = float("inf")
            for _ in range(4):
                started = time.perf_counter()
                list(pool.map(np.sum, parts))
                best_s = min(best_s, time.perf_counter() - started)
        rates.append(array.nbytes / best_s)
    return MemorySpeed(num_threads, *rates)

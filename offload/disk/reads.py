"""Many reads of one file at once: threads that take them in order of urgency and check what came.

    NONE --submit--> QUEUED --a thread takes it--> READING --> READY
      ^                 |                             └------> FAILED, and what is queued goes
      └------cancel-----┘

A read is known by its tag and fills its place in memory with records. States lie in one array that
the caller may look at any time. `NativeReads` does it in C++: no Python runs while pages come, and
neighbours are read in one go. `ThreadReads` is its reference, what serves where the extension is
missing, and without threads the plain twin.

Knows frames and bytes; when a tag may be used again is the caller's to know. One thread calls.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
import time
import weakref
from collections import deque
from enum import IntEnum
from typing import Protocol

import numpy as np

from ...kernels import dispatch
from .extent_file import ExtentFile

# What is read in one go: on a disk where random reads of 64 KiB move 1.2 GB/s, those of 512 KiB
# move 1.5 with a quarter of the processor time, and larger ones no more.
MOST_BYTES = 512 << 10


class State(IntEnum):
    """Of a tag; the numbers are kernels/cpu/reads.h's."""

    NONE = 0
    QUEUED = 1
    READING = 2
    READY = 3
    FAILED = 4


class Urgency(IntEnum):
    """Which reads go first."""

    DEMAND = 0
    SPAN_WISH = 1
    RECORD_WISH = 2


class Reads(Protocol):
    """All arrays are of int64, and go together."""

    states: np.ndarray  # (num_tags,) int8; the caller may make READY or FAILED ones NONE again

    def submit(
        self,
        tags: np.ndarray,
        frames: np.ndarray,
        counts: np.ndarray,
        places: np.ndarray,
        urgency: Urgency,
    ) -> None:
        """Reads `counts` records from `frames` on to memory at the addresses `places`, which must
        last. The tags are neither QUEUED nor READING. After a failure it does nothing."""
        ...

    def promote(self, tags: np.ndarray) -> None:
        """These go first now, as far as they are QUEUED."""
        ...

    def expect(self, tags: np.ndarray) -> None:
        """Somebody will wait until all of these are over."""
        ...

    def cancel(self, tags: np.ndarray) -> None:
        """Those that are QUEUED become NONE."""
        ...

    def happened(self) -> int:
        """A number that changes when the last expected read is over, when any other is while none
        is expected, when one failed, and by `kick`."""
        ...

    def wait(self, seen: int, seconds: float) -> bool:
        """Waits until `happened` is not `seen`; False when the time is over first."""
        ...

    def kick(self) -> None:
        """Ends a `wait`."""
        ...

    def bytes_read(self) -> int:
        """So far."""
        ...

    def failure(self) -> BaseException | None:
        """The first there was: StorageError, or what else a thread raised."""
        ...

    def close(self, seconds: float) -> bool:
        """Nothing begins any more; whether what was under way ended in time. If not, file and
        memory must stay."""
        ...


def make_reads(file: ExtentFile, num_tags: int, num_threads: int, memory: object) -> Reads:
    """Reads of a file. num_threads: 0 is the plain twin, whose `submit` reads before it returns.
    memory: what `places` lie in, kept for as long as a read may be under way."""
    if num_threads and dispatch.compiled_for() is not None:
        return NativeReads(file, num_tags, num_threads, memory)
    return ThreadReads(file, num_tags, num_threads)


class NativeReads:
    """By kernels/cpu/reads.h. Files that preadv alone cannot read are read by calling back."""

    def __init__(
        self,
        file: ExtentFile,
        num_tags: int,
        num_threads: int,
        memory: object,
        *,
        most_at_once: int = 0,
    ):
        self.states = np.zeros(num_tags, dtype=np.int8)
        self._file, self._errors, self._memory = file, [], [memory]
        self._counted = (0, 0, 0.0)  # reads, records, seconds
        fd = file.descriptor
        self._native = dispatch.compiled().Reads(
            -1 if fd is None else fd,
            file.drops_cache,
            file.record_bytes,
            file.crcs.ctypes.data,
            num_tags,
            self.states.ctypes.data,
            num_threads,
            MOST_BYTES,
            most_at_once,
            _reader(file, self._errors) if fd is None else None,
            (self._memory, self.states, file),
        )
        self._is_direct = fd is not None
        native = self._native
        self.submit, self.cancel = native.submit, native.cancel
        self.promote, self.expect = native.promote, native.expect
        self.happened, self.wait, self.kick = native.happened, native.wait, native.kick
        # Threads that call back must have ended before the interpreter does.
        weakref.finalize(self, native.close, 1.0)

    def close(self, seconds: float) -> bool:
        is_over = self._native.close(seconds)
        if is_over:  # else it waits for Python's collector, which sees nothing of its size
            self._memory.clear()
        return is_over

    def bytes_read(self) -> int:
        counts = self._native.counts()
        if counts != self._counted:
            if self._is_direct:
                reads, records, seconds = (
                    a - b for a, b in zip(counts, self._counted, strict=True)
                )
                self._file.count_reads(reads, records * self._file.record_bytes, seconds)
            self._counted = counts
        return counts[1] * self._file.record_bytes

    def failure(self) -> BaseException | None:
        kind, frame, num_bytes, code = self._native.failure()
        if kind == 0:
            return None
        if kind == 3:
            return self._file.damage(frame, code)
        if kind == 4:
            return self._errors[0]
        short = "the file is shorter than it should be"
        cause = OSError(code, os.strerror(code)) if kind == 1 else OSError(errno.EIO, short)
        error = self._file.read_error(num_bytes, cause)
        error.__cause__ = cause
        return error


def _reader(file: ExtentFile, errors: list[BaseException]):
    """A function that fills memory from an offset, and keeps why it could not."""

    def read_into(address: int, num_bytes: int, offset: int) -> bool:
        try:
            file.read_unchecked(offset // file.record_bytes, _view(address, num_bytes))
        except BaseException as error:
            errors.append(error)
            return False
        return True

    return read_into


def _view(address: int, num_bytes: int) -> memoryview:
    return memoryview((ctypes.c_ubyte * num_bytes).from_address(address)).cast("B")


class _Entry:
    """A read: records frame .. frame + count - 1 to `place`."""

    __slots__ = ("count", "frame", "is_expected", "place", "tag", "urgency")

    def __init__(self, tag: int, frame: int, count: int, place: int, urgency: int):
        self.tag, self.frame, self.count, self.place = tag, frame, count, place
        self.urgency, self.is_expected = urgency, False


class ThreadReads:
    """By Python threads, one read at a time each."""

    def __init__(self, file: ExtentFile, num_tags: int, num_threads: int):
        self.states = np.zeros(num_tags, dtype=np.int8)
        self._file, self._bytes_read = file, 0
        self._error: BaseException | None = None
        self._entries: dict[int, _Entry] = {}  # by tag, of what is QUEUED or READING
        self._queues: list[deque[_Entry]] = [deque() for _ in Urgency]
        self._happened, self._is_stopping = 0, False
        lock = threading.Lock()
        self._work, self._done = threading.Condition(lock), threading.Condition(lock)
        self._threads = [
            threading.Thread(target=self._run, name=f"ebbtide-io-{i}", daemon=True)
            for i in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, tags, frames, counts, places, urgency) -> None:
        with self._work:
            if self._error is not None or self._is_stopping:
                return
            for numbers in zip(tags, frames, counts, places, strict=True):
                tag, frame, count, place = map(int, numbers)
                entry = _Entry(tag, frame, count, place, int(urgency))
                self._entries[entry.tag] = entry
                self.states[entry.tag] = State.QUEUED
                self._queues[urgency].append(entry)
            self._work.notify(len(tags))
        if not self._threads:
            self._run_here()

    def promote(self, tags) -> None:
        with self._work:
            for tag in tags:
                entry = self._entries.get(int(tag))
                if entry is not None and self._is_queued(entry) and entry.urgency:
                    entry.urgency = Urgency.DEMAND
                    self._queues[Urgency.DEMAND].append(entry)

    def expect(self, tags) -> None:
        with self._work:
            for tag in tags:
                entry = self._entries.get(int(tag))
                if entry is not None:
                    entry.is_expected = True

    def cancel(self, tags) -> None:
        with self._work:
            for tag in tags:
                if self.states[tag] == State.QUEUED:
                    del self._entries[int(tag)]
                    self.states[tag] = State.NONE

    def happened(self) -> int:
        return self._happened

    def wait(self, seen: int, seconds: float) -> bool:
        with self._done:
            return self._done.wait_for(lambda: self._happened != seen, seconds)

    def kick(self) -> None:
        with self._done:
            self._happen()

    def bytes_read(self) -> int:
        return self._bytes_read

    def failure(self) -> BaseException | None:
        return self._error

    def close(self, seconds: float) -> bool:
        with self._work:
            self._is_stopping = True
            self._take_all_back()
            self._work.notify_all()
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    # ---- the threads' side, under the lock but for the read itself ---------------------------

    def _run(self) -> None:
        while True:
            with self._work:
                while (entry := self._take()) is None:
                    if self._is_stopping:
                        return
                    self._work.wait()
            self._finish(entry, self._read(entry))

    def _run_here(self) -> None:
        while (entry := self._take()) is not None:
            error = self._read(entry)
            if error is not None and not isinstance(error, Exception):
                del self._entries[entry.tag]
                self.states[entry.tag] = State.NONE
                self._take_all_back()  # nobody would read them
                raise error  # Ctrl-C is the caller's, not the disk's
            self._finish(entry, error)

    def _take(self) -> _Entry | None:
        for queue in self._queues:
            while queue:
                entry = queue.popleft()
                if self._is_queued(entry):
                    self.states[entry.tag] = State.READING
                    return entry
        return None

    def _is_queued(self, entry: _Entry) -> bool:
        is_known = self._entries.get(entry.tag) is entry
        return is_known and self.states[entry.tag] == State.QUEUED

    def _read(self, entry: _Entry) -> BaseException | None:
        try:
            num_bytes = entry.count * self._file.record_bytes
            self._file.read(entry.frame, _view(entry.place, num_bytes))
        except BaseException as error:
            return error
        return None

    def _finish(self, entry: _Entry, error: BaseException | None) -> None:
        with self._done:
            del self._entries[entry.tag]
            if error is None:
                self._bytes_read += entry.count * self._file.record_bytes
            elif self._error is None:
                self._error = error
                self._take_all_back()
            self.states[entry.tag] = State.READY if error is None else State.FAILED
            if error is not None or not any(e.is_expected for e in self._entries.values()):
                self._happen()

    def _take_all_back(self) -> None:
        for queue in self._queues:
            for entry in queue:
                if self._is_queued(entry):
                    del self._entries[entry.tag]
                    self.states[entry.tag] = State.NONE
            queue.clear()

    def _happen(self) -> None:
        self._happened += 1
        self._done.notify_all()

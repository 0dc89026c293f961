"""The I/O threads, and the state that they share with the thread that calls.

Reads that somebody waits for go first, then wishes, then writes; but writes go before wishes when
their buffers have run out, since the caller may be waiting for one. Threads only fill free slots
and frames that were given to them; they never drop one.

The first failure is latched: what is queued is abandoned, and `check` raises it from then on.
Knows slots, extents and records; what is wanted, and when a slot is dropped, is `transfer`'s, and
`hot_records`' for single records.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import NamedTuple

import torch

from ..prefetch.queue import WishQueue
from ..prefetch.stats import Stats
from .errors import StorageError
from .extent_file import ExtentFile
from .hot_records import HotRecords, RecordRead
from .page_table import Extent, Tier
from .staging import Slot, Staging
from .tier import MemoryTier

DISK = Tier.DISK.value
CLOSE_LIMIT_S = 10.0  # how long a disk may take to answer at the end


class Write(NamedTuple):
    """Records in a buffer, on their way to frames first .. of an extent."""

    extent: Extent
    first: int
    num_records: int
    buffer: int


class IoThreads:
    """Threads that take jobs from shared queues until `close`.

    Every public field is read and changed under `lock`, which is reentrant so that the plain twin
    may do a job inside a call that holds it.

    T1: a buffer is in `buffers`, or belongs to exactly one write that is queued or running.
    T2: `unwritten` counts the queued and running writes of each extent; none of its records is read
        before they are done.
    T3: num_threads = 0 is the plain twin: `perform` does the job at once, and nothing is ever under
        way between two calls.
    """

    def __init__(
        self,
        file: ExtentFile,
        records_per_span: int,
        record_bytes: int,
        stats: Stats,
        *,
        num_slots: int,
        num_buffers: int,
        num_threads: int,
        compute_device: torch.device,
        stall_limit_s: float,
    ):
        self._file, self._stats, self._stall_limit_s = file, stats, stall_limit_s
        self._records_per_span, self._record_bytes = records_per_span, record_bytes
        num_frames = (num_slots + num_buffers) * records_per_span
        self._arena = MemoryTier(num_frames, record_bytes, "cpu", compute_device)
        self.staging = Staging(num_slots, stats)
        self.wishes = WishQueue()
        self.demands: deque[Slot] = deque()
        self.hot: HotRecords | None = None  # sets itself, if there is one
        self.record_demands: deque[RecordRead] = deque()
        self.record_wishes: deque[RecordRead] = deque()
        self.writes: deque[Write] = deque()
        self.buffers = list(range(num_slots, num_slots + num_buffers))  # T1
        self.num_buffers = num_buffers
        self.unwritten: Counter[Extent] = Counter()  # T2
        self.failure: BaseException | None = None
        self._is_stopping = False
        self.lock = threading.RLock()
        self._work = threading.Condition(self.lock)  # I/O threads wait here
        self._done = threading.Condition(self.lock)  # the caller waits here
        self.threads = [
            threading.Thread(target=self._run, name=f"ebbtide-io-{i}", daemon=True)
            for i in range(num_threads)  # T3
        ]
        for thread in self.threads:
            thread.start()

    def check(self) -> None:
        """Raises the first failure, if there was one."""
        if self.failure is None:
            return
        if isinstance(self.failure, StorageError):
            raise StorageError(str(self.failure)) from self.failure
        raise RuntimeError("an I/O thread failed") from self.failure

    @property
    def buffer_bytes(self) -> int:
        """Host memory of all slots and write buffers."""
        return self._arena.num_bytes

    def rows(self, buffer: int, num_records: int) -> torch.Tensor:
        """The first records of a slot or write buffer, (num_records, record_bytes) uint8."""
        return self._arena.records(buffer * self._records_per_span, num_records)

    def perform(self, job: Slot | RecordRead | Write) -> None:
        """Hands a job to the threads; without any, does it now and raises what goes wrong."""
        if not self.threads:
            self._do(job)
            self.check()
            return
        if isinstance(job, Slot):
            self.demands.append(job)
        elif isinstance(job, RecordRead):
            self.record_demands.append(job)
        else:
            self.writes.append(job)
        self._work.notify()

    def wake(self) -> None:
        """There may be more to do than before."""
        self._work.notify(len(self.threads))

    def wait(self, is_so: Callable[[], object]) -> None:
        """Waits for the I/O threads to make it so; raises the failure, or that nothing happens."""
        deadline = time.monotonic() + self._stall_limit_s
        while True:
            self.check()
            if is_so():
                return
            if not self._done.wait(deadline - time.monotonic()):
                if time.monotonic() >= deadline:
                    self._fail(StorageError(self._no_answer(self._stall_limit_s)))

    def close(self) -> None:
        """Stops the threads and gives the file back. Writes that have not begun are abandoned."""
        with self.lock:
            self._is_stopping = True
            self._work.notify_all()
        deadline = time.monotonic() + CLOSE_LIMIT_S
        for thread in self.threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if any(thread.is_alive() for thread in self.threads):
            # They may still use the file and the memory, so both stay until the process ends.
            if self.failure is None:
                raise StorageError(self._no_answer(CLOSE_LIMIT_S))
            return
        self._file.close()
        self._arena.close()
        if self.hot is not None:
            self.hot.close()

    def _no_answer(self, seconds: float) -> str:
        return f"the disk of {self._file.directory} has not answered for {seconds:.0f} s"

    def check_integrity(self) -> None:
        """Asserts the invariants of slots, buffers and queues."""
        with self.lock:
            self.staging.check()
            assert self.threads or not (self.writes or self.demands or self.wishes), "T3"
            if self.hot is not None:
                self.hot.check()
            if self.failure is not None:
                return  # what was queued then is nobody's any more
            queued = [job.buffer for job in self.writes]
            assert len(set(self.buffers + queued)) == len(self.buffers) + len(queued), "T1"
            assert self.unwritten or len(self.buffers) == self.num_buffers, "T1"
            assert all(n > 0 and e.refs > 0 for e, n in self.unwritten.items()), "T2"

    # ---- the threads' side -------------------------------------------------------------------

    def _run(self) -> None:
        """What an I/O thread does: one job after the other until the end."""
        while True:
            with self.lock:
                while (job := self._choose()) is None:
                    if self._is_stopping:
                        return
                    self._work.wait()
            self._do(job)

    def _do(self, job: Slot | RecordRead | Write) -> None:
        if isinstance(job, Slot):
            self._read(job)
        elif isinstance(job, RecordRead):
            self._read_record(job)
        else:
            self._write(job)

    def _choose(self) -> Slot | RecordRead | Write | None:
        """The next job, in the order that the head of this file gives; None: wait."""
        if self.failure is not None or self._is_stopping:
            return None
        if self.demands:
            return self.demands.popleft()
        if self.record_demands:
            return self.record_demands.popleft()
        if self.writes and not self.buffers:
            return self.writes.popleft()
        if self.staging.num_free:
            wish = self.wishes.take(lambda extent: extent not in self.unwritten)
            if wish is not None:
                return self.staging.prepare_read(wish.key, wish.key.filled, wish)
        if self.record_wishes:
            return self.record_wishes.popleft()
        return self.writes.popleft() if self.writes else None

    def _read(self, slot: Slot) -> None:
        """Fills a slot."""
        assert slot.extent is not None
        failure = None
        try:
            view = self._arena.raw(slot.index * self._records_per_span, slot.num_records)
            self._file.read(slot.extent, view)
        except BaseException as error:
            failure = error
        with self.lock:
            if failure is None:
                self._stats.bytes_read[DISK] += slot.num_records * self._record_bytes
            self.staging.complete_read(slot, success=failure is None)
            self._finish(failure)

    def _read_record(self, job: RecordRead) -> None:
        """Fills a frame of the hot records, unless that was cancelled meanwhile."""
        assert self.hot is not None
        with self.lock:
            view = self.hot.begin(job)
        if view is None:
            return
        failure = None
        try:
            self._file.read_record(job.extent, job.index, view)
        except BaseException as error:
            failure = error
        with self.lock:
            self.hot.complete(job, success=failure is None)
            self._finish(failure)

    def _write(self, job: Write) -> None:
        """Puts a buffer's records on disk."""
        failure = None
        try:
            view = self._arena.raw(job.buffer * self._records_per_span, job.num_records)
            self._file.write(job.extent, job.first, view)
        except BaseException as error:
            failure = error
        with self.lock:
            if failure is None:
                self._stats.bytes_written[DISK] += job.num_records * self._record_bytes
            self._settle(job)
            self._finish(failure)

    def _settle(self, job: Write) -> None:
        """A write is over, well or badly: its buffer is free."""
        self.buffers.append(job.buffer)
        self.unwritten[job.extent] -= 1
        if not self.unwritten[job.extent]:
            del self.unwritten[job.extent]

    def _finish(self, failure: BaseException | None) -> None:
        """Latches a failure and wakes whoever waits for what has just been done."""
        if failure is not None:
            if not self.threads and not isinstance(failure, Exception):
                raise failure  # Ctrl-C in the plain twin is the caller's, not the disk's
            self._fail(failure)
        self._done.notify_all()
        self._work.notify()

    def _fail(self, error: BaseException) -> None:
        """Latches the first failure and abandons what is queued."""
        if self.failure is None:
            self.failure = error
        self.wishes.clear()
        self.record_demands.clear()
        self.record_wishes.clear()
        for slot in self.demands:
            self.staging.complete_read(slot, success=False)
        self.demands.clear()
        self.writes.clear()
        self._done.notify_all()

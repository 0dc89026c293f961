"""The traffic between memory and the scratch file: reads by `reads`'s threads, writes by one of
its own, and the state that goes with them.

    wish ---> queued here ---> a free slot ---\\
    demand -------------------> a slot --------> reads ---> READY
    record wish, record demand -> hot frames -/
    write ---> a buffer ---> the writing thread

All state belongs to the thread that calls: the others fill memory and set flags, and `pump`, which
every call begins with, takes over what they did and begins what there is room for. It looks at
what is rather than at what happened, so a call that was interrupted is made good by the next one.

The first failure is latched: what is queued is abandoned, and `check` raises it from then on.
Knows slots, extents and frames; what is wanted, and when a slot is dropped, is `transfer`'s, and
`hot_records`' for single records.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import NamedTuple

import numpy as np
import torch

from ...prefetch.queue import WishQueue
from ...prefetch.stats import Stats
from ..errors import StorageError
from ..pages.page_table import Extent, Tier
from ..pages.tier import MemoryTier
from .extent_file import ExtentFile
from .reads import State, Urgency, make_reads
from .staging import Slot, Staging

DISK = Tier.DISK.value
CLOSE_LIMIT_S = 10.0  # how long a disk may take to answer at the end
# Silence is counted by so much at a time, so that an hour in which the process itself stood still
# (Ctrl-Z, a frozen container) is not an hour without an answer.
_TURN_S = 1.0


class Write(NamedTuple):
    """Records in a buffer, on their way to frames first .. of an extent."""

    extent: Extent
    first: int
    num_records: int
    buffer: int


class IoThreads:
    """One scratch file's traffic, until `close`. num_threads read; num_hot: frames of memory for
    single records, whose tags come after those of the slots.

    T1: `writing` has the one write that a buffer waits or is used for; without one it is free.
    T2: none of an extent's records is read before all that is in `writing` for it is done.
    T3: num_threads = 0 is the plain twin: what is asked for is done at once, and nothing is ever
        under way between two calls.
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
        num_hot: int = 0,
    ):
        self._file, self._stats, self._stall_limit_s = file, stats, stall_limit_s
        self._records_per_span, self._record_bytes = records_per_span, record_bytes
        num_frames = (num_slots + num_buffers) * records_per_span
        self._arena = MemoryTier(num_frames, record_bytes, "cpu", compute_device)
        self.hot_arena = MemoryTier(num_hot, record_bytes, "cpu", compute_device)
        self.first_hot_tag = num_slots
        memory = (self._arena.frames, self.hot_arena.frames)
        self.reads = make_reads(file, num_slots + num_hot, num_threads, memory)
        self.staging = Staging(num_slots, stats)
        self.wishes = WishQueue()
        self._buffers = range(num_slots, num_slots + num_buffers)
        self.writing: dict[int, Write] = {}  # T1, T2; by buffer
        self.failure: BaseException | None = None
        self.has_threads = num_threads > 0  # T3
        self._wakes: SimpleQueue[bool] = SimpleQueue()  # of who writes: whether there is more
        self._written: deque[int] = deque()  # buffers whose write is done
        self._latest: dict[int, Write] = {}  # that was done, by buffer: known to who writes alone
        self._is_stopping = False
        self._writer = threading.Thread(target=self._run, name="ebbtide-io-writer", daemon=True)
        if self.has_threads:
            self._writer.start()

    def check(self) -> None:
        """Every call's beginning: `pump`, and raises the first failure, if there was one."""
        if self.failure is None:
            self.pump()
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

    @property
    def slot_bytes(self) -> int:
        return self._records_per_span * self._record_bytes

    def place(self, buffer: int) -> int:
        """The address of a slot or write buffer."""
        return self._arena.frames.data_ptr() + buffer * self.slot_bytes

    def read(self, slots: Sequence[Slot], urgency: Urgency) -> None:
        """Begins to fill slots that were prepared."""
        rows = []
        for slot in slots:
            assert slot.extent is not None
            place = self.place(slot.index)
            rows.append((slot.index, slot.extent.base, slot.num_records, place))
        tags, frames, counts, places = np.array(rows, dtype=np.int64).T.copy()
        self.reads.submit(tags, frames, counts, places, urgency)

    def prepare(self, extent: Extent, num_records: int, wish) -> Slot:
        """A free slot, READING from now on: for `read`, which must follow."""
        slot = self.staging.next_free()
        # What an earlier turn left must not be taken for this one's.
        self.reads.states[slot.index] = State.NONE
        return self.staging.prepare_read(extent, num_records, wish)

    def free_buffer(self) -> int | None:
        """A write buffer that may be filled, for `write`; None while there is none."""
        return next((b for b in self._buffers if b not in self.writing), None)

    def is_unwritten(self, extent: Extent) -> bool:
        """Whether some of the extent's records are still on their way to the disk."""
        return any(job.extent is extent for job in self.writing.values())

    def write(self, job: Write) -> None:
        """Sends a buffer to the disk; without threads, at once."""
        self.writing[job.buffer] = job
        self._write_on()

    def pump(self) -> None:
        """Takes over what the threads did, and begins what there is room for. Never waits."""
        self.staging.refresh(self.reads.states)
        while self._written:
            job = self.writing.pop(self._written[0], None)
            if job is not None:
                self._stats.bytes_written[DISK] += job.num_records * self._record_bytes
            self._written.popleft()
        self._stats.bytes_read[DISK] = self.reads.bytes_read()
        if self.failure is None and (failure := self.reads.failure()) is not None:
            self._fail(failure)
        slots = []
        while self.wishes and self.staging.num_free and self.failure is None:
            wish = self.wishes.take(lambda extent: not self.is_unwritten(extent))
            if wish is None:
                break
            slots.append(self.prepare(wish.key, wish.key.filled, wish))
        if slots:
            self.read(slots, Urgency.SPAN_WISH)

    def wait(self, is_so: Callable[[], object]) -> None:
        """Waits for the I/O threads to make it so; raises the failure, or that nothing happens."""
        left = self._stall_limit_s
        if self.writing:  # one may be there of which nobody was told: that was interrupted
            self._write_on()
        while True:
            seen = self.reads.happened()
            self.check()
            if is_so():
                return
            if left <= 0:
                self._fail(StorageError(self._no_answer(self._stall_limit_s)))
            elif not self.reads.wait(seen, min(left, _TURN_S)):
                left -= _TURN_S

    def close(self) -> None:
        """Stops the threads and gives the file back. Writes that have not begun are abandoned."""
        self._is_stopping = True
        self._wakes.put(False)
        deadline = time.monotonic() + CLOSE_LIMIT_S
        is_over = self.reads.close(CLOSE_LIMIT_S)
        if self.has_threads:
            self._writer.join(max(0.0, deadline - time.monotonic()))
            is_over = is_over and not self._writer.is_alive()
        if not is_over:
            # They may still use the file and the memory, so both stay until the process ends.
            if self.failure is None:
                raise StorageError(self._no_answer(CLOSE_LIMIT_S))
            return
        self.reads.bytes_read()  # counts the last ones
        self._file.close()
        self._arena.close()
        self.hot_arena.close()

    def _no_answer(self, seconds: float) -> str:
        return f"the disk of {self._file.directory} has not answered for {seconds:.0f} s"

    def check_integrity(self) -> None:
        """Asserts the invariants of slots, buffers and queues."""
        self.pump()
        self.staging.check()
        if self.failure is not None:
            return  # what was queued then is nobody's any more
        assert self.has_threads or not (self.writing or self.wishes), "T3"
        assert all(buffer == job.buffer for buffer, job in self.writing.items()), "T1"
        assert all(job.extent.refs > 0 for job in self.writing.values()), "T2"

    def _fail(self, error: BaseException) -> None:
        """Latches the first failure and abandons what is queued."""
        if self.failure is None:
            self.failure = error
        self.wishes.clear()

    def _write_on(self) -> None:
        """Has all that is in `writing` written; without threads, at once."""
        if self.has_threads:
            self._wakes.put(True)
        else:
            self._do_all()
            self.check()

    # ---- the writing thread's side -----------------------------------------------------------

    def _run(self) -> None:
        while self._wakes.get():
            self._do_all()

    def _do_all(self) -> None:
        for job in list(self.writing.values()):
            if self._latest.get(job.buffer) is not job and not self._is_stopping:
                self._do(job)
                self._latest[job.buffer] = job

    def _do(self, job: Write) -> None:
        """Puts a buffer's records on disk, unless something failed."""
        if self.failure is not None:
            return
        try:
            view = self._arena.raw(job.buffer * self._records_per_span, job.num_records)
            self._file.write(job.extent.base + job.first, view)
            self._written.append(job.buffer)
        except BaseException as error:
            if not self.has_threads and not isinstance(error, Exception):
                del self.writing[job.buffer]
                raise  # Ctrl-C in the plain twin is the caller's, not the disk's
            self.failure = self.failure or error
        self.reads.kick()

"""A cache of single records of the disk tier, in host memory: what was selected lately, and what
the next selections are expected to need.

    wish    ---> queued, read when the disk has time, cancelled when its turn has passed
    demand  ---> pinned frames that hold the records, read now if they are not there

A record's number is its frame in the disk tier. Which records are wanted is the caller's to know,
what a frame is worth `eviction`'s. Knows extents, not tables.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Sequence
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import torch

from ..prefetch.stats import Stats
from .errors import StorageError
from .eviction import Eviction
from .page_table import Extent, Tier
from .tier import MemoryTier

NOTHING = -1
# A wish may take this share of the frames at most: the rest is what demands have to live on.
_MOST_WISHED = 0.5


class State(IntEnum):
    """What is in a frame."""

    FREE = 0
    QUEUED = 1  # wished for, its read has not begun
    READING = 2
    READY = 3


class RecordRead(NamedTuple):
    """Record `index` of an extent, to be read into a frame; void if the ticket has changed."""

    extent: Extent
    index: int
    frame: int
    ticket: int


class HotRecords:
    """The frames and what is in them. The caller holds `io.lock` for no call: each takes it.

    H1: frame_of[number] == f if and only if record_of[f] == number; state FREE means no record.
    H2: only the calling thread takes a frame from its record: never one READING, never a pinned
        one. So a demand's frames stay as they are until `release`.
    H3: a queued read whose ticket is not its frame's was cancelled.
    """

    def __init__(
        self,
        io,
        num_frames: int,
        num_numbers: int,
        records_per_span: int,
        record_bytes: int,
        eviction: Eviction,
        stats: Stats,
        compute_device: torch.device,
    ):
        self.num_frames = num_frames
        self._io, self._stats, self._eviction = io, stats, eviction
        self._records_per_span, self._record_bytes = records_per_span, record_bytes
        self._arena = MemoryTier(num_frames, record_bytes, "cpu", compute_device)
        self._frame_of = np.full(num_numbers, NOTHING, dtype=np.int64)  # H1
        self._record_of = np.full(num_frames, NOTHING, dtype=np.int64)  # H1
        self._state = np.zeros(num_frames, dtype=np.int8)
        self._pinned = np.zeros(num_frames, dtype=bool)  # H2
        self._wished = np.zeros(num_frames, dtype=bool)  # brought by a wish, not used yet
        self._ticket = np.zeros(num_frames, dtype=np.int64)  # H3
        self._queued: dict[Hashable, list[int]] = {}  # frames that a group's wishes wait in
        io.hot = self

    @property
    def frames(self) -> torch.Tensor:
        """(num_frames, record_bytes) uint8 in host memory."""
        return self._arena.frames

    @property
    def num_bytes(self) -> int:
        return self._arena.num_bytes

    @property
    def most_demanded(self) -> int:
        """How many records one demand may ask for."""
        return max(1, self.num_frames // 2)

    # ---- the caller's side -------------------------------------------------------------------

    def wish(self, numbers: np.ndarray, extents: Sequence[Extent], group: Hashable) -> None:
        """Asks for records, most urgent first, to be read when there is time. Never blocks.

        extents: of each of numbers. A group's new wishes replace its old ones.
        """
        if not self._io.threads or not len(numbers):
            return
        with self._io.lock:
            self._io.check()
            self._cancel(group)
            frames = self._frame_of[numbers]
            self._eviction.touch(frames[frames >= 0])
            places = np.flatnonzero(frames < 0)
            places = places[: int(self.num_frames * _MOST_WISHED)]
            keep = frames[frames >= 0]
            taken = self._take(len(places), keep, spares_wished=True)
            queued = self._queued.setdefault(group, [])
            for place, frame in zip(places.tolist(), taken.tolist(), strict=False):
                extent = extents[place]
                if extent in self._io.unwritten:
                    continue
                self._assign(frame, int(numbers[place]), State.QUEUED)
                self._wished[frame] = True
                queued.append(frame)
                self._io.record_wishes.append(self._job(frame, extent))
            self._io.wake()

    def demand(self, numbers: np.ndarray, extents: Sequence[Extent], group: Hashable) -> np.ndarray:
        """The frames (int64) that hold the records, pinned until `release`; waits for them.

        At most `most_demanded` numbers, each once. Raises StorageError when one cannot be read.
        """
        assert len(numbers) <= self.most_demanded
        with self._io.lock:
            self._io.check()
            assert not self._pinned.any(), "the last demand was not released"
            frames = self._frame_of[numbers]
            self._count(frames)
            present = frames[frames >= 0]
            self._pinned[present] = True
            try:
                self._promote(present)
                self._cancel(group)
                if len(present) < len(numbers) or (self._state[present] != State.READY).any():
                    started = time.perf_counter()
                    try:
                        self._bring(numbers, frames, extents)
                    finally:
                        self._stats.stall_s += time.perf_counter() - started
            except BaseException:
                self._pinned[:] = False
                raise
            self._wished[frames] = False
            self._eviction.use(frames)
            return frames

    def ready(self, numbers: np.ndarray) -> np.ndarray:
        """Which of the records (bool) are there now."""
        with self._io.lock:
            frames = self._frame_of[numbers]
            return (frames >= 0) & (self._state[frames] == State.READY)

    def release(self) -> None:
        """The caller is done with what it demanded."""
        with self._io.lock:
            self._pinned[:] = False

    def forget(self, extent: Extent) -> None:
        """The extent's records will change: waits for what is being read, and drops all of them.
        Never raises: after a failure nothing is read again.
        """
        with self._io.lock:
            numbers = np.arange(extent.base, extent.base + self._records_per_span)
            frames = self._frame_of[numbers]
            frames = frames[frames >= 0]
            try:
                self._io.wait(lambda: not (self._state[frames] == State.READING).any())
            except (StorageError, RuntimeError):
                return
            self._empty(frames)

    def close(self) -> None:
        self._arena.close()

    def check(self) -> None:
        """Asserts H1."""
        used = np.flatnonzero(self._record_of >= 0)
        assert (self._frame_of[self._record_of[used]] == used).all(), "H1"
        assert (self._frame_of >= 0).sum() == len(used), "H1"
        assert ((self._state == State.FREE) == (self._record_of < 0)).all(), "H1"

    # ---- the I/O threads' side, under the lock -----------------------------------------------

    def begin(self, job: RecordRead) -> memoryview | None:
        """Where a job's bytes go; None when it was cancelled."""
        if self._ticket[job.frame] != job.ticket:
            return None
        self._state[job.frame] = State.READING
        return self._arena.raw(job.frame, 1)

    def complete(self, job: RecordRead, success: bool) -> None:
        self._state[job.frame] = State.READY
        if success:
            self._stats.bytes_read[Tier.DISK.value] += self._record_bytes
        else:
            self._pinned[job.frame] = False
            self._empty(np.array([job.frame]))

    # ---- inside, under the lock --------------------------------------------------------------

    def _count(self, frames: np.ndarray) -> None:
        state = np.where(frames >= 0, self._state[frames], State.FREE)
        hit = state == State.READY
        self._stats.hits += int(hit.sum())
        self._stats.late += int(((state == State.QUEUED) | (state == State.READING)).sum())
        self._stats.misses += int((frames < 0).sum())
        self._stats.foreseen += int(self._wished[frames[hit]].sum())

    def _bring(self, numbers: np.ndarray, frames: np.ndarray, extents: Sequence[Extent]) -> None:
        """Reads what is missing; fills in `frames`. Gives the lock up to wait."""
        missing = np.flatnonzero(frames < 0)
        absent = {extents[place] for place in missing.tolist()}
        self._io.wait(lambda: absent.isdisjoint(self._io.unwritten))
        taken = np.empty(0, dtype=np.int64)
        if len(missing):

            def make_room() -> bool:
                nonlocal taken
                taken = self._take(len(missing), frames[frames >= 0])
                return len(taken) == len(missing)

            self._io.wait(make_room)
        for place, frame in zip(missing.tolist(), taken.tolist(), strict=True):
            self._assign(frame, int(numbers[place]), State.QUEUED)
            self._pinned[frame] = True
            frames[place] = frame
            self._io.perform(self._job(frame, extents[place]))
        self._io.wake()
        self._io.wait(lambda: (self._state[frames] == State.READY).all())

    def _promote(self, frames: np.ndarray) -> None:
        """Queued wishes that are demanded now go first."""
        waiting = {int(frame) for frame in frames[self._state[frames] == State.QUEUED]}
        if not waiting:
            return
        wishes, self._io.record_wishes = self._io.record_wishes, type(self._io.record_wishes)()
        for job in wishes:
            is_wanted = job.frame in waiting and self._ticket[job.frame] == job.ticket
            (self._io.record_demands if is_wanted else self._io.record_wishes).append(job)
        self._io.wake()

    def _cancel(self, group: Hashable) -> None:
        """The group's wishes that are still queued, and not pinned, are not wanted any more."""
        queued = self._queued.pop(group, None)
        if queued:
            frames = np.array(queued)
            frames = frames[(self._state[frames] == State.QUEUED) & ~self._pinned[frames]]
            self._wished[frames] = False  # nothing was read, so nothing was wasted
            self._empty(frames)

    def _take(self, count: int, keep: np.ndarray, spares_wished: bool = False) -> np.ndarray:
        """Empty frames, at most `count`: free ones, then the least valuable. `keep` stay."""
        free = np.flatnonzero(self._state == State.FREE)[:count]
        if len(free) == count:
            return free
        can_go = (self._state == State.READY) & ~self._pinned
        can_go[keep] = False
        if spares_wished:  # one wish does not push out another that has not had its turn
            can_go &= ~self._wished
        candidates = np.flatnonzero(can_go)
        victims = candidates[self._eviction.order(candidates)[: count - len(free)]]
        self._empty(victims)
        return np.concatenate([free, victims])

    def _assign(self, frame: int, number: int, state: State) -> None:
        self._frame_of[number], self._record_of[frame] = frame, number
        self._state[frame] = state
        self._eviction.admit(frame)

    def _empty(self, frames: np.ndarray) -> None:
        self._stats.wasted += int(self._wished[frames].sum())
        self._frame_of[self._record_of[frames]] = NOTHING
        self._record_of[frames] = NOTHING
        self._state[frames] = State.FREE
        self._wished[frames] = False
        self._ticket[frames] += 1  # H3

    def _job(self, frame: int, extent: Extent) -> RecordRead:
        index = int(self._record_of[frame]) - extent.base
        return RecordRead(extent, index, frame, int(self._ticket[frame]))

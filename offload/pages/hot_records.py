"""A cache of single records of the disk tier, in host memory: what was selected lately, and what
the next selections are expected to need.

    wish              ---> queued, read when the disk has time, cancelled when its turn has passed
    begin .. arrivals ---> pinned frames that hold the records, read now if they are not there

A record's number is its frame in the disk tier, and a frame's tag is its number after those of the
staging slots. Which records are wanted is the caller's to know, what one is worth `eviction`'s.
Knows no tables, and extents only by where they lie.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterator

import numpy as np
import torch

from ...kernels.token_step import AtHand
from ...prefetch.stats import Stats
from ..disk.io_threads import IoThreads
from ..disk.reads import State, Urgency
from ..errors import StorageError
from .eviction import Eviction
from .page_table import Extent

NOTHING = -1
NO_FRAMES = np.empty(0, dtype=np.int64)
# As plain numbers: members of an enumeration cost a look-up each time.
NONE, QUEUED, READING, READY, FAILED = map(int, State)
# Wishes may take this share of the frames at most: the rest is what demands have to live on.
_MOST_WISHED = 0.5
# What is waited for at a time: enough that attending to it is worth a call, while more comes.
_AWAITED_BYTES = 1 << 20
# How many records of a selection may push out others' last selections at a time. Half of them are
# read while the other half is attended; with more, a selection that finds no room in the cache
# would leave nothing of it.
_STREAMED = 32
# Among how many frames the least valuable are looked for, where there are more.
_LOOKED_AT = 512
_NEWEST_WEIGHS = 0.25  # of what a group lacked lately: steps differ


class HotRecords:
    """The frames and what is in them. Their states are the reader's: NONE, QUEUED ... READY.

    H1: frame_of[number] == f if and only if record_of[f] == number; state NONE means no record.
    H2: only the calling thread takes a frame from its record: never one READING, never a pinned
        one. So what was begun stays as it is until `release`.
    """

    def __init__(
        self,
        io: IoThreads,
        num_numbers: int,
        records_per_span: int,
        record_bytes: int,
        eviction: Eviction,
        stats: Stats,
    ):
        num_frames = len(io.hot_arena.frames)
        self.num_frames = num_frames
        self._io, self._stats, self._eviction = io, stats, eviction
        self._records_per_span, self._record_bytes = records_per_span, record_bytes
        self._place = io.hot_arena.frames.data_ptr()
        self._first_tag = io.first_hot_tag
        self._num_streamed = max(1, min(_STREAMED, num_frames // 2))
        self._num_awaited = max(1, min(_AWAITED_BYTES // record_bytes, self._num_streamed // 2))
        self._state = io.reads.states[self._first_tag :]
        self._frame_of = np.full(num_numbers, NOTHING, dtype=np.int64)  # H1
        self._record_of = np.full(num_frames, NOTHING, dtype=np.int64)  # H1
        self._pinned = np.zeros(num_frames, dtype=bool)  # H2
        self._wished = np.zeros(num_frames, dtype=bool)  # brought by a wish, not used yet
        self._spared = np.zeros(num_frames, dtype=bool)  # wished for a turn that is still to come
        self._brought = np.zeros(num_frames, dtype=bool)  # pinned, and was not there before
        # Of each group's wishes that had to be read the frames they wait in, and the numbers.
        self._queued: dict[Hashable, tuple[np.ndarray, np.ndarray]] = {}
        self._standing: dict[Hashable, np.ndarray] = {}  # numbers of each group's last selection
        self._is_standing = np.zeros(num_numbers, dtype=bool)
        self._lacked: dict[Hashable, float] = {}
        self._hand = 0  # the frame from which on the next ones to be taken are looked for
        self._is_changing = False  # set while H1 may not hold: an interrupted call leaves it so

    @property
    def frames(self) -> torch.Tensor:
        """(num_frames, record_bytes) uint8 in host memory."""
        return self._io.hot_arena.frames

    @property
    def num_bytes(self) -> int:
        return self._io.hot_arena.num_bytes

    def addresses(self, frames: np.ndarray) -> np.ndarray:
        """Where frames start in memory, int64."""
        return self._place + frames * self._record_bytes

    def at_hand(self) -> AtHand:
        """Where records may be read now, for one compiled call, if nobody calls meanwhile."""
        states = self._state.ctypes.data
        return AtHand(self._frame_of.ctypes.data, states, self._place, self._record_bytes)

    def wish(self, numbers: np.ndarray, group: Hashable) -> None:
        """Asks for records, most urgent first, to be read when there is time. Never blocks.

        A group's new wishes replace its old ones.
        """
        if not self._io.has_threads or not len(numbers):
            return
        self._begin_call()
        self._cancel(group)
        frames = self._frame_of[numbers]
        self._eviction.touch(numbers[frames >= 0])
        missing = numbers[frames < 0]
        if self._io.writing:
            missing = missing[~self._unwritten(missing)]
        room = int(self.num_frames * _MOST_WISHED) - int(self._spared.sum())
        others, standing = self._takable(len(missing), frames[frames >= 0], by_wish=True)
        num_easy = np.count_nonzero(self._state == NONE) + len(others)
        missing = missing[: max(0, min(room, num_easy + self._num_streamed))]
        taken = self._take(len(missing), others, standing)
        missing = missing[: len(taken)]
        self._wished[taken] = self._spared[taken] = True
        self._queued[group] = taken, missing
        self._read(missing, taken, Urgency.RECORD_WISH)

    def open_selection(self, numbers: np.ndarray, group: Hashable | None) -> np.ndarray:
        """Which of a selection's records (bool) are there or on their way: the ones to begin first,
        since others may push them out. What an earlier selection pinned is let go, and what was
        wished for this one and is not part of it.

        group: whose last selection this is, until its next: most of it will be selected again, so
        it is given up after all that no group selected last. None: nobody's.
        """
        self._begin_call()
        self._pinned[:] = self._brought[:] = False
        frames = self._frame_of[numbers]
        is_there = frames >= 0
        if group is None:
            return is_there
        there = frames[is_there]
        self._cancel(group, but=there)
        num_lacked = len(frames) - len(there) + int(self._wished[there].sum())
        before = self._lacked.get(group, num_lacked)
        self.leave(group)
        self._lacked[group] = before + _NEWEST_WEIGHS * (num_lacked - before)
        self._standing[group] = numbers
        self._is_standing[numbers] = True
        return is_there

    def leave(self, group: Hashable) -> None:
        """What the group selected counts no more."""
        self._lacked.pop(group, None)
        left = self._standing.pop(group, None)
        if left is not None:
            self._is_standing[left] = False

    def lacked(self, group: Hashable) -> float:
        """How many records of a selection had to be read lately, ahead or not; a mean."""
        return self._lacked.get(group, 0.0)

    def begin(self, numbers: np.ndarray, *, waits: bool) -> np.ndarray:
        """Frames (int64) for the first of the records, for as many as there is room, pinned until
        `release`; and begins to read what they lack. `arrivals` says when they may be read.

        numbers: each once. waits: for room for one of them at least. Raises StorageError.
        """
        self._begin_call()
        count, others, standing = self._room(numbers)
        if not count and waits:
            self._wait(lambda: self._room(numbers)[0])
            count, others, standing = self._room(numbers)
        numbers = numbers[:count]
        frames = self._frame_of[numbers]
        is_there = frames >= 0
        there, missing = frames[is_there], numbers[~is_there]
        late = there[self._state[there] != READY]
        if len(late):  # before what is begun now
            self._io.reads.promote(self._first_tag + late)
        self._pinned[there] = True
        self._count(there, len(missing))
        if len(missing):
            taken = self._take(len(missing), others, standing)
            frames[~is_there] = taken
            self._read(missing, taken, Urgency.DEMAND)
            self._pinned[taken] = self._brought[taken] = True
        self._wished[frames] = self._spared[frames] = False
        self._eviction.use(numbers)
        return frames

    def use(self, numbers: np.ndarray, group: Hashable) -> None:
        """A selection of the group was attended, all of which was at hand."""
        self.open_selection(numbers, group)
        frames = self._frame_of[numbers]
        self._count(frames, 0)
        self._wished[frames] = self._spared[frames] = False
        self._eviction.use(numbers)

    def arrivals(self, frames: np.ndarray) -> Iterator[np.ndarray]:
        """Indices of frames that were begun, ascending, a part at a time: what is there, then what
        has come meanwhile. Waits for more until it is worth a call. Raises StorageError when it
        cannot be read."""
        left = np.arange(len(frames))
        while len(left):
            is_there = self._state[frames[left]] == READY
            if not is_there.any():
                some = frames[left[: self._num_awaited]]
                self._io.reads.expect(self._first_tag + some)
                self._wait(lambda some=some: (self._state[some] == READY).all())
                is_there = self._state[frames[left]] == READY
            self._io.check()  # also makes sure that this thread sees what others wrote
            yield left[is_there]
            left = left[~is_there]

    def release(self, frames: np.ndarray) -> None:
        """The caller is done with what it began."""
        self._pinned[frames] = self._brought[frames] = False

    def ready(self, numbers: np.ndarray) -> np.ndarray:
        """Which of the records (bool) are there now."""
        self._io.pump()
        frames = self._frame_of[numbers]
        return (frames >= 0) & (self._state[frames] == READY)

    def clear(self) -> None:
        """Nothing is there any more, and nothing was selected: for measurements that compare."""
        self._begin_call()
        for group in list(self._queued):
            self._cancel(group)
        for group in list(self._standing):
            self.leave(group)
        self._wait(lambda: not self._under_way(np.arange(self.num_frames)).any())
        self._pinned[:] = self._brought[:] = False
        self._empty(np.flatnonzero(self._record_of >= 0))

    def forget(self, extent: Extent) -> None:
        """The extent's records will change: waits for what is being read, and drops all of them.
        Never raises: after a failure nothing is read again.
        """
        numbers = slice(extent.base, extent.base + self._records_per_span)
        if self._is_changing:
            self._restore()
        self._eviction.forget(numbers)
        self._is_standing[numbers] = False
        frames = self._frame_of[numbers]
        frames = frames[frames >= 0]
        if not len(frames):
            return
        try:
            self._is_changing = True
            self._io.reads.cancel(self._first_tag + frames)
            self._io.wait(lambda: not self._under_way(frames).any())
        except (StorageError, RuntimeError):
            return
        self._empty(frames)

    def check(self) -> None:
        """Asserts H1."""
        if self._is_changing:
            self._restore()
        used = np.flatnonzero(self._record_of >= 0)
        assert (self._frame_of[self._record_of[used]] == used).all(), "H1"
        assert (self._frame_of >= 0).sum() == len(used), "H1"
        if self._io.failure is None:
            assert ((self._state == NONE) == (self._record_of < 0)).all(), "H1"

    # ---- inside ------------------------------------------------------------------------------

    def _begin_call(self) -> None:
        self._io.check()
        if self._is_changing:
            self._restore()

    def _restore(self) -> None:
        """Makes H1 hold again: without a read there is no record, without a record no state."""
        self._record_of[(self._state == NONE) | (self._state == FAILED)] = NOTHING
        self._state[(self._record_of < 0) & (self._state == READY)] = NONE
        self._frame_of[:] = NOTHING
        used = np.flatnonzero(self._record_of >= 0)
        self._frame_of[self._record_of[used]] = used
        self._is_changing = False

    def _unwritten(self, numbers: np.ndarray) -> np.ndarray:
        """Which of the records (bool) may still be on their way to the disk."""
        bases = [job.extent.base for job in self._io.writing.values()]
        return np.isin(numbers // self._records_per_span * self._records_per_span, bases)

    def _under_way(self, frames: np.ndarray) -> np.ndarray:
        state = self._state[frames]
        return (state == QUEUED) | (state == READING)

    def _wait(self, is_so) -> None:
        started = time.perf_counter()
        try:
            self._io.wait(is_so)
        finally:
            self._stats.stall_s += time.perf_counter() - started

    def _count(self, there: np.ndarray, num_missing: int) -> None:
        is_hit = self._state[there] == READY
        num_hits = int(is_hit.sum())
        self._stats.hits += num_hits
        self._stats.late += len(there) - num_hits
        self._stats.misses += num_missing
        self._stats.foreseen += int((self._wished[there] & is_hit).sum())

    def _read(self, numbers: np.ndarray, frames: np.ndarray, urgency: Urgency) -> None:
        """Begins to read records into frames that were taken for them."""
        if not len(frames):
            return
        self._is_changing = True
        self._frame_of[numbers] = frames
        self._record_of[frames] = numbers
        self._eviction.touch(numbers)
        ones = np.ones(len(frames), dtype=np.int64)
        tags, places = self._first_tag + frames, self.addresses(frames)
        self._io.reads.submit(tags, numbers, ones, places, urgency)
        self._is_changing = False

    def _cancel(self, group: Hashable, but: np.ndarray = NO_FRAMES) -> None:
        """The group's wishes have had their turn, or are replaced: those that are still queued, and
        are neither pinned nor in the frames `but`, are not wanted any more."""
        frames, numbers = self._queued.pop(group, (NO_FRAMES, NO_FRAMES))
        frames = frames[self._record_of[frames] == numbers]  # the others were taken meanwhile
        if not len(frames):
            return
        self._spared[frames] = False
        frames = frames[(self._state[frames] == QUEUED) & ~self._pinned[frames]]
        frames = np.setdiff1d(frames, but)
        if len(frames):
            self._is_changing = True
            self._io.reads.cancel(self._first_tag + frames)
            frames = frames[self._state[frames] == NONE]
            self._wished[frames] = False  # nothing was read, so nothing was wasted
            self._empty(frames)

    def _takable(
        self, wanted: int, keep: np.ndarray, *, by_wish: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Frames whose records may go for others, but for those in `keep`: what no group selected
        last, and what some group did.

        Of very many frames only some are looked at, others each time, as long as `wanted` of the
        former are among them. by_wish: a wish does not push out another that has not had its turn.
        """
        can_go = (self._state == READY) & ~self._pinned
        can_go[keep] = False
        if by_wish:
            can_go &= ~self._spared
        for size in (max(_LOOKED_AT, 4 * wanted), self.num_frames):
            stop = self._hand + size
            frames = self._hand + np.flatnonzero(can_go[self._hand : stop])
            if stop > self.num_frames:
                around = can_go[: min(stop - self.num_frames, self._hand)]
                frames = np.concatenate([frames, np.flatnonzero(around)])
            is_standing = self._is_standing[self._record_of[frames]]
            if np.count_nonzero(~is_standing) >= wanted or size >= self.num_frames:
                break
        return frames[~is_standing], frames[is_standing]

    def _room(self, numbers: np.ndarray) -> tuple[int, np.ndarray, np.ndarray]:
        """How many of the records, from the first on, may be begun now: as many as lack a frame
        that is free or holds nobody's last selection, or a few at a time. And what is `_takable`
        for them."""
        frames = self._frame_of[numbers]
        lacks = frames < 0
        if not lacks.any():
            return len(numbers), NO_FRAMES, NO_FRAMES
        others, standing = self._takable(int(np.count_nonzero(lacks)), keep=frames[~lacks])
        if self._io.writing:
            blocked = np.flatnonzero(lacks & self._unwritten(numbers))
            lacks = lacks[: blocked[0]] if len(blocked) else lacks
        num_easy = np.count_nonzero(self._state == NONE) + len(others)
        few = self._num_streamed - np.count_nonzero(self._brought)
        room = min(num_easy + len(standing), max(num_easy, few))
        return int(np.searchsorted(np.cumsum(lacks), room, side="right")), others, standing

    def _take(self, count: int, others: np.ndarray, standing: np.ndarray) -> np.ndarray:
        """Empty frames, at most `count`: free ones, then of `_takable` ones the least valuable."""
        free = np.flatnonzero(self._state == NONE)[:count]
        if len(free) == count:
            return free
        taken = [free]
        for of_kind in (others, standing):
            count -= len(taken[-1])
            if 0 < count < len(of_kind):
                worth = self._eviction.worth(self._record_of[of_kind])
                of_kind = of_kind[np.argpartition(worth, count)]
            taken.append(of_kind[:count])
        self._empty(np.concatenate(taken[1:]))
        self._hand = (self._hand + _LOOKED_AT) % self.num_frames
        return np.concatenate(taken)

    def _empty(self, frames: np.ndarray) -> None:
        self._is_changing = True
        self._stats.wasted += int(self._wished[frames].sum())
        self._frame_of[self._record_of[frames]] = NOTHING
        self._record_of[frames] = NOTHING
        self._state[frames] = NONE
        self._wished[frames] = self._spared[frames] = False
        self._is_changing = False

"""Reads tensors of a checkpoint as they are kept: some rows at a time, by several threads, where
rows become what is kept without the others.

    begin    a tensor's memory, and pieces of it that threads read and convert
    finish   all pieces are there; raises the first error that one met

A piece is read into a part of the staging memory that it has for itself, and is converted while a
core's cache holds it. Knows no layers and no order of reading.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from queue import SimpleQueue

import torch

from ...kernels import dispatch
from ...kernels.threads import alone_in_this_thread, num_threads
from ..errors import BadCheckpoint
from ..models.checkpoint import Checkpoint, TensorRef, rows_of_ref
from ..pages.tier import aligned_bytes
from .kept_tensors import Arena, kept_form
from .packing import Bits, Empty, Form, Kept, places_of

# Of the file where a tensor is kept as it lies, else of staging; those of one mebibyte take a third
# longer.
_PIECE_BYTES = 4 << 20
_MOST_LANE_BYTES = 4 << 20  # of each thread's staging
_MOST_THREADS = 8
_ALIGNMENT = 64


class TensorLoader:
    """Of one checkpoint, where weights have `bits`: for one thread at a time. A context manager.

    staging: bytes for what is being converted, from the beginning: see most_staging. The threads
    share them out: several take no more than one. (Memory taken and freed between tensors that stay
    does not go back to the system: at 4 bits loading took three times the weights.) threads: that
    read and convert; None: as many as torch has, up to 8, if compiled kernels serve.
    """

    def __init__(
        self, checkpoint: Checkpoint, bits: Bits, staging: int, threads: int | None = None
    ):
        self._checkpoint, self._threads = checkpoint, threads
        self._bits: Bits = bits
        self._staging = aligned_bytes(staging)
        count = min(num_threads() if threads is None else threads, _MOST_THREADS)
        count = count if dispatch.backend() == "compiled" else 1
        self._lane_bytes = min(staging // count // _ALIGNMENT * _ALIGNMENT, _MOST_LANE_BYTES)
        self._lanes: SimpleQueue[torch.Tensor] = SimpleQueue()
        for lane in range(count):
            start = lane * self._lane_bytes
            self._lanes.put(self._staging[start : start + self._lane_bytes])
        self._begun: deque[Future] = deque()
        # As many as keep every thread busy: the first error is soon known.
        self._most_begun = 2 * count
        self._pool = None
        if count > 1:
            self._pool = ThreadPoolExecutor(
                count, "ebbtide-loading", initializer=alone_in_this_thread
            )

    def begin(self, name: str, arena: Arena) -> Kept:
        """A tensor, in the arena (see stored_bytes), which is whole after `finish`. Raises
        BadCheckpoint, StorageError, for it or for one before."""
        ref = self._checkpoint.refs[name]
        if len(ref.shape) != 2:
            return arena.keep(self._checkpoint.read(name).float())
        return self.begin_ref(name, ref, kept_form(name, ref.packing, self._bits), arena.empty)

    def begin_ref(self, name: str, ref: TensorRef, form: Form, empty: Empty = torch.empty) -> Kept:
        """What lies at a place, a matrix of that name or a part of it, in memory that `empty`
        gives."""
        num_rows = self._rows_at_once(ref, form)
        if num_rows is None:
            self.finish()  # all of the staging is needed
            return self._load(name, ref, form, empty, self._staging, self._threads)
        kept = form.room(ref.shape, empty)
        assert self._pool is not None  # as _rows_at_once says
        for start in range(0, ref.shape[0], num_rows):
            rows = slice(start, min(start + num_rows, ref.shape[0]))
            while len(self._begun) >= self._most_begun:
                self._begun.popleft().result()
            self._begun.append(self._pool.submit(self._load_rows, name, ref, form, kept, rows))
        return kept

    def finish(self) -> None:
        """Wait until all that was begun is there. Raises as `begin` does."""
        while self._begun:
            self._begun.popleft().result()

    def close(self) -> None:
        """Begin no more pieces, and wait for those under way."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> TensorLoader:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    # Alone, what is read again and again is read in one go: see Rereading.
    def _rows_at_once(self, ref: TensorRef, form: Form) -> int | None:
        """Of a piece; None: the tensor is loaded at once, as one thread does it."""
        if self._pool is None:
            return None
        packing, columns = ref.packing, ref.shape[1]
        apart = None if ref.beside else packing.rows_apart(ref.shape, form)
        if not apart or not columns:
            return None
        least, most = packing.of_rows(ref.shape, apart), _PIECE_BYTES
        size = sum(least.sizes((apart, columns)))
        if not _is_kept_as_it_lies(ref, form):
            size, most = least.staging_bytes((apart, columns), form.bits), self._lane_bytes
        if size > most:
            return None
        return max(1, min(most, _PIECE_BYTES) // size) * apart

    def _load_rows(self, name: str, ref: TensorRef, form: Form, kept: Kept, rows: slice) -> None:
        piece = rows_of_ref(ref, rows.start, rows.stop)
        packing = ref.packing.of_rows(ref.shape, rows.stop - rows.start)
        lane = self._lanes.get()
        try:
            place = places_of(kept, rows)
            self._load(name, replace(piece, packing=packing), form, place, lane, 1)
        finally:
            self._lanes.put(lane)

    def _load(
        self, name: str, ref: TensorRef, form: Form, empty: Empty, staging: torch.Tensor, threads
    ) -> Kept:
        if _is_kept_as_it_lies(ref, form):
            numbers = empty(ref.shape, dtype=form.dtype)
            self._checkpoint.read_into(ref, numbers.view(-1).view(torch.uint8))
            return numbers
        raw, room = self._checkpoint.read_raw(ref, staging)
        try:
            return ref.packing.load(raw, room, ref.shape, form, empty, threads)
        except FloatingPointError as error:
            raise BadCheckpoint(f"{ref.path}: {name}: {error}. {ref.packing.advice}.") from error


def _is_kept_as_it_lies(ref: TensorRef, form: Form) -> bool:
    return ref.packing.lies_as_kept and form.bits is None

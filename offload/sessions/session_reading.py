"""How a session's tokens come to be processed: read by the engine, or found on disk where another
text began alike; and how many of them were processed before.
"""

from __future__ import annotations

import time

import torch

from ..errors import InputError
from ..output import Progress
from ..prefixes.keeper import PrefixKeeper
from ..running.runtime import Runtime
from ..running.sequence import Sequence


class SessionReading:
    """Of one session. llm: whose model runs, and who is told how far it is. prefixes: None where no
    pages are kept on disk.

    known: tokens before it were processed once, though they may not be now.
    """

    def __init__(self, llm, runtime: Runtime, sequence: Sequence, prefixes: PrefixKeeper | None):
        self._llm, self._engine, self._sequence = llm, runtime.engine, sequence
        self._prefixes = prefixes
        self.known = 0
        self._recomputed = 0  # tokens that were processed again, since the last answer
        self._restored = 0  # tokens that came from the prefix store, since the last answer

    def prefill(self, stop: int, *, decoded: bool) -> torch.Tensor | None:
        """Process the pending tokens before `stop`; the last one's residual (1, residual_size).
        decoded: see PrefixKeeper.keep."""
        sequence = self._sequence
        start = sequence.length
        began = time.perf_counter()

        def report(length: int) -> None:
            if self._prefixes is not None:
                self._prefixes.keep(sequence, decoded=decoded)
            self._report("prefill", length - start, stop - start, began)

        try:
            with self._llm.sessions.running():
                return self._engine.prefill(sequence, None, report, stop, self._llm.check_wanted)
        finally:
            self._recomputed += max(0, min(self.known, sequence.length) - start)

    def find_kept(self, most: int) -> None:
        """Take in what is kept on disk of the first `most` tokens, if that is much."""
        if self._prefixes is None:
            return
        sequence, before = self._sequence, self._sequence.length
        wanted = sequence.as_computed()[:most]
        began = time.perf_counter()
        try:
            with self._llm.sessions.running():
                self._prefixes.restore(
                    sequence,
                    wanted,
                    lambda length: self._report("restore", length, most, began),
                )
        finally:
            self._restored += max(0, sequence.length - before)
            if sequence.length < before:  # it failed half-way, and nothing is left
                self.known = max(self.known, before)

    def rewind(self, length: int) -> None:
        """Keep at most `length` processed tokens; those before `length` that go too will be
        processed again.
        """
        sequence, sequences = self._sequence, self._engine.sequences
        self.forget_snapshots(length)
        # Should this be interrupted, what they were taken of is processed again, otherwise perhaps.
        snapshots, sequence.snapshots = sequence.snapshots, []
        if snapshots and snapshots[-1].length > sequence.resume_point(length):
            sequences.rewind_to(sequence, snapshots[-1])
        else:
            sequences.rewind(sequence, length)
        sequence.snapshots, self.known = snapshots, max(self.known, length)

    def forget_snapshots(self, length: int) -> None:
        """What was taken behind more than the first `length` tokens is of another text."""
        sequence = self._sequence
        sequence.snapshots = [s for s in sequence.snapshots if s.length <= length]

    def take_recomputed(self) -> int:
        """See Session.take_recomputed."""
        count = self._recomputed + max(0, self.known - self._sequence.length)
        self._recomputed = self.known = 0
        return count

    def take_restored(self) -> int:
        """See Session.take_restored."""
        count, self._restored = self._restored, 0
        return count

    def _report(self, phase: str, done: int, total: int, began: float) -> None:
        elapsed = time.perf_counter() - began
        speed = done / elapsed if elapsed else 0.0
        eta = (total - done) / speed if speed else None
        self._llm.report(Progress(phase, done, total, elapsed, speed, eta))
        if not self._sequence.table.is_open:
            raise InputError("the session was closed while it was read")

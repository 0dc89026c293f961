"""The sessions of one LLM that are open, and which thread runs the model.

One thread at a time does: the one that makes asynchronous answers waits for its turn, others are
refused. A stream that is dropped while it runs, in whichever thread, is closed afterwards.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..errors import EbbtideError, InputError

if TYPE_CHECKING:
    from ..running.engine import Engine
    from .session import Session
    from .stream import Stream

_PATIENCE_S = 1.0


class OpenSessions:
    """Iterates the sessions that are not yet closed, to the end."""

    def __init__(self) -> None:
        self._sessions: list[Session] = []
        self._abandoned: list[Stream] = []  # dropped while something was running
        self._lock = threading.Lock()
        self._runner: int | None = None  # the thread that has the lock
        self._patient: int | None = None  # the thread that waits for it

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[Session]:
        return iter(list(self._sessions))

    def __contains__(self, session: object) -> bool:
        return session in self._sessions

    def add(self, session: Session) -> None:
        self._sessions.append(session)

    def remove(self, session: Session) -> None:
        """Nothing where it is gone already."""
        if session in self._sessions:
            self._sessions.remove(session)

    def num_of(self, engine: Engine) -> int:
        """How many share an engine: a session and its forks."""
        return sum(1 for session in self._sessions if session._engine is engine)

    def close(self) -> EbbtideError | None:
        """Close all. Returns the first error of a name that could not be saved, once the rest is
        closed."""
        failure: EbbtideError | None = None
        for session in self:
            try:
                session.close()
            except EbbtideError as error:
                failure = failure or error
        return failure

    def wait_in_this_thread(self) -> None:
        """From now on `running` waits here until no other thread runs."""
        self._patient = threading.get_ident()

    @contextmanager
    def running(self) -> Iterator[None]:
        """While the model computes or pages change: keeps a second thread out, and what is called
        meanwhile."""
        if self._runner == threading.get_ident():
            raise InputError(
                "this LLM is running; what it calls, on_progress or check, cannot use it"
            )
        lock = self._take(waits=self._patient == threading.get_ident())
        if lock is None:
            raise InputError(
                "this LLM is running in another thread; one LLM serves one thread at a time"
            )
        with self._released(lock):
            yield

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """While no other thread runs, which is waited for: pages must not go under its hands."""
        if self._runner == threading.get_ident():  # closed by what runs here
            yield
            return
        lock = self._take(waits=True)
        assert lock is not None
        with self._released(lock):
            yield

    def _take(self, waits: bool) -> threading.Lock | None:
        """The lock, which this thread has from here on; None where another has it and it is not
        waited for. One that nobody has was left by Ctrl-C, and never comes: there is another then.
        """
        while True:
            lock = self._lock
            is_soon = waits or self._runner is None
            if lock.acquire(timeout=_PATIENCE_S if is_soon else 0):
                return lock
            if self._runner is None and lock is self._lock:
                self._lock = threading.Lock()
            elif not waits:
                return None

    @contextmanager
    def _released(self, lock: threading.Lock) -> Iterator[None]:
        """The lock, which this thread has, at the end."""
        try:
            self._runner = threading.get_ident()
            yield
        finally:
            self._runner = None
            lock.release()

    @contextmanager
    def nothing_left(self) -> Iterator[None]:
        """As `running`; what was dropped is closed, and so is what Ctrl-C came in between."""
        self.sweep()
        with self.running():
            for left in [session for session in self._sessions if not session.is_open]:
                left.close()
            yield

    def abandon(self, stream: Stream) -> None:
        """An unfinished stream was dropped: close it, now or when nothing is running."""
        self._abandoned.append(stream)
        self.sweep()

    def sweep(self) -> None:
        """Close abandoned streams, unless something is running: they may be dropped in the middle
        of it, in any thread."""
        if self._abandoned and (lock := self._lock).acquire(blocking=False):
            with self._released(lock):
                while self._abandoned:
                    self._abandoned.pop().close()

"""The sessions of one LLM that are open, and which thread runs the model.

One thread at a time does. A stream that is dropped while it runs, in whichever thread, is closed
afterwards.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .errors import EbbtideError, InputError

if TYPE_CHECKING:
    from .engine import Engine
    from .session import Session
    from .stream import Stream


class OpenSessions:
    """Iterates the sessions that are not yet closed, to the end."""

    def __init__(self) -> None:
        self._sessions: list[Session] = []
        self._abandoned: list[Stream] = []  # dropped while something was running
        self._lock = threading.Lock()

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

    @contextmanager
    def running(self) -> Iterator[None]:
        """While the model computes: keeps a second thread out."""
        if not self._lock.acquire(blocking=False):
            raise InputError(
                "this LLM is running in another thread; one LLM serves one thread at a time"
            )
        try:
            yield
        finally:
            self._lock.release()

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
        if self._abandoned and self._lock.acquire(blocking=False):
            try:
                while self._abandoned:
                    self._abandoned.pop().close()
            finally:
                self._lock.release()

"""Reads a document while the user still types: the session's prefill in a thread of its own.

One LLM serves one thread at a time, so whoever wants it calls `stop` first; what was read by then
stays read, and the rest is read with the answer. Knows a session and messages.
"""

from __future__ import annotations

import threading
from typing import Any


class _Stopped(BaseException):
    """Raised inside the thread, between two sweeps, where the session is whole."""


class BackgroundReading:
    """Begins at once. progress: the latest report, None before the first. error: what ended it.
    think: as the answer will have it.
    """

    def __init__(
        self,
        llm: Any,
        session: Any,
        messages: list[dict[str, str]],
        title: str,
        think: bool | str | None = None,
    ):
        self.title = title
        self.progress: Any = None
        self.error: Exception | None = None
        self._llm, self._session = llm, session
        self._messages, self._think = messages, think
        self._is_stopping = False
        self._thread = threading.Thread(target=self._read, name="ebbtide-reading", daemon=True)
        self._thread.start()

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    def stop(self) -> None:
        """Returns when the session is free: after the sweep that is running now."""
        self._is_stopping = True
        self._thread.join()

    def _read(self) -> None:
        self._llm.on_progress = self._note
        try:
            self._session.prepare(self._messages, think=self._think)
        except _Stopped:
            pass
        except Exception as error:
            self.error = error
        finally:
            self._llm.on_progress = None

    def _note(self, progress: Any) -> None:
        self.progress = progress
        if self._is_stopping:
            raise _Stopped

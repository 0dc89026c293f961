"""What Ctrl-C, SIGTERM and a closed terminal do, stage by stage.

    STARTING   nothing is open yet: the process ends at once, silently (torch takes a second)
       | working()
    WORKING    KeyboardInterrupt or Terminated is raised in the main thread, so that cleanup runs
       | the signal
    LEAVING    cleanup is running; a second signal ends the process at once (one that follows
               within half a second does not; other than Ctrl-C, it is obeyed where a chat goes on)

With polite(), used while a chat answers, the first Ctrl-C only sets `stop_wanted`: the session
stays whole. Knows nothing of models or commands.
"""

from __future__ import annotations

import enum
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SIGINT_EXIT = 130
# One keypress or one `timeout` can deliver a signal twice; that is not a second wish.
_ECHO_S = 0.5


class Stage(enum.Enum):
    STARTING = "starting"
    WORKING = "working"
    LEAVING = "leaving"


class Terminated(BaseException):
    """The process was asked to end by a signal other than Ctrl-C."""

    def __init__(self, signum: int):
        super().__init__(f"signal {signum}")
        self.exit_code = 128 + signum


class Signals:
    """The process's signal handlers, and the stage that decides what they do."""

    def __init__(self) -> None:
        self.stage = Stage.STARTING
        self.stop_wanted = False
        # Called with the exit code just before the process ends in STARTING.
        self.before_sudden_end: Callable[[int], None] | None = None
        # An event loop swallows what a handler raises in it. Called with the exception; where it
        # returns True it sees to it that the exception comes out of the loop.
        self.deliver: Callable[[BaseException], bool] | None = None
        self._polite = False
        self._last_s = 0.0
        # What came so soon after a Ctrl-C that it did not end cleanup. It is still to be obeyed
        # where the Ctrl-C only stopped an answer.
        self._postponed: Terminated | None = None

    def install(self) -> None:
        signal.signal(signal.SIGINT, self._on_interrupt)
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            # A parent that ignores SIGHUP (nohup) means it.
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._on_terminate)

    def working(self) -> None:
        """From here on a signal unwinds the stack. Also called after a Ctrl-C that was handled.
        Raises Terminated where SIGTERM followed that at once."""
        wish, self._postponed = self._postponed, None
        if wish is not None:
            raise wish
        self.stage = Stage.WORKING
        self.stop_wanted = False

    @property
    def is_leaving(self) -> bool:
        return self.stage is Stage.LEAVING

    def leaving(self) -> None:
        """Cleanup has begun, whatever began it."""
        self.stage = Stage.LEAVING

    @contextmanager
    def polite(self) -> Iterator[None]:
        """The first Ctrl-C inside only sets stop_wanted; the second one raises."""
        self._polite, self.stop_wanted = True, False
        try:
            yield
        finally:
            self._polite = False

    def check(self) -> None:
        """Raise the Ctrl-C that was noted. To be called where the work can be left."""
        if self.stop_wanted:
            raise KeyboardInterrupt

    def _is_echo(self) -> bool:
        now_s = time.monotonic()
        is_echo, self._last_s = now_s - self._last_s < _ECHO_S, now_s
        return is_echo

    def _on_interrupt(self, signum: int, frame: object) -> None:
        is_echo = self._is_echo()
        if self.stage is Stage.STARTING:
            self._end_now(SIGINT_EXIT)
        elif self.stage is Stage.LEAVING:
            if not is_echo:
                os._exit(SIGINT_EXIT)
        elif self._polite and not (self.stop_wanted and not is_echo):
            self.stop_wanted = True
        else:
            self.stage = Stage.LEAVING
            raise KeyboardInterrupt

    def _on_terminate(self, signum: int, frame: object) -> None:
        is_echo = self._is_echo()
        if self.stage is Stage.STARTING:
            self._end_now(128 + signum)
        elif self.stage is Stage.LEAVING:
            if not is_echo:
                os._exit(128 + signum)
            self._postponed = self._postponed or Terminated(signum)
        else:
            self.stage = Stage.LEAVING
            wish = Terminated(signum)
            if self.deliver is None or not self.deliver(wish):
                raise wish

    def _end_now(self, code: int) -> None:
        try:
            if self.before_sudden_end is not None:
                self.before_sudden_end(code)
        finally:
            # An exception would travel through whatever import is running, and some swallow it.
            os._exit(code)

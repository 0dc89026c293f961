"""A request on its way from the thread that talks HTTP to the one that answers, and back.

Its events are put by the one and taken by the other: Progress while weights or pages are read,
Started, Progress again, Pieces, and last the Output, or the exception that ended it. Of several
prompts, Answered stands between the events of one and of the next. (A TextQuery has one event, an
object.)
"""

from __future__ import annotations

import asyncio
from typing import Any, NamedTuple

from ebbtide import Output

from .request import Request
from .text_query import TextQuery


class Started(NamedTuple):
    """A prompt is understood and has room; cached_tokens of it are not read again."""

    prompt_tokens: int
    cached_tokens: int


class Answered(NamedTuple):
    """One of several prompts has its answer, and the next one follows."""

    output: Output


class Stopping(BaseException):
    """The last event of the jobs that are left when the server stops."""


class HungUp(BaseException):
    """Nobody listens any more. Raised inside the LLM too, between two layers or tokens."""


_MOST_PENDING = 10_000  # events of a few hundred bytes; who takes none of them has gone


class Job:
    """One request. Made in the event loop in which its events are taken."""

    def __init__(self, request: Request | TextQuery):
        self.request = request
        self.events: asyncio.Queue[Any] = asyncio.Queue()
        self.has_hung_up = False
        self._loop = asyncio.get_running_loop()

    def put(self, event: Any) -> None:
        if self.events.qsize() > _MOST_PENDING:
            self.has_hung_up = True
        try:
            self._loop.call_soon_threadsafe(self.events.put_nowait, event)
        except RuntimeError:  # the loop is closed, and with it the connection
            pass

    def check(self) -> None:
        """Raises HungUp where that is so."""
        if self.has_hung_up:
            raise HungUp

    def note(self, progress: Any) -> None:
        self.check()
        self.put(progress)

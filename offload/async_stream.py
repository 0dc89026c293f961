"""Answers for programs that run an asyncio loop: made in one thread, piece by piece for the loop.

    asked --its turn--> answering --end, error or cancelled--> over
      '------------------cancelled-----------------------------^

One LLM serves one thread at a time, so that thread takes what is asked in order, and makes each
answer to its end; pieces wait for the loop, which may be slower. A task that is cancelled, and a
stream that is dropped, stop it between two layers or tokens. Knows streams; computes nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from .errors import InputError
from .output import Output, Piece, Progress
from .stream import Stream

if TYPE_CHECKING:
    from .llm import LLM


class _Cancelled(BaseException):
    """Nobody wants the answer any more. Raised inside the LLM, and caught here."""


class _Answer:
    """What the loop and the thread share of one answer. output: at its end. closed: what is told
    where the LLM is closed before that."""

    def __init__(self, begin: Callable[[], Stream]):
        self.begin = begin
        self.events: asyncio.Queue[Piece | BaseException | None] = asyncio.Queue()
        self.is_cancelled = False
        self.output: Output | None = None
        self.closed: InputError | None = None
        self._loop = asyncio.get_running_loop()

    def put(self, event: Piece | BaseException | None) -> None:
        try:
            self._loop.call_soon_threadsafe(self.events.put_nowait, event)
        except RuntimeError:  # the loop is closed, and with it whoever waited
            self.is_cancelled = True

    def check(self) -> None:
        if self.is_cancelled:
            raise _Cancelled


class AsyncStream(AsyncIterator[Piece]):
    """Made by `astream`: `async for` gives the pieces of one answer as they come.

    `aclose()` stops it, and so does cancelling the task that waits for it; both return once nothing
    is computed for it any more, within a layer's time. One that is dropped is stopped as well, a
    little later. output: the Output, None before the end.
    """

    def __init__(self, answer: _Answer, future: Future):
        self._answer, self._future = answer, future
        self._is_over = False

    @property
    def output(self) -> Output | None:
        return self._answer.output

    async def __anext__(self) -> Piece:
        if self._is_over:
            raise StopAsyncIteration
        try:
            event = await self._answer.events.get()
        except asyncio.CancelledError:
            await self.aclose()
            raise
        if isinstance(event, Piece):
            return event
        self._is_over = True
        if event is None:
            raise StopAsyncIteration
        raise event

    async def aclose(self) -> None:
        """Stop. May be called again. The answer so far is in `output`, as "cancelled"."""
        self._is_over = self._answer.is_cancelled = True
        if not self._future.cancel():  # it has begun
            await asyncio.wait({asyncio.wrap_future(self._future)})

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(self, *_) -> None:
        await self.aclose()

    def __del__(self) -> None:
        self._answer.is_cancelled = True
        self._future.cancel()


class AsyncAnswers:
    """The thread of one LLM. Started by the first answer."""

    def __init__(self, llm: LLM):
        self._llm = llm
        self._executor = ThreadPoolExecutor(1, "ebbtide-answers")
        self._answers: WeakSet[_Answer] = WeakSet()

    def stream(self, begin: Callable[[], Stream]) -> AsyncStream:
        """begin: called in the thread. Needs a running loop."""
        answer = _Answer(begin)
        try:
            future = self._executor.submit(self._make, answer)
        except RuntimeError:
            raise InputError("the LLM is closed; open it again with LLM.open") from None
        self._answers.add(answer)
        return AsyncStream(answer, future)

    async def output(self, begin: Callable[[], Stream]) -> Output:
        """The whole answer."""
        stream = self.stream(begin)
        async for _ in stream:
            pass
        assert stream.output is not None
        return stream.output

    def close(self) -> None:
        """Stop what is asked, and wait for that. What is asked later is an InputError."""
        for answer in self._answers:
            answer.closed = InputError("the LLM was closed before the answer's end")
            answer.is_cancelled = True
        self._executor.shutdown()

    def _make(self, answer: _Answer) -> None:
        llm = self._llm
        before = llm.on_progress, llm.check
        llm.on_progress = _joined(answer.check, before[0])
        llm.check = _joined(answer.check, before[1])
        ending: BaseException | None = None
        try:
            answer.check()
            stream = answer.begin()
            try:
                for piece in stream:
                    answer.put(piece)
                    answer.check()
            finally:
                stream.close()
                answer.output = stream.output
        except _Cancelled:
            ending = answer.closed
        except BaseException as error:
            ending = error
        finally:
            llm.on_progress, llm.check = before
            answer.put(ending)


def _joined(check: Callable[[], None], then: Callable[..., Any] | None) -> Callable[..., None]:
    """Calls both; the second only where the first raises nothing."""

    def both(*args: Progress) -> None:
        check()
        if then is not None:
            then(*args)

    return both

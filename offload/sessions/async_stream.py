"""Answers for programs that run an asyncio loop: made in one thread, piece by piece for the loop;
and what else takes long, such as reading.

    asked --its turn--> answering --end, error or cancelled--> over
      '------------------cancelled-----------------------------^

One LLM serves one thread at a time, so that thread takes what is asked in order, and makes each
answer to its end; pieces wait for the loop, which may be slower. A task that is cancelled, and a
stream that is dropped, stop it between two layers or tokens. Knows streams; computes nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

from ..errors import InputError
from ..output import Output, Piece
from .stream import Stream

if TYPE_CHECKING:
    from ..llm import LLM
    from .session import Session


_R = TypeVar("_R")


class _Cancelled(BaseException):
    """Nobody wants the answer any more. Raised inside the LLM, and caught here."""


class _Asked:
    """What the loop and the thread share of one answer, or call. session: that it is of, None: its
    own. closed: what is told where the LLM or the session is closed before its end."""

    def __init__(self, session: Session | None):
        self.session = session
        self.is_cancelled = False
        self.closed: InputError | None = None
        try:
            self.loop = asyncio.get_running_loop()
        except RuntimeError:
            raise InputError(
                "no asyncio loop runs here: call astream in a coroutine, or use stream"
            ) from None

    def check(self) -> None:
        if self.is_cancelled or self.loop.is_closed():
            raise _Cancelled

    def turn_lost(self) -> None:
        """It was closed before its turn, which will not come."""


class _Answer(_Asked):
    """output: at its end."""

    def __init__(self, begin: Callable[[], Stream], session: Session | None):
        super().__init__(session)
        self.begin = begin
        self.events: asyncio.Queue[Piece | BaseException | None] = asyncio.Queue()
        self.output: Output | None = None

    def put(self, event: Piece | BaseException | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed, and with it whoever waited
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)

    def turn_lost(self) -> None:
        self.put(self.closed)


class AsyncStream(AsyncIterator[Piece]):
    """Made by `astream`: `async for` gives the pieces of one answer as they come.

    `aclose()` stops it, and so does cancelling the task that waits for it; both return once nothing
    is computed for it any more, within a layer's time. One that is dropped is stopped as well, a
    little later. Of several tasks that wait for one, each piece goes to one of them. InputError in
    another loop than the one that it was made in. output: the Output, None before the end.
    """

    def __init__(self, answer: _Answer, future: Future):
        self._answer, self._future = answer, future
        self._is_over = False

    @property
    def output(self) -> Output | None:
        """What the answer gave; None until its end."""
        return self._answer.output

    async def __anext__(self) -> Piece:
        if asyncio.get_running_loop() is not self._answer.loop:
            raise InputError("this stream is of another asyncio loop; call astream in this one")
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
        self._answer.events.put_nowait(None)  # another task may wait, too
        if event is None:
            raise StopAsyncIteration
        raise event

    async def aclose(self) -> None:
        """Stop. May be called again. The answer so far is in `output`, as "cancelled"."""
        self._is_over = self._answer.is_cancelled = True
        if self._future.cancel():
            self._answer.put(None)  # its turn will not come, and a task may wait for it
        else:
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
        self._begin()
        self._asked: WeakKeyDictionary[_Asked, Future[Any]] = WeakKeyDictionary()
        self._made_here = threading.local()  # asked: what this thread does, if anything

    def _begin(self) -> None:
        """The thread, in this process."""
        self._process = os.getpid()
        self._executor = ThreadPoolExecutor(
            1, "ebbtide-answers", initializer=self._llm.sessions.wait_in_this_thread
        )

    def stream(self, begin: Callable[[], Stream], session: Session | None = None) -> AsyncStream:
        """begin: called in the thread. session: whose end ends the answer. Raises InputError where
        no loop runs, or the LLM is closed."""
        answer = _Answer(begin, session)
        return AsyncStream(answer, self._submit(answer, self._make, answer))

    async def output(self, begin: Callable[[], Stream], session: Session | None = None) -> Output:
        """The whole answer."""
        stream = self.stream(begin, session)
        async for _ in stream:
            pass
        assert stream.output is not None
        return stream.output

    async def call(
        self,
        function: Callable[[], _R],
        session: Session | None = None,
        undo: Callable[[_R], None] = lambda _: None,
    ) -> _R:
        """What `function` returns, which is called in the thread, in its turn. Cancelling the task
        stops it between two layers; undo: of what had come to its end by then."""
        asked = _Asked(session)
        future = self._submit(asked, self._called, asked, function)
        done = asyncio.wrap_future(future)
        try:
            await asyncio.wait({done})
        except asyncio.CancelledError:
            asked.is_cancelled = True
            if not future.cancel():
                await asyncio.wait({done})
                if done.exception() is None:
                    undo(done.result())
            raise
        if asked.closed is not None and (done.cancelled() or done.exception() is not None):
            raise asked.closed
        return done.result()

    def _submit(self, asked: _Asked, run: Callable[..., _R], *arguments: Any) -> Future[_R]:
        if self._process != os.getpid():  # a forked process has none of its parent's threads
            self._begin()
        try:
            future = self._executor.submit(run, *arguments)
        except RuntimeError:
            raise InputError("the LLM is closed; open it again with LLM.open") from None
        self._asked[asked] = future
        return future

    def check(self) -> None:
        """Between two layers or tokens: ends the answer that this thread makes, should nobody want
        it any more."""
        asked = getattr(self._made_here, "asked", None)
        if asked is not None:
            asked.check()

    def stop(self, session: Session) -> None:
        """Stop what is asked of a session that is to be closed, and wait for that."""
        if not hasattr(self._made_here, "asked"):
            wait(self._stop("session", [a for a in self._asked if a.session is session]))

    def close(self) -> None:
        """Stop what is asked, and wait for that. What is asked later is an InputError."""
        if hasattr(self._made_here, "asked"):
            raise InputError("an LLM cannot be closed by what is called while it answers")
        self._stop("LLM", [*self._asked])
        self._executor.shutdown()

    def _stop(self, what: str, found: list[_Asked]) -> list[Future[Any]]:
        futures = [self._asked[asked] for asked in found]
        for asked, future in zip(found, futures, strict=True):
            asked.closed = InputError(f"the {what} was closed before the answer's end")
            asked.is_cancelled = True
            if future.cancel():
                asked.turn_lost()
        return futures

    def _called(self, asked: _Asked, function: Callable[[], _R]) -> _R:
        self._made_here.asked = asked
        try:
            asked.check()
            return function()
        finally:
            del self._made_here.asked

    def _make(self, answer: _Answer) -> None:
        self._made_here.asked = answer
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
            del self._made_here.asked
            answer.put(ending)

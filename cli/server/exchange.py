"""One job and the connection that waits for it: events until the end, or until the client has gone.

Knows neither the model nor the queue; `on_end` is told how it ended.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from starlette.requests import Request as HTTPRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ebbtide import Output, Piece, Progress

from .answer import Answer
from .error_object import error_object
from .job import Answered, HungUp, Job, Started

KEEP_ALIVE_S = 10.0  # clients and proxies give up after 30 to 60 s of silence


class Exchange:
    """Must be closed. on_end: called once, with what to log."""

    def __init__(self, http: HTTPRequest, job: Job, on_end: Callable[[str], None]):
        self.job = job
        self._on_end = on_end
        self._began_s = time.monotonic()
        self._told = "hung up"
        self._is_open = True
        self._gone = asyncio.ensure_future(_until_gone(http.receive))

    async def next_event(self, timeout_s: float | None = None) -> Any:
        """The job's next event; None where there is none in time. Raises HungUp."""
        got = asyncio.ensure_future(self.job.events.get())
        try:
            await asyncio.wait(
                {got, self._gone}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
            )
            if self._gone.done():
                raise HungUp
            if not got.done():
                return None
            found = got.result()
        finally:
            got.cancel()
        if isinstance(found, HungUp):  # it reads nothing of what is sent
            raise found
        if isinstance(found, BaseException):
            status, body = error_object(found)
            self._told = f"{status}, {body['error']['code'] or body['error']['type']}"
        elif isinstance(found, Output):
            self._told = self._numbers(found.usage)
        elif isinstance(found, dict):
            self._told = "200"
        return found

    async def first_event(self) -> Any:
        """The first event: with an exception there need be no stream. None where the request waits
        so long that the client had better hear something."""
        return await self.next_event(KEEP_ALIVE_S)

    async def outcome(self, answer: Answer | None) -> Any:
        """The last event: an Output, what a TextQuery is told, or an exception. answer: notes what
        comes before it."""
        while True:
            found = await self.next_event()
            if isinstance(found, Output | dict | BaseException):
                return found
            if answer is not None and isinstance(found, Piece):
                answer.note(found)
            elif answer is not None and isinstance(found, Answered):
                answer.answered(found.output)

    def close(self) -> None:
        """The job goes on for nobody."""
        if self._is_open:
            self._is_open = False
            self._gone.cancel()
            self._on_end(self._told)

    def _numbers(self, usage: dict[str, Any]) -> str:
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        return (
            f"200, {usage['prompt_tokens']:,} tokens ({cached:,} cached), "
            f"{usage['completion_tokens']:,} written, {time.monotonic() - self._began_s:.2f} s"
        )


class EventStream(Response):
    """The answer as server-sent events. first: the event that has come already, or None."""

    media_type = "text/event-stream"

    def __init__(self, exchange: Exchange, answer: Answer, first: Any):
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._exchange, self._answer, self._first = exchange, answer, first

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        try:
            await send(start)
            async with aclosing(self._chunks()) as chunks:
                async for chunk in chunks:
                    if chunk:
                        body = {"type": "http.response.body", "body": chunk, "more_body": True}
                        await send(body)
            await send({"type": "http.response.body", "body": b""})
        except HungUp:
            pass
        finally:
            self._exchange.close()

    async def _chunks(self) -> AsyncGenerator[bytes, None]:
        answer, found = self._answer, self._first
        started: Started | None = None
        yield answer.first()
        while True:
            if found is None:
                yield answer.alive(started)
            elif isinstance(found, BaseException):
                yield answer.failed(found)
                return
            elif isinstance(found, Output):
                yield answer.last(found)
                return
            elif isinstance(found, Started):
                started = found
                yield answer.started(found)
            elif isinstance(found, Piece):
                yield answer.piece(found)
            elif isinstance(found, Answered):
                yield answer.answered(found.output)
            elif isinstance(found, Progress):
                yield answer.progress(started, found)
            found = await self._exchange.next_event(KEEP_ALIVE_S)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass

"""One answer as a client is told of it, whole or piece by piece. Each protocol has a subclass."""

from __future__ import annotations

import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

from ebbtide import Output, Piece, Progress

from .error_object import error_object
from .job import Started
from .request import Request

KEEP_ALIVE = b": keep-alive\n\n"  # a comment: it says nothing, and no proxy takes us for dead


# Line ends to some readers of events, and in JSON only within texts.
_LINE_ENDS = {ord(char): f"\\u{ord(char):04x}" for char in "\x85\u2028\u2029"}


def encoded(value: dict[str, Any]) -> bytes:
    """JSON in UTF-8. Halves of surrogate pairs, which a refusal may repeat, become `?`."""
    return json.dumps(value, ensure_ascii=False).translate(_LINE_ENDS).encode("utf-8", "replace")


def event(value: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + encoded(value) + b"\n\n"


def typed_event(value: dict[str, Any]) -> bytes:
    """One whose name is its object's type."""
    return f"event: {value['type']}\n".encode() + event(value)


class Answer(ABC):
    """model: the name that is told. A stream is what `first`, `started`, `piece` for each piece,
    and `last` or `failed` give, in this order, with `alive` and `progress` in between; any may be
    empty."""

    def __init__(self, request: Request, model: str, prefix: str):
        """prefix: of the id."""
        self._request, self._model = request, model
        self.id = new_id(prefix)
        self._created_s = int(time.time())

    @abstractmethod
    def note(self, piece: Piece) -> None:
        """A piece of an answer that will be told whole."""

    @abstractmethod
    def whole(self, output: Output) -> dict[str, Any]:
        """All of it, once its pieces were noted."""

    def parts(self, output: Output) -> Iterator[bytes]:
        """JSON of the whole, in pieces where it is long."""
        yield encoded(self.whole(output))

    def first(self) -> bytes:
        """What opens a stream, perhaps before the request has its turn."""
        return b""

    def started(self, started: Started) -> bytes:
        """The prompt is understood."""
        return b""

    @abstractmethod
    def piece(self, piece: Piece) -> bytes:
        """A bit of the answer, of the thought before it or of its calls."""

    def answered(self, output: Output) -> bytes:
        """The end of an answer, behind which that to the next of several prompts begins; noted
        where it will be told whole."""
        raise NotImplementedError("this protocol has one prompt")

    def alive(self, started: Started | None) -> bytes:
        """That it goes on, while there is nothing else to tell. started: None where the request
        still waits."""
        return KEEP_ALIVE

    def progress(self, started: Started | None, progress: Progress) -> bytes:
        """How far reading the prompt is."""
        return self.alive(started)

    @abstractmethod
    def last(self, output: Output) -> bytes:
        """The end of a stream."""

    def failed(self, error: BaseException) -> bytes:
        """The end of a stream that something went wrong in."""
        return event(error_object(error)[1])


def new_id(prefix: str) -> str:
    return f"{prefix}{uuid.uuid4().hex}"

"""The bodies of requests: how much of them is held at once, and how long one may take to come.

    being read --whole--> held --its answer is over--> released

What may be held was set aside from the memory budget before the model was opened.
"""

from __future__ import annotations

import asyncio
import re

from starlette.requests import Request as HTTPRequest

from ebbtide import format_size

from .bad_request import BadRequest

_BODY_S = 30.0  # for a body to come: it is a megabyte or two
_HELD_BODIES = 2  # as large as one may be; smaller ones may be more
# A character may take four bytes where it takes one in a body, and while one body is decoded both
# are there; and what connections, their buffers and an event loop take.
_BYTES_PER_BYTE, _CONNECTIONS_BYTES = 4, 4 << 20
_WAITING_BYTES = 48 << 10  # a connection more, with its headers, and the objects of a request
# What values take beside their text. A list of empty ones would take thirty times its body.
_VALUE_BYTES = {ord("{"): 200, ord("["): 88, ord(","): 48}
# The last one may not end: looking for its end from each quote in it would take for ever.
_STRING_OR_SIGN = re.compile(rb'[{\[,]|"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)


def reserved_bytes(most_bytes: int, most_waiting: int) -> int:
    """Memory that a server takes besides its model, where a body may have most_bytes."""
    of_bodies = (_HELD_BODIES * _BYTES_PER_BYTE + 1 + _BYTES_PER_BYTE) * most_bytes
    return of_bodies + _CONNECTIONS_BYTES + most_waiting * _WAITING_BYTES


class Bodies:
    """most_bytes: of one body."""

    def __init__(self, most_bytes: int):
        self._most_bytes = most_bytes
        self._held_bytes = 0

    async def read(self, http: HTTPRequest) -> Body:
        """The whole body, to be released when its answer is over. Raises BadRequest."""
        kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # browsers send others to anyone, without asking first
            given = f"it is {kind!r}" if kind else "there is none"
            raise BadRequest(
                "The request must have the header 'Content-Type: application/json' (with curl: "
                f"-H 'Content-Type: application/json'); {given}.",
                status=415,
            )
        packing = http.headers.get("content-encoding", "identity").strip().lower()
        if packing != "identity":
            raise BadRequest(
                f"The body is compressed ({packing!r}); send it as plain JSON, without the header "
                "Content-Encoding.",
                status=415,
            )
        length = http.headers.get("content-length", "0")
        if length.isdigit() and int(length) > self._most_bytes:
            raise self._too_large()
        body = Body(self)
        try:
            async with asyncio.timeout(_BODY_S):
                async for chunk in http.stream():
                    body.add(chunk)
        except BaseException as error:
            body.release()
            if isinstance(error, TimeoutError):
                raise BadRequest(
                    f"The body did not come within {_BODY_S:.0f} s.", status=408
                ) from None
            raise
        return body

    def admit(self, num_bytes: int, body: Body) -> None:
        """Room for so many bytes more of one body. Raises BadRequest."""
        if body.num_bytes + num_bytes > self._most_bytes:
            raise self._too_large()
        if self._held_bytes + num_bytes > _HELD_BODIES * self._most_bytes:
            raise BadRequest(
                "The requests that are held already leave no memory for this one; ask again "
                "later, or allow more with 'ebbtide serve --max-body SIZE'.",
                status=503,
                code="queue_full",
            )
        self._held_bytes += num_bytes

    def check_values(self, data: bytearray) -> None:
        """Raises BadRequest where the values of a body take more than there is for text."""
        num_bytes = 0
        for found in _STRING_OR_SIGN.finditer(data):
            num_bytes += _VALUE_BYTES.get(data[found.start()], 0)
            if num_bytes > _BYTES_PER_BYTE * self._most_bytes:
                raise BadRequest(
                    "The body has too many lists, objects or numbers; "
                    "'ebbtide serve --max-body SIZE' allows more."
                )

    def release(self, num_bytes: int) -> None:
        self._held_bytes -= num_bytes

    def _too_large(self) -> BadRequest:
        return BadRequest(
            f"The body has more than {format_size(self._most_bytes)}; "
            "'ebbtide serve --max-body SIZE' allows more.",
            status=413,
        )


class Body:
    """num_bytes: how many are held for it, also once they have become something else."""

    def __init__(self, bodies: Bodies):
        self._bodies, self._data, self.num_bytes = bodies, bytearray(), 0

    def add(self, chunk: bytes) -> None:
        self._bodies.admit(len(chunk), self)
        self.num_bytes += len(chunk)
        self._data += chunk

    def take(self) -> bytearray:
        """What has come; it is not kept here any longer. Raises BadRequest where there would be no
        room for what it becomes."""
        data, self._data = self._data, bytearray()
        self._bodies.check_values(data)
        return data

    def release(self) -> None:
        """Its answer is over. May be called again."""
        self._bodies.release(self.num_bytes)
        self._data, self.num_bytes = bytearray(), 0

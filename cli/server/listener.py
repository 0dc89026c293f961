"""The socket, and the thread that talks HTTP on it while the main thread answers.

Knows uvicorn, and no model.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import logging
import os
import socket
import threading
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ebbtide import errors

from .guard import HEADERS_BYTES

_HEADERS_S = 10.0  # for the headers of a request to come
_CONNECTIONS = 64  # at a time, beside those whose requests wait
_TURNED_AWAY = 16  # beyond them, that are told so (503); more are not taken up
_IDLE_S = 30  # a connection that may be used again; clients give theirs up after 5 to 15
_STALLED_S = 60.0  # for a client to take up something of what it is sent
_STOP_S = 3  # for the last events to reach their clients


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0: any that is free. Connections wait in it until somebody accepts
    them. Raises InputError where the address cannot be used."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        return socket.create_server(address, family=family, backlog=_CONNECTIONS)
    except (OSError, UnicodeError) as error:
        number = getattr(error, "errno", None)
        if isinstance(error, socket.gaierror | UnicodeError) or number == errno.EADDRNOTAVAIL:
            raise errors.InputError(
                f"--host {host!r} is not an address of this machine; allowed are its addresses and "
                "names, such as 127.0.0.1, ::1, localhost, or 0.0.0.0 for all of them. The port is "
                "given with --port."
            ) from None
        raise errors.InputError(
            f"{shown(host)}:{port} cannot be listened on: {os.strerror(number or 0)}. "
            "Name another port with --port; 0 takes any that is free."
        ) from None


def shown(host: str) -> str:
    """As URLs and headers have it: an IPv6 address stands in brackets."""
    return f"[{host}]" if ":" in host else host


def is_loopback(listening: socket.socket) -> bool:
    """Whether only this machine can reach it."""
    return ipaddress.ip_address(listening.getsockname()[0]).is_loopback


def url_of(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://{shown(host)}:{port}"


class _Protocol(H11Protocol):
    """Closes connections that would be held for ever: whose request does not come but a few bytes
    now and then, whose client takes nothing of the answer, and those beyond what memory was set
    aside for."""

    _timer: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > (self.limit_concurrency or 0) + _TURNED_AWAY:
            transport.abort()
        else:
            self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_watching()
        self._stop_waiting()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        # close() would wait for the client too.
        self._stalled = self.loop.call_later(_STALLED_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_waiting()

    def _stop_waiting(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def _watch(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_watching()  # its headers have come; its body has a time of its own
        elif self._timer is None:
            self._timer = self.loop.call_later(_HEADERS_S, self.transport.close)

    def _stop_watching(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class Listener:
    """A context manager: inside it requests are taken. Leaving it lets the last events out."""

    def __init__(self, app: Any, listening: socket.socket, most_waiting: int):
        logging.getLogger("uvicorn").setLevel(logging.CRITICAL)
        self._socket = listening
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                http=_Protocol,
                ws="none",
                loop="asyncio",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                limit_concurrency=_CONNECTIONS + most_waiting,
                h11_max_incomplete_event_size=HEADERS_BYTES,
                timeout_keep_alive=_IDLE_S,
                timeout_graceful_shutdown=_STOP_S,
            )
        )
        self._thread = threading.Thread(target=self._serve, name="ebbtide-http", daemon=True)

    def _serve(self) -> None:
        asyncio.run(self._server.serve(sockets=[self._socket]))

    def __enter__(self) -> Listener:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(_STOP_S + 1)

"""Who may ask: what stands between a web page that the user happens to visit and the model.

    Host     a name of this machine; a page whose own name was pointed here (DNS rebinding) has
             another
    Origin   none, or that of a page that was allowed: browsers send it, programs do not
    key      where there is one, all but /health need it

Knows headers; it reads no body.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Callable
from dataclasses import dataclass, field

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from .answer import encoded
from .bad_request import BadRequest
from .error_object import error_object

HEADERS_BYTES = 32 << 10
_SHOWN_CHARS = 200  # of a path, in the log
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
_LINGER_S = 5.0  # for the body of a request that was refused to come


@dataclass(frozen=True)
class Rules:
    """hosts: the names that a request may call this server; None: any. origins: of web pages; "*"
    is any. api_key: never shown."""

    hosts: tuple[str, ...] | None
    origins: tuple[str, ...] = ()
    api_key: str | None = field(default=None, repr=False)

    def check(self, path: str, headers: Headers) -> None:
        """Raises BadRequest."""
        # What comes in one piece is no incomplete event, of which alone HTTP's parser is told.
        if sum(len(name) + len(value) for name, value in headers.items()) > HEADERS_BYTES:
            raise BadRequest(
                f"The headers have more than {HEADERS_BYTES:,} bytes; send fewer or shorter ones.",
                status=431,
            )
        host = headers.get("host", "")
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        if self.hosts is not None and name.lower() not in self.hosts:
            raise BadRequest(
                f"The server does not answer to the name {name!r} (in the header Host); it answers "
                f"to {', '.join(self.hosts)}. To answer to any name, start it with --host ADDRESS, "
                "such as 0.0.0.0, and --api-key.",
                status=403,
            )
        origin = headers.get("origin")
        if origin is not None and "*" not in self.origins and origin not in self.origins:
            raise BadRequest(
                f"Web pages of the origin {origin!r} may not use this server; to allow those "
                "of one origin, start it with --cors-origin ORIGIN, such as http://localhost:3000.",
                status=403,
            )
        if self.api_key is not None and path != "/health":
            scheme, _, key = headers.get("authorization", "").partition(" ")
            keys = [key.strip()] if scheme.lower() == "bearer" else []
            keys += [headers.get("x-api-key", "")]  # as clients of Anthropic's API send it
            # A list: how long it takes must not depend on which of them is right.
            if not any([hmac.compare_digest(k.encode(), self.api_key.encode()) for k in keys]):
                raise BadRequest(
                    "The key is missing or wrong: send it as 'Authorization: Bearer KEY' or "
                    "'x-api-key: KEY'.",
                    status=401,
                    code="invalid_api_key",
                )


def asked(scope: Scope) -> str:
    """For the log: method and path as they were sent, on one line whatever the path says."""
    return f"{scope['method']} {scope['raw_path'].decode('ascii', 'replace')[:_SHOWN_CHARS]}"


class Refusal(Response):
    """The last answer on its connection, to a request whose body nobody wants. What still comes of
    that is thrown away for a while: a connection that is closed under a client that sends takes the
    answer with it."""

    def __init__(self, error: BadRequest, path: str):
        status, body = error_object(error, path)
        close = {"connection": "close"}
        super().__init__(encoded(body), status, close, media_type="application/json")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": self.status_code}
        await send({**start, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        try:
            async with asyncio.timeout(_LINGER_S):
                while (await receive()).get("more_body"):
                    pass
        except TimeoutError:
            pass
        await send({"type": "http.response.body", "body": b""})


class Guard:
    """Middleware around an app. log: takes a line for each refusal."""

    def __init__(self, app: ASGIApp, rules: Rules, log: Callable[[str], None]):
        self._app, self._rules, self._log = app, rules, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._rules.check(scope["path"], Headers(scope=scope))
        except BadRequest as refusal:
            self._log(f"{asked(scope)}: {refusal.status}")
            await Refusal(refusal, scope["path"])(scope, receive, send)
        else:
            await self._app(scope, receive, send)

"""The routes: each turns a request into a job, and the job's events into a response.

Runs in the event loop of the thread that talks HTTP, and computes nothing: whatever needs the
model goes through the worker's queue.
"""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HTTPRequest
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from .answer import Answer, encoded
from .anthropic_answer import AnthropicAnswer
from .anthropic_request import anthropic_request
from .bad_request import BadRequest
from .bodies import Bodies
from .error_object import error_object
from .estimate import estimate_query
from .exchange import EventStream, Exchange
from .fields import read_json
from .guard import Guard, Refusal, Rules, asked
from .job import HungUp
from .request import chat_request, completion_request
from .response import CompletionAnswer, model_object, models_object
from .responses_answer import ResponsesAnswer
from .responses_request import NOT_KEPT, responses_request
from .text_query import count_query, detokenize_query, template_query, tokenize_query
from .worker import Worker

Log = Callable[[str], None]
# Of what clients put behind the address that they were given.
_ADDRESSES = (
    *("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/models"),
    *("/v1/messages", "/v1/messages/count_tokens"),
)
_CLOSED = 499  # as proxies log a client that has gone; nobody reads it
_RETRY_AFTER_S = 10


class _NoSlashAtTheEnd:
    """Middleware: an address with a slash at its end is the one without. Starlette would send the
    client there by a URL, of plain HTTP also where it came through a proxy with TLS."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope = {**scope, "path": scope["path"].rstrip("/") or "/"}
        await self._app(scope, receive, send)


class Routes:
    """names: of the model; the first is told, all are understood. log: takes a line for each
    request, which holds no word of it."""

    def __init__(self, worker: Worker, names: tuple[str, ...], bodies: Bodies, log: Log):
        self._worker, self._names, self._bodies, self._log = worker, names, bodies, log
        self._began_s = int(time.time())

    def app(self, rules: Rules) -> Starlette:
        """All of it, behind the guard."""
        cors = Middleware(
            CORSMiddleware,
            allow_origins=rules.origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            allow_private_network=True,  # of a page on the Internet too, if it is allowed
            expose_headers=["retry-after"],
        )
        # Outside the guard, so that a page that may ask can read refusals too.
        outside = [cors] if rules.origins else []
        return Starlette(
            routes=[
                Route("/health", self.health),
                Route("/metrics", self.metrics),
                Route("/v1/models", self.models),
                Route("/v1/models/{name:path}", self.model),
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
                Route("/v1/completions", self.complete, methods=["POST"]),
                Route("/v1/responses", self.respond, methods=["POST"]),
                Route("/v1/responses/input_tokens", self.count_input, methods=["POST"]),
                Route("/v1/responses/{id:path}", self.kept, methods=["GET", "POST", "DELETE"]),
                Route("/v1/messages", self.message, methods=["POST"]),
                Route("/v1/messages/count_tokens", self.count_tokens, methods=["POST"]),
                Route("/v1/estimate", self.estimate, methods=["POST"]),
                Route("/tokenize", self.tokenize, methods=["POST"]),
                Route("/detokenize", self.detokenize, methods=["POST"]),
                Route("/apply-template", self.apply_template, methods=["POST"]),
            ],
            middleware=[
                *outside,
                Middleware(Guard, rules=rules, log=self._log),
                Middleware(_NoSlashAtTheEnd),
            ],
            exception_handlers={
                BadRequest: self.refuse,
                HTTPException: self.refuse_path,
                Exception: self.refuse,
            },
        )

    # ---- what needs no model ------------------------------------------------------------------

    async def health(self, http: HTTPRequest) -> Response:
        if (trouble := self._worker.trouble) is not None:
            return _json({"status": "error", "reason": trouble}, 503)
        return _json({"status": "ok"})

    async def metrics(self, http: HTTPRequest) -> Response:
        found = {f"{name}_total": ("counter", n) for name, n in dict(self._worker.counts).items()}
        found["requests_waiting"] = ("gauge", self._worker.num_waiting)
        found["model_loaded"] = ("gauge", int(self._worker.is_loaded))
        lines = [
            f"# TYPE ebbtide_{name} {kind}\nebbtide_{name} {value}\n"
            for name, (kind, value) in sorted(found.items())
        ]
        return PlainTextResponse("".join(lines))

    async def models(self, http: HTTPRequest) -> Response:
        return _json(models_object(self._names[0], self._worker.context, self._began_s))

    async def model(self, http: HTTPRequest) -> Response:
        self._check_model(http.path_params["name"])
        return _json(model_object(self._names[0], self._worker.context, self._began_s))

    def _check_model(self, name: str) -> None:
        if name not in self._names:
            raise BadRequest(
                f"There is no model {name!r} here; {self._names[0]!r} is served.",
                status=404,
                param="model",
                code="model_not_found",
            )

    # ---- answers ------------------------------------------------------------------------------

    async def chat(self, http: HTTPRequest) -> Response:
        return await self._answer(http, chat_request, CompletionAnswer)

    async def complete(self, http: HTTPRequest) -> Response:
        return await self._answer(http, completion_request, CompletionAnswer)

    async def respond(self, http: HTTPRequest) -> Response:
        return await self._answer(http, responses_request, ResponsesAnswer)

    async def message(self, http: HTTPRequest) -> Response:
        return await self._answer(http, anthropic_request, AnthropicAnswer)

    async def count_tokens(self, http: HTTPRequest) -> Response:
        return await self._answer(
            http, lambda body: count_query(anthropic_request(body, is_counted=True))
        )

    async def count_input(self, http: HTTPRequest) -> Response:
        kind = "response.input_tokens"
        return await self._answer(
            http, lambda body: count_query(responses_request(body), object=kind)
        )

    async def estimate(self, http: HTTPRequest) -> Response:
        return await self._answer(http, lambda body: estimate_query(body, self._worker.estimate))

    async def kept(self, http: HTTPRequest) -> Response:
        raise BadRequest(f"There is no {http.scope['path']} here: {NOT_KEPT}.", status=404)

    async def tokenize(self, http: HTTPRequest) -> Response:
        return await self._answer(http, lambda body: tokenize_query(body, self._worker.context))

    async def detokenize(self, http: HTTPRequest) -> Response:
        return await self._answer(http, detokenize_query)

    async def apply_template(self, http: HTTPRequest) -> Response:
        return await self._answer(http, template_query)

    async def _answer(
        self,
        http: HTTPRequest,
        parse: Callable[[dict[str, Any]], Any],
        told: Callable[[Any, str], Answer] | None = None,
    ) -> Response:
        """parse: makes a Request of a body, which is told as `told`, or a TextQuery."""
        try:
            body = await self._bodies.read(http)
        except ClientDisconnect:
            return Response(status_code=_CLOSED)
        try:
            request = parse(read_json(body.take()))
            if request.model is not None:
                self._check_model(request.model)
            answer = told and told(request, self._names[0])
            job = self._worker.submit(request)
        except BaseException:
            body.release()
            raise

        def on_end(ended: str) -> None:
            self._worker.hang_up(job)
            body.release()
            self._log(f"{asked(http.scope)}: {ended}")

        exchange = Exchange(http, job, on_end)
        is_streaming = False
        try:
            if answer is not None and request.stream:
                first = await exchange.first_event()
                is_streaming = not isinstance(first, BaseException)
                if is_streaming:
                    return EventStream(exchange, answer, first)
            else:
                first = await exchange.outcome(answer)
            if isinstance(first, BaseException):
                return self._refusal(first, http)
            if answer is None:
                return _json(first)
            if request.tells_logprobs:
                parts = _one_by_one(answer.parts(first))
                return StreamingResponse(parts, media_type="application/json")
            return _json(answer.whole(first))
        except HungUp:
            return Response(status_code=_CLOSED)
        finally:
            if not is_streaming:
                exchange.close()

    # ---- refusals -----------------------------------------------------------------------------

    async def refuse(self, http: HTTPRequest, error: Exception) -> Response:
        self._log(f"{asked(http.scope)}: {getattr(error, 'status', 500)}")
        return self._refusal(error, http)

    async def refuse_path(self, http: HTTPRequest, error: Exception) -> Response:
        """What starlette refuses by itself."""
        status = getattr(error, "status_code", 500)
        path = http.scope["path"]
        headers = getattr(error, "headers", None) or {}
        reason = f"There is no {path} here; {_meant(path)}."
        if status == 405:
            reason = f"{path} does not take {http.method}; it takes {headers.get('Allow')}."
        response = await self.refuse(http, BadRequest(reason, status=status))
        response.headers.update(headers)
        return response

    def _refusal(self, error: BaseException, http: HTTPRequest) -> Response:
        path = http.scope["path"]
        if isinstance(error, BadRequest) and error.status in (408, 413, 415):
            return Refusal(error, path)  # its body may still be coming
        status, body = error_object(error, path)
        headers = {"retry-after": str(_RETRY_AFTER_S)} if status == 503 else None
        return _json(body, status, headers)


def _meant(path: str) -> str:
    """What there is in place of an address: the one whose "/v1" is missing, or there twice, or
    all."""
    asked = re.sub(r"^/*(v1/+)*", "/", path)
    near = [known for known in _ADDRESSES if known.removeprefix("/v1") == asked]
    return f"{near[0]} is" if near else f"there are {', '.join(_ADDRESSES)}"


async def _one_by_one(parts: Iterator[bytes]) -> AsyncIterator[bytes]:
    """Made in this thread, as they are sent: a plain iterator would be run in another."""
    for part in parts:
        yield part


def _json(value: dict[str, Any], status: int = 200, headers: dict | None = None) -> Response:
    return Response(encoded(value), status, headers, media_type="application/json")

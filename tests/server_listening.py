"""A real listener and real sockets, before a worker that does what each test says. Not tests."""

from __future__ import annotations

import http.client
import json
import threading
from collections import Counter
from contextlib import contextmanager

from ebbtide import Output
from ebbtide.cli.server import bodies, listener
from ebbtide.cli.server.app import Routes
from ebbtide.cli.server.guard import LOOPBACK_NAMES, Rules
from ebbtide.cli.server.job import Job

PATIENCE_S = 30
RULES = Rules(LOOPBACK_NAMES)
HELLO = {"messages": [{"role": "user", "content": "Hello"}]}


class ScriptedWorker:
    """Puts `script` as the events of each job. gone: set when somebody hangs up."""

    context = 100
    trouble = None

    def __init__(self, *script):
        self.script, self.counts, self.num_waiting = script, Counter(), 0
        self.gone = threading.Event()

    def submit(self, request) -> Job:
        job = Job(request)
        for event in self.script:
            job.put(event)
        return job

    def hang_up(self, job: Job) -> None:
        self.gone.set()


@contextmanager
def listening(worker, most_bytes: int = 1000, rules: Rules = RULES):
    """(address, the lines of the log)"""
    log: list[str] = []
    routes = Routes(worker, ("m",), bodies.Bodies(most_bytes), log.append)
    with (
        listener.bind("127.0.0.1", 0) as bound,
        listener.Listener(routes.app(rules), bound, 8),
    ):
        yield bound.getsockname()[:2], log


def ask(address, body, path: str = "/v1/chat/completions"):
    """(status, text)"""
    connection = http.client.HTTPConnection(*address, timeout=PATIENCE_S)
    headers = {"content-type": "application/json"}
    connection.request("POST", path, json.dumps(body), headers)
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response.status, text


OUTPUT_FIELDS = {"finish_reason": "stop", "token_ids": [1], "timings": {}, "memory": {}, "kv": {}}


def output(text: str, **fields) -> Output:
    usage = {
        "prompt_tokens": 3,
        "completion_tokens": 1,
        "total_tokens": 4,
        "prompt_tokens_details": {"cached_tokens": 2},
        "completion_tokens_details": {"reasoning_tokens": 2},
    }
    return Output(text=text, usage=usage, **{**OUTPUT_FIELDS, **fields})


def strictly(type, value):
    """What a client's package read leniently, each field held to its type."""
    from pydantic import TypeAdapter

    return TypeAdapter(type).validate_python(value.model_dump(exclude_unset=True, by_alias=True))

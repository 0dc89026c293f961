"""`ebbtide serve` as a process, and a client of it that speaks plain HTTP. Not tests."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

PATIENCE_S = 50
KEY = "a-key-of-tests"


def command(*args: Any) -> list[str]:
    return [sys.executable, "-m", "ebbtide", "serve", *map(str, args)]


def environment(home: Any) -> dict[str, str]:
    """The machine's variables without ours, and a home that nobody shares."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("EBBTIDE_", "XDG_"))}
    return kept | {"HOME": str(home), "OMP_NUM_THREADS": "1", "EBBTIDE_API_KEY": KEY}


class Stream:
    """An answer that comes as server-sent events."""

    def __init__(self, connection: http.client.HTTPConnection, response: Any):
        self._connection, self._response = connection, response

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The objects, up to [DONE] or the end of the connection."""
        for line in iter(self._response.readline, b""):
            if line.startswith(b"data: ") and line != b"data: [DONE]\n":
                yield json.loads(line[6:])
            elif line.startswith(b"data: "):
                return

    def hang_up(self) -> None:
        self._response.close()
        self._connection.close()


class Served:
    """A running server. said: what it printed, the object of --json."""

    def __init__(self, process: subprocess.Popen, home: Any):
        self.process, self.home = process, home
        line = process.stdout.readline()
        assert line, process.stderr.read().decode()
        self.said = json.loads(line)
        self.host = self.said["url"].removeprefix("http://").removesuffix("/v1")

    def send(
        self, path: str, body: Any = None, method: str | None = None, **headers: str | None
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        """headers: by name with `_` for `-`; None leaves out one that would be sent."""
        sent = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        connection = http.client.HTTPConnection(self.host, timeout=PATIENCE_S)
        method = method or ("GET" if body is None else "POST")
        given = {name: value for name, value in sent.items() if value is not None}
        connection.request(method, path, data, given)
        return connection, connection.getresponse()

    def ask(self, path: str, body: Any = None, **options: Any) -> tuple[int, Any]:
        """(status, the decoded object or the text)"""
        connection, response = self.send(path, body, **options)
        data = response.read().decode()
        connection.close()
        is_json = response.getheader("content-type", "").startswith("application/json")
        return response.status, json.loads(data) if is_json else data

    def chat(self, messages: Any, **body: Any) -> dict[str, Any]:
        status, found = self.ask("/v1/chat/completions", chat_body(messages, **body))
        assert status == 200, found
        return found

    def stream(self, messages: Any, **body: Any) -> Stream:
        asked = chat_body(messages, stream=True, **body)
        connection, response = self.send("/v1/chat/completions", asked)
        assert response.status == 200, response.read()
        return Stream(connection, response)

    def count(self, name: str) -> int:
        """One of /metrics, 0 where it was not counted yet."""
        _, text = self.ask("/metrics")
        lines = dict(line.split() for line in text.splitlines() if not line.startswith("#"))
        return int(lines.get(f"ebbtide_{name}", 0))

    def end(self) -> tuple[int, str]:
        """(exit code, what standard output had besides)"""
        out, _ = self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode, out.decode()


def chat_body(messages: Any, **body: Any) -> dict[str, Any]:
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    return {"model": "ebb-nano", "messages": messages, "temperature": 0, "max_tokens": 24, **body}


@contextmanager
def serving(home: Any, *args: Any) -> Iterator[Served]:
    process = subprocess.Popen(
        command("--port", "0", "--json", "--spill-dir", home, *args),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(home),
        cwd=home,
    )
    try:
        yield Served(process, home)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        process.communicate(timeout=PATIENCE_S)

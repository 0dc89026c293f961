"""Connections: what is sent while a request waits, who is given up, what a failure looks like."""

from __future__ import annotations

import json
import socket
import tracemalloc
from types import SimpleNamespace

import pytest
from server_listening import HELLO, PATIENCE_S, ScriptedWorker, ask, listening, output

from ebbtide import Piece, errors
from ebbtide.cli.server import bodies, exchange, listener
from ebbtide.cli.server import job as job_module
from ebbtide.cli.server.bad_request import BadRequest
from ebbtide.cli.server.guard import LOOPBACK_NAMES, Rules
from ebbtide.cli.server.job import HungUp, Job, Started, Stopping

CHAT = "/v1/chat/completions"


def connect(address, data: bytes) -> socket.socket:
    connection = socket.create_connection(address, timeout=PATIENCE_S)
    connection.sendall(data)
    return connection


def post(length: int, body: bytes, path: str = CHAT) -> bytes:
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\n"
        f"Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    )
    return head.encode() + body


COMMENT = b": keep-alive\n\n"
ASKED, AGAIN = {"input": "Hello"}, b"event: response.in_progress\n"
STARTED = Started(3, 2)


@pytest.mark.parametrize(
    ("path", "body", "script", "begins", "sign"),
    [
        (CHAT, HELLO, (), b'"role": "assistant"', COMMENT),
        (CHAT, HELLO, (STARTED,), b'"role": "assistant"', COMMENT),
        ("/v1/responses", ASKED, (), b"event: response.created\n", AGAIN),
        ("/v1/responses", ASKED, (STARTED,), b"event: response.created\n", AGAIN),
        ("/v1/messages", HELLO, (), b"", COMMENT),  # clients expect no ping before it begins
        ("/v1/messages", HELLO, (STARTED,), b"event: message_start\n", b"event: ping\n"),
    ],
)
def test_a_sign_of_life_now_and_then_while_there_is_nothing_to_say(
    monkeypatch, path, body, script, begins, sign
):
    monkeypatch.setattr(exchange, "KEEP_ALIVE_S", 0.01)
    worker = ScriptedWorker(*script)
    with listening(worker) as (address, log):
        data = json.dumps({**body, "stream": True}).encode()
        connection = connect(address, post(len(data), data, path))
        received = b""
        while received.count(sign) < 4:
            received += connection.recv(4096)
            assert len(received) < 10_000
        assert begins in received
        assert not worker.gone.is_set()
        connection.close()
        assert worker.gone.wait(PATIENCE_S)
    assert log == [f"POST {path}: hung up"]


@pytest.mark.parametrize("stream", [False, True])
def test_who_hangs_up_in_the_queue_is_noticed(stream):
    worker = ScriptedWorker()
    with listening(worker) as (address, _):
        data = json.dumps({**HELLO, "stream": stream}).encode()
        connect(address, post(len(data), data)).close()
        assert worker.gone.wait(PATIENCE_S)


def test_what_fails_before_the_first_token_is_a_status_and_later_an_event():
    full = errors.StorageError("the disk is full")
    with listening(ScriptedWorker(full)) as (address, log):
        for stream in (False, True):
            status, text = ask(address, {**HELLO, "stream": stream})
            assert status == 500 and json.loads(text)["error"]["code"] == "storage_error"
        assert log == ["POST /v1/chat/completions: 500, storage_error"] * 2
    with listening(ScriptedWorker(Started(3, 2), Piece("He", [1]), full)) as (address, _):
        assert ask(address, HELLO)[0] == 500
        status, text = ask(address, {**HELLO, "stream": True})
        assert status == 200 and '"content": "He"' in text and "[DONE]" not in text
        assert text.rstrip().endswith('"code": "storage_error"}}')


def test_the_log_has_numbers_and_no_words():
    worker = ScriptedWorker(Started(3, 2), Piece("Secret.", [1]), output("Secret."))
    with listening(worker) as (address, log):
        assert "Secret." in ask(address, HELLO)[1]
        ask(address, {"secret": 1})
        ask(address, HELLO, "/secret")
        ask(address, HELLO, "/one%0aline%1b")
    assert log[0].startswith("POST /v1/chat/completions: 200, 3 tokens (2 cached), 1 written, ")
    assert log[1:] == [
        "POST /v1/chat/completions: 400",
        "POST /secret: 404",
        "POST /one%0aline%1b: 404",
    ]


def test_who_asks_by_another_method_is_told_which():
    with listening(ScriptedWorker()) as (address, _):
        answer = answer_to(address, "PUT /v1/completions HTTP/1.1", "Host: localhost")
    assert " 405 " in answer and "\r\nallow: POST\r\n" in answer
    assert "/v1/completions does not take PUT; it takes POST." in answer


def test_a_fault_of_ours_is_told_as_json():
    worker = ScriptedWorker()
    worker.submit = lambda request: 1 / 0
    with listening(worker) as (address, _):
        status, text = ask(address, HELLO)
        assert status == 500 and "ZeroDivisionError" in json.loads(text)["error"]["message"]


def test_a_server_that_stops_says_so():
    with listening(ScriptedWorker(Stopping())) as (address, _):
        status, text = ask(address, HELLO)
    assert status == 503 and json.loads(text)["error"]["code"] == "stopping"


# --- what a client may take


def test_headers_that_do_not_come_are_not_waited_for(monkeypatch):
    monkeypatch.setattr(listener, "_HEADERS_S", 0.05)
    with listening(ScriptedWorker()) as (address, _):
        for begun in (b"", b"GET /health HTTP/1.1\r\nHost: local"):
            assert connect(address, begun).recv(100) == b""
        # The second request of a connection, too.
        connection = connect(address, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"200 OK" in connection.recv(4096)
        connection.sendall(b"GET /h")
        while connection.recv(4096):
            pass


def health_of(address) -> bytes:
    """The answer, or nothing where the connection was not taken up."""
    asked = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    with connect(address, asked) as connection:
        told = b""
        try:
            while some := connection.recv(4096):  # it may come in several pieces
                told += some
        except ConnectionResetError:
            pass
        return told


def test_health_says_why_the_model_cannot_be_loaded():
    worker = ScriptedWorker()
    with listening(worker) as (address, _):
        assert b"200 OK" in health_of(address)
        worker.trouble = "model.safetensors is damaged"
        told = health_of(address)
        assert told.startswith(b"HTTP/1.1 503") and told.endswith(
            b'{"status": "error", "reason": "model.safetensors is damaged"}'
        )
        worker.trouble = None
        assert b"200 OK" in health_of(address)


def test_a_model_that_cannot_be_loaded_is_a_503_that_may_be_asked_again():
    error = errors.BadCheckpoint("model.safetensors is damaged")
    with listening(ScriptedWorker(error)) as (address, _):
        status, text = ask(address, HELLO)
    told = json.loads(text)["error"]
    assert status == 503 and told["code"] == "model_unavailable"
    assert told["message"] == str(error)


def test_connections_beyond_what_they_may_take_are_not_taken_up(monkeypatch):
    monkeypatch.setattr(listener, "_CONNECTIONS", 4)
    monkeypatch.setattr(listener, "_TURNED_AWAY", 2)
    most = 4 + 8 + 2  # the listener of these tests lets eight requests wait
    with listening(ScriptedWorker()) as (address, _):
        held = [connect(address, b"GET /") for _ in range(most)]
        answers = [health_of(address) for _ in range(3)]
        assert answers == [b""] * 3
        held.pop().close()
        for _ in range(1000):
            if answer := health_of(address):
                break
        assert b" 503 " in answer  # there are as many as may ask
        for connection in held:
            connection.close()


def test_who_stops_taking_an_answer_is_given_up_and_what_it_held_is_free(monkeypatch):
    monkeypatch.setattr(listener, "_STALLED_S", 0.05)
    worker = ScriptedWorker(Started(3, 2), *[Piece("x" * 100_000, [1])] * 400, output("x"))
    with listening(worker) as (address, log):
        data = json.dumps({**HELLO, "stream": True}).encode()
        connection = connect(address, post(len(data), data))
        assert worker.gone.wait(PATIENCE_S)
        connection.close()
    assert log == ["POST /v1/chat/completions: hung up"]


def test_headers_have_a_size():
    with listening(ScriptedWorker()) as (address, _):
        large = b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * (40 << 10)
        assert b" 400 " in connect(address, large).recv(4096)


def test_headers_that_come_in_one_piece_have_a_size_too():
    with listening(ScriptedWorker()) as (address, _):
        large = b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * (40 << 10)
        assert b" 431 " in connect(address, large + b"\r\n\r\n").recv(4096)


def test_a_body_that_does_not_come_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(bodies, "_BODY_S", 0.05)
    with listening(ScriptedWorker()) as (address, _):
        assert b" 408 " in connect(address, post(100, b"{")).recv(4096)


@pytest.mark.parametrize(("host", "status"), [("localhost", b" 413 "), ("evil", b" 403 ")])
def test_who_is_refused_while_it_sends_hears_why(host, status):
    length = 32 << 20  # more than sockets hold
    with listening(ScriptedWorker()) as (address, _):
        head = post(length, b"").replace(b"Host: localhost", f"Host: {host}".encode())
        connection = connect(address, head)
        connection.sendall(b" " * length)
        assert status in connection.recv(4096)
        while connection.recv(4096):  # and then the connection is closed
            pass


def test_bodies_have_a_size_alone_and_together():
    worker = ScriptedWorker()
    with listening(worker, most_bytes=1000) as (address, _):
        padded = json.dumps(HELLO).encode().ljust(1000)
        assert b" 413 " in connect(address, post(1001, b"")).recv(4096)
        chunked = post(0, b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
        assert b" 413 " in connect(address, chunked + b"3e9\r\n" + b" " * 1001).recv(4096)
        held = [connect(address, post(1000, padded)) for _ in range(2)]
        status = 200
        while status != 503:  # until both have come
            status, text = ask(address, {"x": 1})
            assert status in (400, 503)
        assert "leave no memory for this one; ask again later" in text
        for connection in held:
            connection.close()
        while status == 503:  # until both have gone
            status, _ = ask(address, {"x": 1})


@pytest.mark.parametrize(
    "item", ["{}", '{"a":1}', "[]", "[0]", '"ab"', "3000", "1.5", '"\\"[[[["', '"\\\\",[]']
)
def test_what_a_body_becomes_has_room_too(item):
    """Judged by what Python takes for it."""
    most_bytes = 64 << 10
    text = "[" + ",".join([item] * (most_bytes // (len(item) + 1) - 1)) + "]"
    tracemalloc.start()
    found = json.loads(text)
    taken = tracemalloc.get_traced_memory()[0]
    assert found
    del found
    data, message = bytearray(text.encode()), ""
    before = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    try:
        bodies.Bodies(most_bytes).check_values(data)
    except BadRequest as refused:
        message = str(refused)
    assert tracemalloc.get_traced_memory()[1] - before < most_bytes // 2  # of looking at it
    tracemalloc.stop()
    if taken > 8 * most_bytes:
        assert "--max-body" in message
    if taken < 4 * most_bytes:
        assert not message


def test_text_is_no_structure_however_it_looks():
    admitting = bodies.Bodies(64 << 10)
    for text in ("[{,}]" * 10_000, '"{[,' * 8_000, "\\[[" * 10_000):
        admitting.check_values(bytearray(json.dumps({"prompt": text}).encode()))
    admitting.check_values(bytearray(rb'"' + rb"\"," * 32_000))  # ends nowhere, and at once


def test_who_takes_nothing_of_an_answer_is_taken_for_gone(monkeypatch):
    monkeypatch.setattr(job_module, "_MOST_PENDING", 10)
    loop = SimpleNamespace(call_soon_threadsafe=lambda put, event: put(event))
    monkeypatch.setattr(job_module.asyncio, "get_running_loop", lambda: loop)
    job = Job(None)
    for number in range(12):
        job.check()
        job.put(number)
    with pytest.raises(HungUp):
        job.check()


# --- what is said of a wrong request


def answer_to(address, first: str, *headers: str, body: str = "") -> str:
    """All of it, to a request of a first line, headers and a body."""
    lines = [first, *headers, f"Content-Length: {len(body)}", "Connection: close", "", body]
    told = b""
    with connect(address, "\r\n".join(lines).encode()) as connection:
        while some := connection.recv(4096):
            told += some
    return told.decode()


@pytest.mark.parametrize(
    ("headers", "status", "says"),
    [
        (("Content-Type: application/json", "Content-Encoding: gzip"), 415, "compressed ('gzip')"),
        (("Content-Type: application/json", "Content-Encoding: identity"), 503, "is stopping"),
        ((), 415, "(with curl: -H 'Content-Type: application/json'); there is none."),
        (("Content-Type: application/x-www-form-urlencoded",), 415, "it is 'application/x-www"),
        (("Origin: http://x.example",), 403, "--cors-origin ORIGIN, such as http://localhost:3000"),
    ],
)
def test_what_is_wrong_is_told_with_what_is_right(headers, status, says):
    asked = (f"POST {CHAT} HTTP/1.1", "Host: localhost", *headers)
    with listening(ScriptedWorker(Stopping())) as (address, _):
        answer = answer_to(address, *asked, body=json.dumps(HELLO))
    assert answer.startswith(f"HTTP/1.1 {status} ") and says in answer


def test_who_asks_by_another_name_is_told_the_right_ones():
    with listening(ScriptedWorker()) as (address, _):
        answer = answer_to(address, "GET /health HTTP/1.1", "Host: evil.example")
    assert "does not answer to the name 'evil.example'" in answer
    assert "it answers to localhost, 127.0.0.1, [::1]. To answer to any name" in answer


def test_a_slash_at_the_end_of_an_address_changes_nothing():
    """A client that is sent elsewhere by a URL leaves a proxy with TLS."""
    with listening(ScriptedWorker(Stopping())) as (address, _):
        assert ask(address, HELLO, f"{CHAT}/")[0] == 503
        assert b"200 OK" in connect(
            address, b"GET /health/ HTTP/1.0\r\nHost: localhost\r\n\r\n"
        ).recv(99)
        assert "There is no /v1/chat here; " in ask(address, {}, "/v1/chat//")[1]


@pytest.mark.parametrize(("origin", "status"), [("allowed", 200), ("other", 400)])
def test_a_page_of_the_internet_may_ask_if_it_was_allowed(origin, status):
    """Browsers ask beforehand whether a page from there may reach this machine."""
    asked = (
        *(f"OPTIONS {CHAT} HTTP/1.1", "Host: localhost", f"Origin: https://{origin}.example"),
        *("Access-Control-Request-Method: POST", "Access-Control-Request-Private-Network: true"),
    )
    rules = Rules(LOOPBACK_NAMES, ("https://allowed.example",))
    with listening(ScriptedWorker(), rules=rules) as (address, _):
        answer = answer_to(address, *asked).lower()
    is_allowed = status == 200
    assert answer.startswith(f"http/1.1 {status} ")
    assert ("access-control-allow-origin: https://allowed.example" in answer) == is_allowed
    assert "access-control-allow-private-network: true" in answer or not is_allowed


def test_a_page_may_read_when_to_ask_again():
    asked = ("GET /health HTTP/1.1", "Host: localhost", "Origin: https://allowed.example")
    rules = Rules(LOOPBACK_NAMES, ("https://allowed.example",))
    with listening(ScriptedWorker(), rules=rules) as (address, _):
        answer = answer_to(address, *asked).lower()
    assert "access-control-expose-headers: retry-after" in answer


# --- addresses


def test_addresses_that_cannot_be_listened_on():
    with listener.bind("127.0.0.1", 0) as bound:
        port = bound.getsockname()[1]
        assert listener.url_of(bound) == f"http://127.0.0.1:{port}" and listener.is_loopback(bound)
        with pytest.raises(errors.InputError, match=f"127.0.0.1:{port} cannot .* --port"):
            listener.bind("127.0.0.1", port)
    for host in ("no such host", "", "a" * 70, "203.0.113.1"):  # the last one is nobody's
        with pytest.raises(errors.InputError, match="is not an address of this machine; allowed"):
            listener.bind(host, 0)
    with listener.bind("0.0.0.0", 0) as bound:
        assert not listener.is_loopback(bound)


ALL = (
    "/v1/chat/completions, /v1/completions, /v1/responses, /v1/models, /v1/messages, "
    "/v1/messages/count_tokens"
)


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("/chat/completions", "; /v1/chat/completions is"),
        ("//v1/chat/completions", "; /v1/chat/completions is"),
        ("/v1/v1/messages", "; /v1/messages is"),
        ("/messages/count_tokens", "; /v1/messages/count_tokens is"),
        ("/models", "; /v1/models is"),
        *((path, f"; there are {ALL}") for path in ("/v1/embeddings", "/v1", "/", "/chat")),
    ],
)
def test_an_address_without_v1_is_told_the_right_one(path, meant):
    with listening(ScriptedWorker()) as (address, _):
        status, text = ask(address, {}, path)
    reason = json.loads(text)["error"]["message"]
    assert status == 404 and reason == f"There is no {path} here{meant}."

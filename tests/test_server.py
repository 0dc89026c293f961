"""`ebbtide serve` with the built-in model, as its clients see it: real processes, real sockets.

One server answers most tests: what one of them leaves behind must not disturb the next.
"""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest
from server_process import KEY, PATIENCE_S, Stream, chat_body, serving

import ebbtide
from ebbtide import LLM

STORY = ebbtide.demo_material()["story"]
BUDGET_BYTES = 420 << 20
CHAT = "/v1/chat/completions"
LONG = {"max_tokens": 20000}  # a quarter of a minute of writing


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    home = tmp_path_factory.mktemp("serve")
    args = ["--host-memory", f"{BUDGET_BYTES}B", "--queue", "1", "--max-body", "128KiB"]
    with serving(home, *args, "--cors-origin", "http://chat.example") as served:
        yield served


@pytest.fixture(scope="module")
def text() -> str:
    """Enough to be kept, and a second or more of reading."""
    return Path(STORY).read_text()[:11000]


def question(text: str) -> list[dict]:
    return [{"role": "user", "content": f"{text}\n\nWho owns the Leeds mill?"}]


@pytest.fixture(scope="module")
def answers(text):
    """What the model says by itself, without a server and without kept pages: to the question, and
    to the next one of the same conversation."""
    with LLM.open(None) as llm:
        first = question(text)
        said = llm.chat(first, max_new_tokens=24, temperature=0).text
        second = [*first, {"role": "assistant", "content": said}, *question("Once more:")]
        return first, said, second, llm.chat(second, max_new_tokens=24, temperature=0).text


def message(found: dict) -> str:
    return found["choices"][0]["message"]["content"]


def cached(found: dict) -> int:
    return found["usage"]["prompt_tokens_details"]["cached_tokens"]


# --- answers


def test_a_conversation_is_answered_and_only_what_is_new_is_read(server, answers):
    first, said, second, then = answers
    found = server.chat(first)
    assert (message(found), found["object"], found["model"]) == (
        said,
        "chat.completion",
        "ebb-nano",
    )
    assert found["choices"][0]["finish_reason"] in ("stop", "length")
    again = server.chat(second)
    assert message(again) == then
    # The question and what was answered to it are there: nothing of them is read again.
    assert found["usage"]["total_tokens"] - 2 <= cached(again) < again["usage"]["prompt_tokens"]


def test_a_stream_says_the_same_piece_by_piece(server, answers):
    first, said, *_ = answers
    server.chat(first)  # whatever was asked before, its pages are there now
    *chunks, last = server.stream(first, stream_options={"include_usage": True})
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    pieces = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert "".join(pieces) == said and len(pieces) > 3
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in [*chunks, last]}) == 1
    assert [c["choices"][0]["finish_reason"] for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1]["choices"][0]["finish_reason"] in ("stop", "length")
    usage = last["usage"]
    assert last["choices"] == [] and usage["prompt_tokens_details"]["cached_tokens"] > 0
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_the_responses_api_says_the_same(server, answers):
    first, said, second, then = answers
    asked = {"temperature": 0, "max_output_tokens": 24, "store": False}
    status, found = server.ask("/v1/responses", {**asked, "input": first})
    assert status == 200 and found["output"][0]["content"][0]["text"] == said
    # As it was answered, and then the next question.
    items = [*first, *found["output"], second[-1]]
    connection, response = server.send("/v1/responses", {**asked, "input": items, "stream": True})
    events = [*Stream(connection, response)]
    assert "".join(event.get("delta", "") for event in events) == then
    usage = events[-1]["response"]["usage"]
    held = found["usage"]["total_tokens"]
    assert held - 2 <= usage["input_tokens_details"]["cached_tokens"] < usage["input_tokens"]
    status, counted = server.ask("/v1/responses/input_tokens", {"input": items})
    assert counted == {"object": "response.input_tokens", "input_tokens": usage["input_tokens"]}


def test_the_messages_api_says_the_same(server, answers):
    first, said, second, then = answers
    key = {"authorization": None, "x_api_key": KEY}
    asked = {"temperature": 0, "max_tokens": 24}
    status, found = server.ask("/v1/messages?beta=true", {**asked, "messages": first}, **key)
    assert status == 200 and found["content"] == [{"type": "text", "text": said}]
    again = [*first, {"role": "assistant", "content": found["content"]}, second[-1]]
    connection, response = server.send(
        "/v1/messages", {**asked, "messages": again, "stream": True}, **key
    )
    events = [*Stream(connection, response)]
    texts = [
        event["delta"].get("text", "") for event in events if "index" in event and "delta" in event
    ]
    assert "".join(texts) == then
    used = events[-2]["usage"]
    asked_tokens = used["input_tokens"] + used["cache_read_input_tokens"]
    held = sum(found["usage"].values())
    assert held - 2 <= used["cache_read_input_tokens"] < asked_tokens
    counting = {"messages": again, "max_tokens": 24}
    assert server.ask("/v1/messages/count_tokens", counting, **key) == (
        200,
        {"input_tokens": asked_tokens},
    )
    status, refused = server.ask(
        "/v1/messages", {**asked, "messages": first}, x_api_key="wrong", authorization=None
    )
    assert (status, refused["error"]["type"]) == (401, "authentication_error")


def test_tokens_are_counted_while_an_answer_is_written(server):
    cancelled, answered = (
        server.count(f"requests_{name}_total") for name in ("cancelled", "answered")
    )
    stream = server.stream("Say something.", **LONG)
    next(iter(stream))
    assert server.ask("/tokenize", {"content": "a"})[0] == 200
    assert server.count("requests_answered_total") == answered
    stream.hang_up()
    wait_until_cancelled(server, cancelled)


def test_text_is_continued_as_the_model_alone_does(server):
    asked = {"prompt": "Once upon a time", "max_tokens": 8, "temperature": 0}
    status, found = server.ask("/v1/completions", asked)
    with LLM.open(None) as llm:
        alone = llm.generate("Once upon a time", max_new_tokens=8, temperature=0)
        ids = llm.encode("Once upon a time")
    assert (status, found["object"]) == (200, "text_completion")
    assert found["choices"][0]["text"] == alone.text
    status, by_ids = server.ask("/v1/completions", {**asked, "prompt": ids})
    assert by_ids["choices"][0]["text"] == alone.text


def test_settings_of_an_answer_reach_the_model(server):
    cut = server.chat("Say something.", max_tokens=None, max_completion_tokens=3)
    assert cut["usage"]["completion_tokens"] == 3
    assert cut["choices"][0]["finish_reason"] == "length"
    sampled = {"temperature": 1.5, "top_k": 50, "seed": 7}
    one, same = (message(server.chat("Say something.", **sampled)) for _ in range(2))
    other = message(server.chat("Say something.", **{**sampled, "seed": 8}))
    assert one == same != other


def test_log_probabilities_are_the_models_own(server):
    asked = {"temperature": 1.2, "seed": 5, "max_tokens": 8, "presence_penalty": 1.5}
    said = {"logprobs": True, "top_logprobs": 2, **asked}
    (choice,) = server.chat("Say something.", **said)["choices"]
    tokens = choice["logprobs"]["content"]
    written = b"".join(bytes(token["bytes"]) for token in tokens)
    assert written.decode() == choice["message"]["content"] != ""
    streamed = [c["choices"][0].get("logprobs") for c in server.stream("Say something.", **said)]
    # The prompt was decoded before, perhaps, and is read now: to the last bits of float32.
    again = [token for told in streamed if told for token in told["content"]]
    assert [t["token"] for t in again] == [t["token"] for t in tokens]
    status, found = server.ask(
        "/v1/completions", {"prompt": "Once upon a time", "logprobs": 3, **asked}
    )
    (plain,) = found["choices"]
    assert status == 200 and "".join(plain["logprobs"]["tokens"]) == plain["text"]
    assert found["usage"]["completion_tokens"] == 8
    with LLM.open(None) as llm:
        prompt = llm.encode("Once upon a time")
        alone = llm.generate(
            prompt, temperature=1.2, seed=5, max_new_tokens=8, presence_penalty=1.5
        )
        scores = llm.score([*prompt, *alone.token_ids], prefill_tokens=len(prompt), last=8)
    assert plain["text"] == alone.text
    # Rounded otherwise where a kept prompt is not read again.
    assert plain["logprobs"]["token_logprobs"] == pytest.approx(scores.tolist(), abs=1e-3)
    assert all(len(top) in (3, 4) for top in plain["logprobs"]["top_logprobs"])


def test_a_response_format_is_kept_to(server):
    schema = {"type": "array", "items": {"type": "integer", "maximum": 99}, "maxItems": 4}
    asked = {"type": "json_schema", "json_schema": {"name": "numbers", "schema": schema}}
    found = server.chat("Say something.", response_format=asked, temperature=1.5, seed=3)
    numbers = json.loads(message(found))
    assert found["choices"][0]["finish_reason"] == "stop"
    assert isinstance(numbers, list) and all(type(n) is int and n <= 99 for n in numbers)
    chunks = server.stream("Say something.", response_format=asked, temperature=1.5, seed=3)
    pieces = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert "".join(pieces) == message(found)
    status, refused = server.ask(CHAT, chat_body("Hi", response_format=impossible()))
    assert status == 400 and "look-around" in refused["error"]["message"]


def impossible() -> dict:
    schema = {"type": "string", "pattern": "(?=a)b"}
    return {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}


def test_a_model_that_knows_no_tools_says_so(server):
    tool = {"type": "function", "function": {"name": "clock"}}
    status, refused = server.ask(CHAT, chat_body("What time is it?", tools=[tool]))
    assert status == 400 and "knows no tools" in refused["error"]["message"]


def test_two_clients_at_once_are_answered_in_turn(server, answers):
    first, said, *_ = answers
    found = {}

    def ask(name, messages):
        found[name] = server.chat(messages)

    threads = [
        threading.Thread(target=ask, args=("long", first)),
        threading.Thread(target=ask, args=("short", "Say something.")),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert message(found["long"]) == said
    assert message(found["short"]) == message(server.chat("Say something."))


def test_tokens_can_be_counted_before_they_are_sent(server):
    with LLM.open(None) as llm:
        ids = llm.encode("Once upon a time", begins=False)
        prompt = llm.tokenizer.chat_text([{"role": "user", "content": "Hello"}])
    assert server.ask("/tokenize", {"content": "Once upon a time"}) == (200, {"tokens": ids})
    text = {"content": "Once upon a time", "prompt": "Once upon a time"}
    assert server.ask("/detokenize", {"tokens": ids}) == (200, text)
    # As vLLM has it.
    _, found = server.ask("/tokenize", {"model": "ebb-nano", "prompt": "Once upon a time"})
    assert found == {"tokens": ids, "count": len(ids), "max_model_len": server.said["context"]}
    asked = {"messages": [{"role": "user", "content": "Hello"}]}
    assert server.ask("/apply-template", asked) == (200, {"prompt": prompt})
    assert server.ask("/apply-template", {**asked, "model": "ebb-nano"})[0] == 200
    assert server.ask("/apply-template", {**asked, "model": "other"})[0] == 404
    _, found = server.ask("/tokenize", asked)
    assert found["count"] == server.chat("Hello")["usage"]["prompt_tokens"]
    status, found = server.ask("/tokenize", {"content": "x " * 60_000})
    assert status == 400 and found["error"]["code"] == "context_length_exceeded"
    for path, wrong in [
        ("tokenize", {"content": 1}),
        ("tokenize", {"text": "x"}),
        ("tokenize", {"prompt": "x", "content": "y"}),
        ("tokenize", {"messages": []}),
        ("detokenize", {"tokens": [-1]}),
        ("detokenize", {"tokens": "x"}),
        ("apply-template", {"messages": []}),
    ]:
        assert server.ask(f"/{path}", wrong)[0] == 400


def test_what_a_request_takes_is_told_before_it_is_made(server):
    asked = chat_body("What would this take?")
    _, before = server.ask("/v1/estimate", asked)
    assert before["object"] == "estimate" and before["fits"] and before["model_loaded"]
    assert before["context_length"] == server.said["context"]
    found = server.chat(asked["messages"])
    assert found["usage"]["prompt_tokens"] == before["prompt_tokens"]
    assert cached(found) == before["cached_tokens"] and before["max_completion_tokens"] == 24
    _, again = server.ask("/v1/estimate", asked)
    assert server.chat(asked["messages"])["usage"]["prompt_tokens_details"] == {
        "cached_tokens": again["cached_tokens"]
    }
    assert again["cached_tokens"] > before["cached_tokens"]
    assert again["prefill_s"] == 0  # all of it is there
    text = {"prompt": "Once upon a time", "max_tokens": 10**6}
    _, plain = server.ask("/v1/estimate", text)
    assert plain["prefill_s"] > 0 and plain["decode_s_per_token"] > 0
    assert plain["max_completion_tokens"] == server.said["context"] - plain["prompt_tokens"]
    status, long = server.ask("/v1/estimate", chat_body("x " * 60_000))
    assert status == 200 and not long["fits"] and long["max_completion_tokens"] == 0
    assert long["prompt_tokens"] > server.said["context"]
    status, refused = server.ask("/v1/estimate", {"messages": []})
    assert status == 400 and "at least one message" in refused["error"]["message"]
    function = {"type": "function", "function": {"name": "f"}}
    for more in ({"logit_bias": {"99999": 1}}, {"tools": [function]}):  # as the answer would be
        wrong = {**asked, **more}
        status, refused = server.ask("/v1/estimate", wrong)
        assert (status, refused) == server.ask("/v1/chat/completions", wrong) and status == 400


# --- clients that go away, and those that wait


def wait_until_cancelled(server, before: int) -> None:
    for _ in range(1000):
        if server.count("requests_cancelled_total") > before:
            return
    raise AssertionError("the request went on")


def test_who_hangs_up_while_the_prompt_is_read_stops_the_reading(server, text):
    asked = question(" ".join(reversed(text.split())))  # read by nobody before
    before = server.count("requests_cancelled_total")
    stream = server.stream(asked, return_progress=True)
    told = next(c["prompt_progress"] for c in stream if "prompt_progress" in c)
    stream.hang_up()
    wait_until_cancelled(server, before)
    assert told["cache"] < 5 < told["processed"] < told["total"]
    # Whoever asks the same goes on from there, and gets what an undisturbed reading gives.
    found = server.chat(asked)
    assert told["processed"] <= cached(found) < told["total"]
    with LLM.open(None) as llm:
        assert message(found) == llm.chat(asked, max_new_tokens=24, temperature=0).text


def test_who_hangs_up_in_the_middle_of_an_answer_stops_it(server):
    before, written = (
        server.count(f"{name}_total") for name in ("requests_cancelled", "completion_tokens")
    )
    stream = server.stream("Say something.", **LONG)
    for number, _ in enumerate(stream):
        if number == 5:
            break
    stream.hang_up()
    wait_until_cancelled(server, before)
    server.chat("Say something.", max_tokens=2)
    assert server.count("completion_tokens_total") == written + 2


def test_a_full_queue_is_said_and_who_waits_in_vain_gives_up_its_place(server):
    running = server.stream("Say something.", **LONG)
    next(iter(running))
    waiting = threading.Thread(target=server.chat, args=("And this?",))
    waiting.start()
    while not server.count("requests_waiting"):
        assert waiting.is_alive()
    connection, response = server.send(
        "/v1/chat/completions", {"messages": [{"role": "user", "content": "No room"}]}
    )
    assert response.status == 503 and response.getheader("retry-after")
    assert b"--queue" in response.read()
    connection.close()
    running.hang_up()
    waiting.join(PATIENCE_S)
    assert not waiting.is_alive()


# --- refusals


@pytest.mark.parametrize(
    ("body", "status", "code", "says"),
    [
        ({"colour": "red"}, 400, None, "'colour' is not a field that Ebbtide knows"),
        ({"\ud800": 1}, 400, None, "is not a field that Ebbtide knows"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, None, "not valid Unicode"),
        ({"tools": [{"type": "function"}]}, 400, None, "tools[0] must be"),
        ({"temperature": "hot"}, 400, None, "temperature must be"),
        ({"model": "gpt-4o"}, 404, "model_not_found", "'ebb-nano' is served"),
        ({"messages": [{"role": "user", "content": "x " * 60_000}]}, 400, *(
            "context_length_exceeded", "the context holds"
        )),
    ],
)  # fmt: skip
def test_a_wrong_request_is_refused_in_a_sentence(server, body, status, code, says):
    for stream in (False, True):
        asked = {"messages": [{"role": "user", "content": "x"}], **body, "stream": stream}
        found = server.ask("/v1/chat/completions", asked)
        assert found[0] == status
        assert found[1]["error"]["code"] == code and says in found[1]["error"]["message"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"authorization": None}, 401),
        ({"authorization": "Bearer wrong"}, 401),
        ({"authorization": f"Basic {KEY}"}, 401),
        ({"host": "evil.example"}, 403),
        ({"host": "localhost:8080"}, 200),
        ({"host": "[::1]:8080"}, 200),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://chat.example"}, 200),
    ],
)
def test_who_may_ask(server, headers, status):
    found = server.ask("/v1/models", **headers)
    assert found[0] == status
    assert (status == 200) == ("data" in found[1])


def test_a_page_that_may_ask_is_told_so_and_no_other(server):
    asking = {"access_control_request_method": "POST", "authorization": None}
    for origin, allowed in (("http://chat.example",) * 2, ("http://evil.example", None)):
        connection, response = server.send(
            "/v1/chat/completions", method="OPTIONS", origin=origin, **asking
        )
        assert response.getheader("access-control-allow-origin") == allowed
        assert (response.status == 200) == (allowed is not None)
        connection.close()


def test_what_is_no_request_is_refused(server):
    assert server.ask("/health", authorization=None) == (200, {"status": "ok"})
    assert server.ask("/v1/embeddings")[0] == 404
    assert server.ask("/v1/chat/completions")[0] == 405
    chat = "/v1/chat/completions"
    assert server.ask(chat, b"{", content_type="application/json")[0] == 400
    assert server.ask(chat, {"messages": []}, content_type="text/plain")[0] == 415
    status, found = server.ask(chat, b" " * (129 << 10))
    assert status == 413 and "--max-body" in found["error"]["message"]


def test_the_model_is_told_with_its_context(server):
    _, found = server.ask("/v1/models")
    (model,) = found["data"]
    assert model["id"] == "ebb-nano" and model["context_length"] == server.said["context"]
    assert model["max_model_len"] == model["context_length"]
    assert server.ask("/v1/models/ebb-nano") == (200, model)
    assert server.ask("/v1/models/other")[0] == 404


def test_all_of_it_stayed_within_the_budget(server):
    """Runs after the others of this file: whatever they asked is in the peak."""
    status = Path(f"/proc/{server.process.pid}/status")
    if not status.exists():
        pytest.skip("no /proc here")
    peak = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
    assert int(peak.split()[1]) * 1024 <= BUDGET_BYTES


# --- the process


def test_another_process_finds_what_was_read(server, answers):
    first, said, *_ = answers
    server.chat(first)
    # The folder of the server that runs: its pages are there while it does.
    with serving(server.home) as another:
        again = another.chat(first)
        assert message(again) == said
        assert cached(again) > 0.9 * again["usage"]["prompt_tokens"]


def test_who_is_not_asked_gives_the_memory_back_and_answers_as_before(tmp_path, answers):
    first, said, *_ = answers
    with serving(tmp_path, "--unload-after", "1s") as server:
        assert message(server.chat(first)) == said
        until = time.monotonic() + PATIENCE_S
        while server.count("unloads_total") == 0 and time.monotonic() < until:
            time.sleep(0.1)
        assert server.count("model_loaded") == 0
        status, found = server.ask("/tokenize", {"content": "one two"})  # needs no weights
        assert status == 200 and len(found["tokens"]) > 1 and server.count("model_loaded") == 0
        again = server.chat(first)
        assert message(again) == said
        assert cached(again) > 0.9 * again["usage"]["prompt_tokens"]

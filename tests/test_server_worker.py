"""The thread that answers, with models whose tokens are scripted: events, thoughts, failures."""

from __future__ import annotations

import asyncio
import json

import pytest
from random_checkpoints import make
from scripted_harmony import FINAL, THINKS, ids_of
from sessions_under_test import assert_nothing_is_held
from small_llm import open_small
from tool_templates import TOOLS, call_text, with_tools
from tool_templates import ids_of as ids_with_tools

from ebbtide import Output, Piece, Progress, errors
from ebbtide.cli.options import Settings
from ebbtide.cli.run import Run
from ebbtide.cli.server import worker as worker_module
from ebbtide.cli.server.anthropic_answer import AnthropicAnswer
from ebbtide.cli.server.anthropic_request import anthropic_request
from ebbtide.cli.server.bad_request import BadRequest
from ebbtide.cli.server.job import HungUp, Job, Started
from ebbtide.cli.server.request import chat_request, completion_request
from ebbtide.cli.server.response import CompletionAnswer
from ebbtide.cli.server.responses_answer import ResponsesAnswer
from ebbtide.cli.server.responses_request import responses_request
from ebbtide.cli.server.text_query import TextQuery, count_query, detokenize_query, tokenize_query
from ebbtide.cli.server.worker import Worker
from ebbtide.cli.signals import Signals


def chat(text: str = "Hello", **fields):
    return chat_request({"messages": [{"role": "user", "content": text}], **fields})


@pytest.fixture
def worker(scripted_llm):
    return Worker(Run(Settings(quiet=True), Signals()), scripted_llm, most_waiting=1)


def events_of(worker, request, on_job=lambda job: None) -> list:
    """All that is put for one request."""

    async def collect():
        job = Job(request)
        on_job(job)
        worker.answer(job)
        await asyncio.sleep(0)  # what was put is there
        return [job.events.get_nowait() for _ in range(job.events.qsize())]

    return asyncio.run(collect())


HELLO = {"role": "user", "content": "Hello"}
RESULT = "rain"


def chat_again(tools, *answers):
    """A request, or the next one, with the answer to it and what its calls gave."""
    found = [HELLO]
    for answer in answers:
        message = answer["choices"][0]["message"]
        results = [
            {"role": "tool", "tool_call_id": call["id"], "content": RESULT}
            for call in message["tool_calls"]
        ]
        found += [message, *results]
    return chat_request({"messages": found, "tools": tools, "max_tokens": 900})


def responses_again(tools, *answers):
    found = [HELLO]
    for answer in answers:
        items = answer["output"]
        calls = [item["call_id"] for item in items if item["type"] == "function_call"]
        kind = "function_call_output"
        found += [*items, *({"type": kind, "call_id": id, "output": RESULT} for id in calls)]
    tools = [{"type": "function", **tool["function"]} for tool in tools]
    return responses_request({"input": found, "tools": tools, "max_output_tokens": 900})


def anthropic_again(tools, *answers):
    found = [HELLO]
    for answer in answers:
        calls = [block["id"] for block in answer["content"] if block["type"] == "tool_use"]
        results = [{"type": "tool_result", "tool_use_id": id, "content": RESULT} for id in calls]
        said = {"role": "assistant", "content": answer["content"]}
        found += [said, {"role": "user", "content": results}]
    tools = [
        {"name": tool["name"], "description": tool["description"], "input_schema": schema}
        for tool in (tool["function"] for tool in tools)
        for schema in [tool["parameters"]]
    ]
    return anthropic_request({"messages": found, "tools": tools, "max_tokens": 900})


@pytest.mark.parametrize(
    ("ask", "told", "cached"),
    [
        (chat_again, CompletionAnswer, ("prompt_tokens_details", "cached_tokens")),
        (responses_again, ResponsesAnswer, ("input_tokens_details", "cached_tokens")),
        (anthropic_again, AnthropicAnswer, ("cache_read_input_tokens",)),
    ],
)
def test_calls_are_made_and_their_results_answered(script, tmp_path, ask, told, cached):
    """A conversation with a call, as a client sends it again: its beginning is not read again."""

    def answer(sampled, *before):
        script.extend(ids_with_tools(llm.tokenizer, f"{sampled}<|im_end|>"))
        request = ask(TOOLS, *before)
        found, answer = events_of(worker, request), told(request, "m")
        for piece in found:
            if isinstance(piece, Piece):
                answer.note(piece)
        return found[-1], json.loads(json.dumps(answer.whole(found[-1])))

    folder = with_tools(make("llama2", tmp_path / "model"), "hermes")
    with open_small(folder, tmp_path, draft=False) as llm:
        llm._context = 3000
        worker = Worker(Run(Settings(quiet=True), Signals()), llm, most_waiting=1)
        output, first = answer(call_text(llm.tokenizer))
        assert output.finish_reason == "tool_calls"
        again, second = answer("A coat.", first)
        assert again.text == "A coat."
        number = second["usage"]
        for name in cached:
            number = number[name]
        assert number == output.usage["total_tokens"] - 1
        # Every protocol tells the model the same.
        assert ask(TOOLS, first).prompt == chat_again(TOOLS, as_chat(output)).prompt


def as_chat(output) -> dict:
    return CompletionAnswer(chat(), "m").whole(output)


def test_long_tools_are_refused_before_they_are_encoded_whole(worker):
    told = {"name": "f", "description": "words " * 3000}
    request = chat(tools=[{"type": "function", "function": told}])
    (error,) = events_of(worker, request)
    assert isinstance(error, errors.ContextOverflow)


def test_what_a_template_may_leave_out_is_no_reason_to_refuse(worker, script):
    """Thoughts of earlier answers, fields of tools that no model is told of, and the signs by which
    JSON writes letters beyond ASCII."""
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    call["function"]["arguments"] = json.dumps({"a": "д" * 800})
    thinking = {"role": "assistant", "content": "", "reasoning_content": "thought " * 2300}
    messages = [
        HELLO,
        {**thinking, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
        {"role": "assistant", "content": "<think>" + "so " * 2300 + "</think>Yes."},
        HELLO,
    ]
    told = {"name": "f", "description": "д" * 800, "returns": {"description": "x" * 18000}}
    tools = [{"type": "function", "function": told}]
    prompt = chat_request({"messages": messages, "tools": tools}).prompt
    worker._refuse_too_long(prompt, tools)
    told["description"] = "д" * 8000
    with pytest.raises(errors.ContextOverflow, match="has at least"):
        worker._refuse_too_long(prompt, tools)


def test_an_answer_is_started_pieces_and_an_output(worker, script, scripted_tokenizer):
    script += ids_of(scripted_tokenizer, f"{THINKS}{FINAL}Yes.<|return|>")
    request = chat(max_tokens=40)
    found = events_of(worker, request)
    (started,) = [event for event in found if isinstance(event, Started)]
    pieces = [event for event in found if isinstance(event, Piece)]
    output = found[-1]
    assert isinstance(output, Output) and found.index(started) < found.index(pieces[0])
    assert started == (output.usage["prompt_tokens"], 0)
    assert "".join(piece.text for piece in pieces) == output.text == "Yes."
    message = CompletionAnswer(request, "m").whole(output)["choices"][0]["message"]
    assert (message["content"], message["reasoning_content"]) == ("Yes.", "hm")
    sent = b"".join(map(CompletionAnswer(request, "m").piece, pieces))
    assert sent.count(b'"reasoning_content": ') == len("hm")  # a letter is a token of this model
    assert worker.counts["completion_tokens"] == output.usage["completion_tokens"]


def test_a_prompt_that_is_only_read_is_found_by_the_next_request(
    worker, script, scripted_tokenizer
):
    asked = {"messages": [{"role": "user", "content": "Hello"}]}
    request = anthropic_request({**asked, "max_tokens": 0})
    found = events_of(worker, request)
    (started,), output = [event for event in found if isinstance(event, Started)], found[-1]
    assert not any(isinstance(event, Piece) for event in found)
    assert started == (output.usage["prompt_tokens"], 0) and output.token_ids == []
    told = AnthropicAnswer(request, "m").whole(output)
    assert (told["content"], told["stop_reason"]) == ([], "max_tokens")
    assert worker.counts["requests_read"] == 1 and worker.counts["requests_answered"] == 0
    assert worker.counts["prompt_tokens"] == output.usage["prompt_tokens"]
    assert worker.counts["prefill_seconds"] > 0

    script += ids_of(scripted_tokenizer, f"{FINAL}Yes.<|return|>")
    found = events_of(worker, anthropic_request({**asked, "max_tokens": 40}))[-1]
    assert found.text == "Yes."
    assert found.usage["prompt_tokens_details"]["cached_tokens"] == output.usage["prompt_tokens"]


def test_settings_of_the_command_line_hold_where_a_request_has_none(worker, script):
    worker._run.settings = Settings(max_new_tokens=2)
    script += [5] * 20
    assert len(events_of(worker, chat())[-1].token_ids) == 2
    assert len(events_of(worker, chat(max_tokens=3))[-1].token_ids) == 3


def test_a_wrong_request_leaves_the_conversation_where_it_was(worker, script):
    script += [5] * 8
    events_of(worker, chat(max_tokens=4))
    held = worker.session.tokens
    overlong = chat("x " * 5000)
    assert [type(e) for e in events_of(worker, overlong)] == [errors.ContextOverflow]
    beyond = completion_request({"prompt": [10**6]})
    assert [type(e) for e in events_of(worker, beyond)] == [errors.InputError]
    ids = [5] * (worker.context + 1)
    for many in (completion_request({"prompt": ids}), detokenize_query({"tokens": ids})):
        assert [type(e) for e in events_of(worker, many)] == [errors.ContextOverflow]
    assert worker.session.tokens == held and worker.counts["requests_refused"] == 4


@pytest.mark.parametrize("error", [errors.StorageError("the disk is full"), KeyError("a bug")])
def test_after_a_failure_nothing_is_trusted_and_the_next_is_answered(
    worker, script, scripted_llm, error
):
    script += [5, error, 5, 5]
    found = events_of(worker, chat(max_tokens=2))
    assert found[-1] is error and isinstance(found[-2], Piece)
    assert_nothing_is_held(scripted_llm)
    assert isinstance(events_of(worker, chat(max_tokens=2))[-1], Output)


def test_the_next_one_is_not_to_blame_for_what_a_failure_left(
    worker, script, scripted_llm, monkeypatch
):
    script += [5, KeyError("a bug")]
    events_of(worker, chat(max_tokens=2))
    full = errors.DoesNotFit("no room on disk", tier="disk", needed_bytes=2, available_bytes=1)
    open_session = scripted_llm.session

    def fails():
        raise full

    monkeypatch.setattr(scripted_llm, "session", fails)
    (found,) = events_of(worker, chat(max_tokens=2))
    assert isinstance(found, errors.StorageError) and str(found) == str(full)
    monkeypatch.setattr(scripted_llm, "session", open_session)
    script += [5, 5]
    found = events_of(worker, chat(max_tokens=2))
    # What it reads is told as ever, though the session was opened for it.
    assert isinstance(found[-1], Output) and any(isinstance(e, Progress) for e in found)


def test_who_has_its_answer_may_ask_again_at_once(worker, script):
    script += [5] * 2
    worker._most_waiting = 0

    def asks_again(job):
        worker._answering = job
        put = job.put

        def put_and_ask(event):
            put(event)
            if isinstance(event, Output):
                worker.submit(chat())

        job.put = put_and_ask

    events_of(worker, chat(max_tokens=2), asks_again)
    assert worker.num_waiting == 1


def test_who_has_hung_up_is_not_answered_any_further(worker, script):
    script += [5] * 8

    def hang_up_at_once(job):
        job.has_hung_up = True

    assert [type(e) for e in events_of(worker, chat(), hang_up_at_once)] == [HungUp]

    def hang_up_later(job):
        put = job.put

        def put_and_go(event):
            job.has_hung_up = isinstance(event, Piece)
            put(event)

        job.put = put_and_go

    found = events_of(worker, chat(max_tokens=8), hang_up_later)
    assert [type(e) for e in found if not hasattr(e, "phase")] == [Started, Piece, HungUp]
    assert len(script) == 7
    found = events_of(worker, chat(max_tokens=2))
    assert isinstance(found[-1], Output) and worker.counts["requests_cancelled"] == 2


@pytest.fixture
def clock(monkeypatch):
    """Of the worker: a second later each time that it is looked at, and `add(seconds)`."""

    class Clock:
        now_s = 0.0

        def add(self, seconds: float) -> None:
            self.now_s += seconds

        def monotonic(self) -> float:
            self.now_s += 1.0
            return self.now_s

    found = Clock()
    monkeypatch.setattr(worker_module, "time", found)
    return found


def test_many_questions_to_the_tokenizer_leave_an_answer_half_of_the_time(worker, script, clock):
    script += [5] * 40
    worker._most_waiting, told = 40, []
    slow = TextQuery("Once", lambda *_: clock.add(10) or {})

    def asks_much(job):
        put = job.put

        def put_and_ask(event):
            put(event)
            told.append(event)
            if isinstance(event, Started):
                for _ in range(30):
                    worker.submit(slow).put = told.append

        job.put = put_and_ask

    events_of(worker, chat(max_tokens=40), asks_much)
    told = [type(event) for event in told if not isinstance(event, Progress)]
    first = told.index(dict)
    again = told.index(dict, first + 1)
    # A token takes a second of this clock, a question eleven.
    assert again - first >= 10 and told.count(Piece) == 40 and told[-1] is Output


def test_log_probabilities_are_not_interrupted_since_they_lie_where_a_text_is_encoded(
    worker, script
):
    script += [5] * 2

    def asks_meanwhile(job):
        put = job.put

        def put_and_ask(event):
            put(event)
            if isinstance(event, Started):
                worker.submit(tokenize_query({"content": "Once"}))

        job.put = put_and_ask

    events_of(worker, chat(max_tokens=2, logprobs=True), asks_meanwhile)
    assert worker.num_waiting == 1


def test_what_the_tokenizer_is_asked_waits_for_no_answer(worker, script, clock):
    script += [5] * 4
    text, told = "Once upon a time", []
    queries = [detokenize_query({"tokens": [-1]}), tokenize_query({"content": text})]

    def asks_meanwhile(job):
        put = job.put

        def put_and_ask(event):
            put(event)
            told.append(event)
            if isinstance(event, Piece) and queries:
                worker.submit(queries.pop()).put = told.append

        job.put = put_and_ask

    events_of(worker, chat(max_tokens=4), asks_meanwhile)
    told = [event for event in told if not isinstance(event, Progress)]
    # Each before the next token; what is wrong with one harms no other.
    kinds = [Started, Piece, dict, Piece, errors.InputError, Piece, Piece, Output]
    assert [type(event) for event in told] == kinds
    assert worker._llm.tokenizer.decode(told[2]["tokens"]) == text


def test_arguments_that_are_too_deep_are_the_requests_fault(worker):
    before = worker.session
    call = {"type": "tool_use", "id": "c1", "name": "f", "input": json.loads("[" * 600 + "]" * 600)}
    call["input"] = {"a": call["input"]}
    asked = [HELLO, {"role": "assistant", "content": [call]}, HELLO]
    (error,) = events_of(worker, anthropic_request({"messages": asked}))
    assert isinstance(error, errors.InputError) and worker.session is before


@pytest.mark.parametrize("settings", [{}, {"think": "high"}])
def test_as_many_tokens_are_counted_as_are_read(worker, script, settings):
    script += [5]
    worker._run.settings = Settings(**settings)
    request = anthropic_request({"messages": [HELLO], "system": "Be brief.", "max_tokens": 1})
    (counted,) = events_of(worker, count_query(request))
    assert counted == {"input_tokens": events_of(worker, request)[-1].usage["prompt_tokens"]}


def test_as_many_wait_as_may(worker):
    async def submit():
        jobs = [worker.submit(chat()) for _ in range(2)]  # one is to be answered, one may wait
        with pytest.raises(BadRequest, match="--queue"):
            worker.submit(chat())
        worker.hang_up(jobs[0])
        worker.submit(chat())

    asyncio.run(submit())


def test_counts_of_tokens_take_no_place_of_requests_and_are_bounded_themselves(worker):
    def count():
        return tokenize_query({"content": "Once"})

    async def submit():
        worker.submit(chat())
        for _ in range(2):
            worker.submit(count())
        with pytest.raises(BadRequest, match="--queue"):
            worker.submit(count())
        worker.submit(chat())
        with pytest.raises(BadRequest, match="--queue"):
            worker.submit(chat())
        assert worker.num_waiting == 4

    asyncio.run(submit())


def test_weights_are_let_go_of_after_a_request_that_failed_too(worker, scripted_llm, monkeypatch):
    """It has left no session, and the weights in memory."""

    class Idle(BaseException):
        pass

    def fails(*args, **options):
        raise errors.StorageError("the disk is full")

    def unload():
        worker_module.Worker._unload(worker)
        raise Idle

    monkeypatch.setattr(worker_module, "_SIGNAL_S", 0.001)
    monkeypatch.setattr(worker.session, "stream", fails)
    assert isinstance(events_of(worker, chat())[-1], errors.StorageError)
    assert worker.session is None and worker.is_loaded
    worker._unload_after_s, worker._unload = 0.01, unload
    with pytest.raises(Idle):
        worker.work()
    assert not worker.is_loaded and scripted_llm.admission.weights is None


def test_nobody_loads_a_model_for_a_request_that_has_hung_up(worker, scripted_llm, monkeypatch):
    worker._unload()

    def hang_up(job):
        before = job.check
        calls = []

        def check():
            calls.append(1)
            job.has_hung_up = len(calls) > 1  # while weights are loaded
            before()

        job.check = check

    assert isinstance(events_of(worker, chat(max_tokens=2), hang_up)[-1], HungUp)
    assert not worker.is_loaded and worker.session is None
    *_, last = events_of(worker, chat(max_tokens=2))
    assert isinstance(last, Output) and worker.is_loaded

"""OpenAI's Responses API: items become the messages that a chat would have, answers become items
and events, and the `openai` package understands them.
"""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from server_listening import ScriptedWorker, ask, listening, output, strictly

from ebbtide import Piece, Progress, ToolCall, errors
from ebbtide.cli.server.bad_request import BadRequest
from ebbtide.cli.server.job import Started
from ebbtide.cli.server.request import Request, chat_request
from ebbtide.cli.server.responses_request import responses_request

PATH = "/v1/responses"
HELLO = {"role": "user", "content": "Hello"}


def responses(**fields):
    return responses_request({"input": "Hello", **fields})


# --- requests

CLOCK = {"type": "function", "name": "clock", "parameters": None, "strict": None}
CHAT_CLOCK = {"name": "clock", "description": None, "parameters": None, "strict": None}
CALL = {"type": "function_call", "call_id": "c1", "name": "clock", "arguments": "{}"}
RESULT = {"type": "function_call_output", "call_id": "c1", "output": "noon"}
SPACE = {"type": "namespace", "name": "mcp__files", "description": "Files.", "tools": [CLOCK]}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("fields", "generation"),
    [
        ({}, {}),
        ({"max_output_tokens": 5}, {"max_new_tokens": 5}),
        ({"temperature": 0.5, "top_p": 0.9}, {"temperature": 0.5, "top_p": 0.9}),
        ({"reasoning": {"effort": "high", "summary": "auto"}}, {"think": "high"}),
        ({"reasoning": {"effort": "none"}}, {"think": False}),
        ({"reasoning": {"effort": None}}, {}),
        ({"text": {"format": {"type": "text"}, "verbosity": "medium"}}, {}),
        (
            {"text": {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA}}},
            {"json_schema": SCHEMA},
        ),
        ({"text": {"format": {"type": "json_object"}}}, {"json_schema": {"type": "object"}}),
        (
            {
                "tools": [CLOCK],
                "tool_choice": {"type": "function", "name": "clock"},
                "parallel_tool_calls": False,
            },
            {
                "tools": [{"type": "function", "function": CHAT_CLOCK}],
                "tool_choice": {"type": "function", "function": {"name": "clock"}},
                "parallel_tool_calls": False,
            },
        ),
        ({"tools": [], "tool_choice": "auto"}, {}),
    ],
)
def test_settings_become_ebbtides(fields, generation):
    assert responses(**fields).generation == generation


def test_what_clients_send_besides_changes_nothing():
    """The fields of a coding agent and of the openai package, as they are by default."""
    sent = {
        **{
            "model": "m",
            "stream": True,
            "store": False,
            "include": ["reasoning.encrypted_content"],
        },
        **{"prompt_cache_key": "k", "client_metadata": {"a": "b"}, "service_tier": "auto"},
        **{"metadata": {}, "truncation": "auto", "user": "u", "stream_options": None},
        **{"previous_response_id": None, "background": False, "top_logprobs": 0},
        **{"reasoning": None, "text": {"verbosity": "low"}, "max_tool_calls": 3},
    }
    found = responses(**sent)
    assert (found.prompt, found.generation, found.model, found.stream) == ([HELLO], {}, "m", True)


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "the whole conversation in"),
        ({"store": True}, "store", "may only be false: no answers are kept here; send the whole"),
        ({"conversation": "conv_1"}, "conversation", "send the whole conversation in 'input'"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0]", "whole conversation"),
        ({"input": [{"id": "msg_1"}]}, "input[0]", "whole conversation"),
        ({"background": True}, "background", "may only be false"),
        ({"prompt": {"id": "p"}}, "prompt", "send its text in 'instructions'"),
        ({"tools": [{"type": "web_search"}]}, "tools", "tools[0]: a tool of the type 'web_search'"),
        ({"tools": [CLOCK, {"type": "custom", "name": "x"}]}, "tools", "tools[1]: a tool of the"),
        ({"tools": [{"type": "namespace"}]}, "tools", "tools[0]: a namespace must have a name"),
        ({"tools": [{**SPACE, "name": "n" * 128}]}, "tools", "a text of 127 characters at most"),
        ({"tools": ["clock"]}, "tools", "tools[0]: a tool of the type 'a text'"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools", "tools[0]: a function's name"),
        ({"tools": {}}, "tools", "'tools' must be a list, not an object"),
        ({"tool_choice": "required"}, "tool_choice", "no 'tools' are given"),
        (
            {"tools": [CLOCK], "tool_choice": {"type": "allowed_tools"}},
            "tool_choice",
            "not of the type 'allowed_tools'",
        ),
        (
            {"tools": [CLOCK], "tool_choice": {"type": "function"}},
            "tool_choice",
            "'tool_choice' must have the 'name' of a function, a text, not null",
        ),
        ({"reasoning": {"effort": "vast"}}, "reasoning.effort", "none, minimal, low"),
        ({"reasoning": {"mode": "pro"}}, "reasoning.mode", 'may only be "standard"'),
        ({"text": {"format": {"type": "xml"}}}, "text.format", "text, json_object or json_schema"),
        (
            {"text": {"format": {"type": "json_schema"}}},
            "text.format.schema",
            "'text.format.schema' is missing",
        ),
        ({"max_output_tokens": 0}, "max_output_tokens", "max_output_tokens must be a whole number"),
        ({"include": ["message.output_text.logprobs"]}, "include", "/v1/chat/completions tells"),
        ({"top_logprobs": 2}, "top_logprobs", "/v1/chat/completions tells"),
        ({"messages": [HELLO]}, "messages", "'messages' is not a field that Ebbtide knows"),
        ({"input": None}, "input", "'input' must be a text, or a list with at least one item"),
        ({"input": []}, "input", "at least one item"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input", "nothing in it that is said"),
        ({"input": ["Hello"]}, "input[0]", "must be an object, not a text"),
        ({"input": [{"role": "critic", "content": ""}]}, "input[0].role", "not 'critic'"),
        ({"input": [{"type": "web_search_call"}]}, "input[0]", "type 'web_search_call' cannot be"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input[0].content",
            "a part of type 'input_image' cannot be read",
        ),
        (
            {"input": [HELLO, {"type": "function_call_output", "call_id": "c", "output": ""}]},
            "input[1].call_id",
            "'call_id' must be the id of a call in a message before it, not 'c'",
        ),
        (
            {"input": [HELLO, CALL, {**RESULT, "output": [{"type": "input_image"}]}]},
            "input[2].output",
            "a part of type 'input_image' cannot be read",
        ),
        ({"input": [HELLO, CALL, {**RESULT, "output": None}]}, "input[2].output", "not null"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input[0]", "must have 'call_id'"),
        ({"input": [HELLO, {"role": "assistant", "content": "x"}] * 2049}, "input", "4,096"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(fields, param, says):
    with pytest.raises(BadRequest) as refused:
        responses(**fields)
    assert refused.value.status == 400
    assert refused.value.param == param and says in str(refused.value)


def test_items_are_the_messages_that_a_chat_would_have():
    part = {"type": "input_text", "text": "Which?"}
    said = {"type": "output_text", "text": "Noon.", "annotations": []}
    thought = {"type": "reasoning", "id": "r", "summary": []}
    items = [
        {"type": "message", "role": "developer", "content": [part]},
        {"role": "user", "content": "Now."},
        {"role": "user", "content": [part, part]},
        {**thought, "content": [{"type": "reasoning_text", "text": "hm"}]},
        {**CALL, "id": "f", "status": "completed"},
        {**CALL, "call_id": "c2", "arguments": '{"a": 1}'},
        RESULT,
        {**RESULT, "call_id": "c2", "output": [{"type": "input_text", "text": "one"}]},
        {**thought, "encrypted_content": "of another server"},
        {"type": "message", "role": "assistant", "id": "m", "content": [said], "phase": None},
        {"role": "user", "content": "Thanks."},
        {"role": "developer", "content": "It is late."},
    ]
    calls = [
        {"id": id, "type": "function", "function": {"name": "clock", "arguments": arguments}}
        for id, arguments in (("c1", "{}"), ("c2", '{"a": 1}'))
    ]
    messages = [
        {"role": "system", "content": "Be brief.\n\nWhich?"},
        {"role": "user", "content": "Now.\n\nWhich?\nWhich?"},
        {"role": "assistant", "content": None, "tool_calls": calls, "reasoning_content": "hm"},
        {"role": "tool", "tool_call_id": "c1", "content": "noon"},
        {"role": "tool", "tool_call_id": "c2", "content": "one"},
        {"role": "assistant", "content": "Noon."},
        {"role": "user", "content": "Thanks.\n\nIt is late."},
    ]
    found = responses(input=items, instructions="Be brief.")
    assert found.prompt == chat_request({"messages": messages}).prompt


def test_functions_of_a_namespace_are_known_by_one_name():
    request = responses(
        tools=[CLOCK, SPACE], input=[HELLO, {**CALL, "namespace": "mcp__files"}, RESULT]
    )
    assert [tool["function"]["name"] for tool in request.tools] == ["clock", "mcp__files.clock"]
    assert request.prompt[1]["tool_calls"][0]["function"]["name"] == "mcp__files.clock"
    assert request.namespaces == {"mcp__files.clock": ("mcp__files", "clock")}
    assert (
        responses(input=[HELLO, {**CALL, "namespace": "mcp__files"}]).prompt[1]
        == (
            request.prompt[1]  # the same, whether or not it is still offered
        )
    )


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
ITEM = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(["message", "reasoning", CALL["type"], RESULT["type"]]) | VALUES,
        "role": st.sampled_from(["user", "assistant"]) | VALUES,
        **dict.fromkeys(["content", "call_id", "name", "arguments", "namespace"], VALUES),
    },
)
BODY = st.fixed_dictionaries(
    {"input": st.text(max_size=3) | st.lists(ITEM | VALUES, max_size=3)},
    optional=dict.fromkeys(["tools", "tool_choice", "text", "reasoning", "include"], VALUES),
)


@given(BODY)
def test_whatever_comes_is_a_request_or_refused(body):
    try:
        assert isinstance(responses_request(body), Request)
    except BadRequest as refused:
        assert refused.status == 400


# --- answers, through the openai package

TOLD_CALL = ToolCall("abcdefghi", "mcp__files.clock", '{"zone": "UTC"}')
SCRIPT = [
    Started(3, 2),
    *(Piece("", [1], thought=text) for text in ("h", "m")),
    *(Piece(text, [1]) for text in ("It ", "is ü")),
    Piece("", [1], tool_calls=(TOLD_CALL,)),
]
WHOLE = [*SCRIPT, output("It is ü", finish_reason="tool_calls", tool_calls=[TOLD_CALL])]
ASKED = {"model": "m", "input": "Hello", "tools": [SPACE]}


@pytest.fixture
def client():
    """`client(*script)`: of a server that answers so."""
    openai = pytest.importorskip("openai")
    opened = []

    def connected(*script):
        opened.append(listening(ScriptedWorker(*script)))
        address, _ = opened[-1].__enter__()
        base = f"http://{address[0]}:{address[1]}/v1"
        return openai.OpenAI(base_url=base, api_key="none", max_retries=0)

    yield connected
    for server in opened:
        server.__exit__(None, None, None)


def test_a_whole_answer_is_a_response_of_items(client):
    from openai.types.responses import Response

    found = client(*WHOLE).responses.create(**ASKED)
    strictly(Response, found)
    thought, message, call = found.output
    assert (thought.type, thought.content[0].text, thought.summary) == ("reasoning", "hm", [])
    assert message.role == "assistant" and found.output_text == "It is ü"
    assert (call.namespace, call.name, call.call_id) == ("mcp__files", "clock", "abcdefghi")
    assert call.arguments == TOLD_CALL.arguments
    assert {item.status for item in found.output} == {found.status} == {"completed"}
    usage = found.usage
    assert (usage.input_tokens, usage.output_tokens, usage.total_tokens) == (3, 1, 4)
    assert usage.input_tokens_details.cached_tokens == 2
    assert usage.output_tokens_details.reasoning_tokens == 2
    assert found.store is False and found.previous_response_id is None


def test_a_stream_is_events_in_their_order_that_join_to_the_whole(client):
    from openai.types.responses import ResponseStreamEvent

    events = [*client(*WHOLE).responses.create(**ASKED, stream=True)]
    for event in events:
        strictly(ResponseStreamEvent, event)
    assert [event.sequence_number for event in events] == [*range(len(events))]
    item, part = "output_item", "content_part"
    kinds = [
        *("created", "in_progress"),
        *(f"{item}.added", f"{part}.added", *["reasoning_text.delta"] * 2),
        *("reasoning_text.done", f"{part}.done", f"{item}.done"),
        *(f"{item}.added", f"{part}.added", *["output_text.delta"] * 2),
        *("output_text.done", f"{part}.done", f"{item}.done"),
        *(f"{item}.added", "function_call_arguments.delta", "function_call_arguments.done"),
        *(f"{item}.done", "completed"),
    ]
    assert [event.type for event in events] == [f"response.{kind}" for kind in kinds]
    done = [event.item for event in events if event.type == "response.output_item.done"]
    last = events[-1].response
    assert last.output == done and last.id == events[0].response.id
    with client(*WHOLE).responses.stream(**ASKED) as stream:
        joined = stream.get_final_response()
    whole = client(*WHOLE).responses.create(**ASKED)
    for other in (joined, whole):  # but for their ids
        assert [_told(item) for item in other.output] == [_told(item) for item in last.output]
        assert other.usage == last.usage


def _told(item) -> dict:
    told = item.model_dump(include={"type", "name", "namespace", "arguments", "status", "call_id"})
    texts = [part.text for part in getattr(item, "content", None) or []]
    return {name: value for name, value in told.items() if value is not None} | {"texts": texts}


def test_reading_shows_signs_of_life(client):
    progress = Progress("prefill", 1, 3, 0.5, 2.0, None)
    events = [
        *client(progress, SCRIPT[0], progress, *WHOLE[1:]).responses.create(**ASKED, stream=True)
    ]
    kinds = [event.type for event in events]
    assert kinds[:4] == ["response.created", *["response.in_progress"] * 3]
    assert [event.sequence_number for event in events] == [*range(len(events))]


def test_an_answer_that_is_cut_is_incomplete(client):
    script = [Started(3, 2), Piece("He", [1]), output("He", finish_reason="length")]
    found = client(*script).responses.create(**ASKED)
    assert (found.status, found.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert found.output[0].status == "incomplete"
    *_, last = client(*script).responses.create(**ASKED, stream=True)
    assert last.type == "response.incomplete" and last.response.output[0].status == "incomplete"
    assert last.response.output[0].content[0].text == "He"


def test_a_call_before_the_cut_is_whole(client):
    call = Piece("", [1], tool_calls=(TOLD_CALL,))
    script = [SCRIPT[0], call, output("", finish_reason="length", tool_calls=[TOLD_CALL])]
    found = client(*script).responses.create(**ASKED)
    assert (found.status, found.output[0].status) == ("incomplete", "completed")
    *_, done, last = client(*script).responses.create(**ASKED, stream=True)
    assert last.type == "response.incomplete" and done.item.status == "completed"


def test_what_fails_is_a_status_or_a_failed_response(client):
    import openai
    from openai.types.responses import ResponseStreamEvent

    full = errors.StorageError("the disk is full")
    with pytest.raises(openai.InternalServerError, match="the disk is full"):
        client(full).responses.create(**ASKED, stream=True)
    *_, last = client(*SCRIPT, full).responses.create(**ASKED, stream=True)
    strictly(ResponseStreamEvent, last)
    assert (last.type, last.response.status) == ("response.failed", "failed")
    failed = last.response.error
    assert (failed.code, failed.message) == ("server_error", "the disk is full")
    long = errors.ContextOverflow("too long", needed_tokens=2, available_tokens=1)
    for wrong, code in (
        (errors.InputError("x"), "invalid_prompt"),
        (long, "context_length_exceeded"),  # as agents know it
    ):
        *_, last = client(*SCRIPT, wrong).responses.create(**ASKED, stream=True)
        assert last.response.error.code == code
    with pytest.raises(openai.BadRequestError, match="'input'") as refused:
        client().responses.create(**ASKED, previous_response_id="resp_1")
    assert refused.value.body["param"] == "previous_response_id"


def test_answers_are_not_kept():
    with listening(ScriptedWorker(*WHOLE)) as (address, _):
        status, text = ask(address, {"input": "Hello"}, PATH)
        assert status == 200
        status, text = ask(address, {}, f"{PATH}/{json.loads(text)['id']}")
        assert status == 404 and "no answers are kept here" in json.loads(text)["error"]["message"]

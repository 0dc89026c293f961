"""Anthropic's Messages API: blocks become the messages that a chat would have, answers become
blocks and events, and the `anthropic` package understands them.
"""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from server_listening import ScriptedWorker, ask, listening, output, strictly

from ebbtide import GenerationConfig, Piece, Progress, ToolCall, errors
from ebbtide.cli.server.anthropic_request import anthropic_request
from ebbtide.cli.server.bad_request import BadRequest
from ebbtide.cli.server.error_object import error_object
from ebbtide.cli.server.guard import Rules
from ebbtide.cli.server.job import Started, Stopping
from ebbtide.cli.server.request import Request, chat_request
from ebbtide.cli.server.text_query import count_query

PATH = "/v1/messages"
HELLO = {"role": "user", "content": "Hello"}


def message(**fields):
    return anthropic_request({"messages": [HELLO], "max_tokens": 9, **fields})


# --- requests

CLOCK = {"name": "clock", "input_schema": {"type": "object", "properties": {}}}
CHAT_CLOCK = {
    "type": "function",
    "function": {
        **{"name": "clock", "description": None, "strict": None},
        "parameters": CLOCK["input_schema"],
    },
}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("fields", "generation"),
    [
        ({}, {}),
        ({"stop_sequences": ["."]}, {"stop_strings": ["."]}),
        (
            {"temperature": 0.5, "top_p": 0.9, "top_k": 3},
            {"temperature": 0.5, "top_p": 0.9, "top_k": 3},
        ),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, {"think": True}),
        ({"thinking": {"type": "disabled"}}, {"think": False}),
        ({"thinking": {"type": "adaptive", "display": "omitted"}}, {}),
        ({"output_config": {"effort": "max"}}, {"think": "high"}),
        ({"thinking": {"type": "adaptive"}, "output_config": {"effort": "low"}}, {"think": "low"}),
        ({"thinking": {"type": "disabled"}, "output_config": {"effort": "low"}}, {"think": False}),
        (
            {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
            {"json_schema": SCHEMA},
        ),
        ({"tools": [CLOCK]}, {"tools": [CHAT_CLOCK], "tool_choice": "auto"}),
        (
            {"tools": [CLOCK], "tool_choice": {"type": "any", "disable_parallel_tool_use": True}},
            {"tools": [CHAT_CLOCK], "tool_choice": "required", "parallel_tool_calls": False},
        ),
        (
            {"tools": [CLOCK], "tool_choice": {"type": "tool", "name": "clock"}},
            {
                "tools": [CHAT_CLOCK],
                "tool_choice": {"type": "function", "function": {"name": "clock"}},
            },
        ),
        (
            {"tools": [CLOCK], "tool_choice": {"type": "none"}},
            {"tools": [CHAT_CLOCK], "tool_choice": "none"},
        ),
    ],
)
def test_settings_become_ebbtides(fields, generation):
    assert message(**fields).generation == {"max_new_tokens": 9, **generation}


def test_what_clients_send_besides_changes_nothing():
    """The fields of a coding agent, as they are by default."""
    cached = {"cache_control": {"type": "ephemeral"}}
    edits = [{"type": "clear_thinking_20251015", "keep": "all"}]
    sent = {
        **{"model": "m", "stream": True, "metadata": {"user_id": "u"}, "service_tier": "auto"},
        **{"context_management": {"edits": edits}, "container": None, "mcp_servers": []},
        **{"tools": [], "tool_choice": None, **cached},
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Hello", **cached}]}],
        "system": [{"type": "text", "text": "Be brief.", **cached}],
    }
    found = message(**sent)
    assert found.prompt == [{"role": "system", "content": "Be brief."}, HELLO]
    assert (found.generation, found.model, found.stream) == ({"max_new_tokens": 9}, "m", True)
    more = {"defer_loading": True, "eager_input_streaming": True, "type": "custom", **cached}
    assert message(tools=[{**CLOCK, **more}]).tools == [CHAT_CLOCK]


IMAGE = {"type": "image", "source": {"type": "url", "url": "x"}}
USE = {"type": "tool_use", "id": "c1", "name": "clock", "input": {}}
RESULT = {"type": "tool_result", "tool_use_id": "c1", "content": "noon"}


def user(*blocks):
    return {"role": "user", "content": [*blocks]}


def assistant(*blocks):
    return {"role": "assistant", "content": [*blocks]}


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"messages": None}, "messages", "at least one message"),
        ({"messages": []}, "messages", "at least one message"),
        (
            {"messages": [assistant({"type": "redacted_thinking", "data": "x"})]},
            "messages",
            "nothing in it that is said",
        ),
        ({"messages": ["Hello"]}, "messages[0]", "must be an object"),
        ({"messages": [{"role": "tool", "content": ""}]}, "messages[0].role", "not 'tool'"),
        ({"messages": [{"role": "user"}]}, "messages[0]", "must be a text or a list of blocks"),
        ({"messages": [user(IMAGE)]}, "messages[0].content[0]", "a block of the type 'image'"),
        ({"messages": [user(USE)]}, "messages[0].content[0]", "allowed are text, document"),
        (
            {"messages": [assistant({"type": "server_tool_use", "id": "s"}), HELLO]},
            "messages[0].content[0]",
            "a block of the type 'server_tool_use' cannot be read here",
        ),
        (
            {"messages": [assistant(USE), user({**RESULT, "content": [IMAGE]})]},
            "messages[1]: tool_result.content[0]",
            "a block of the type 'image'",
        ),
        ({"messages": [user(RESULT)]}, "messages[0].tool_use_id", "the id of a call in a message"),
        (
            {"messages": [assistant({**USE, "input": "{}"}), HELLO]},
            "messages[0].content[0].input",
            "'input' of a tool_use must be an object, not a text",
        ),
        (
            {"messages": [HELLO, {"role": "assistant", "content": "It"}]},
            "messages",
            "not continued",
        ),
        ({"system": [IMAGE]}, "system.content[0]", "a block of the type 'image'"),
        (
            {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
            "tools",
            "tools[0]: a tool of the type 'web_search_20250305' cannot be offered",
        ),
        ({"tools": [{**CLOCK, "input_examples": [{}]}]}, "tools", "put them into the description"),
        ({"tools": [CLOCK, CLOCK]}, "tools", "tools[1]: there is a function 'clock' before it"),
        (
            {"tools": [CLOCK], "tool_choice": {"type": "some"}},
            "tool_choice",
            "auto, any, none or tool",
        ),
        (
            {"tools": [CLOCK], "tool_choice": {"type": "tool"}},
            "tool_choice",
            "'tool_choice' must have the 'name' of a function, a text, not null",
        ),
        ({"tool_choice": {"type": "any"}}, "tool_choice", "no 'tools' are given"),
        ({"tool_choice": "auto"}, "tool_choice", "must be an object"),
        ({"thinking": {"type": "deep"}}, "thinking", "enabled, disabled, adaptive"),
        ({"output_config": {"effort": 1}}, "output_config.effort", "none, minimal, low"),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config.format", "json_schema"),
        ({"max_tokens": False}, "max_tokens", "max_tokens must be a whole number"),
        ({"max_tokens": 0.5}, "max_tokens", "max_tokens must be a whole number"),
        ({"stop_sequences": [1]}, "stop_sequences", "stop_sequences"),
        ({"mcp_servers": [{}]}, "mcp_servers", "nothing runs on this server"),
        ({"container": "c"}, "container", "nothing runs on this server"),
        (
            {"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}},
            "context_management",
            "a conversation is read as it is sent",
        ),
        ({"n": 1}, "n", "'n' is not a field that Ebbtide knows"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(fields, param, says):
    with pytest.raises(BadRequest) as refused:
        message(**fields)
    assert refused.value.status == 400
    assert refused.value.param == param and says in str(refused.value)


def test_blocks_are_the_messages_that_a_chat_would_have():
    thought = {"type": "thinking", "thinking": "hm", "signature": "s"}
    text = {"type": "text", "text": "Now."}
    sent = [
        user(text, text),
        HELLO,
        assistant({"type": "redacted_thinking", "data": "x"}, thought, USE, {**USE, "id": "c2"}),
        user(RESULT, {**RESULT, "tool_use_id": "c2", "content": [text], "is_error": True}, text),
        assistant(thought, {"type": "text", "text": "Noon."}),
        {"role": "system", "content": "It is late."},
        user(text),
    ]
    calls = [
        {"id": id, "type": "function", "function": {"name": "clock", "arguments": "{}"}}
        for id in ("c1", "c2")
    ]
    messages = [
        {"role": "system", "content": "Be brief.\n\nNow."},
        {"role": "user", "content": "Now.\n\nNow.\n\nHello"},
        {"role": "assistant", "content": None, "tool_calls": calls, "reasoning_content": "hm"},
        {"role": "tool", "tool_call_id": "c1", "content": "noon"},
        {"role": "tool", "tool_call_id": "c2", "content": "Error: Now."},
        {"role": "user", "content": "Now."},
        {"role": "assistant", "content": "Noon."},
        {"role": "user", "content": "It is late.\n\nNow."},
    ]
    found = message(messages=sent, system=[{"type": "text", "text": "Be brief."}, text])
    assert found.prompt == chat_request({"messages": messages}).prompt


def test_nothing_is_an_empty_text():
    for content in ("", []):
        assert message(messages=[{"role": "user", "content": content}]).prompt == [
            {"role": "user", "content": ""}
        ]
    for content in ({}, {"content": None}, {"content": []}, {"content": ""}):
        result = {"type": "tool_result", "tool_use_id": "c1", **content}
        assert message(messages=[assistant(USE), user(result)]).prompt[1]["content"] == ""


@pytest.mark.parametrize("end", ["", "\n", "You are an agent."])
def test_what_a_client_counts_by_is_no_part_of_a_prompt(end):
    head = "x-anthropic-billing-header: cc_version=2.1.37.0d9; cc_entrypoint=cli; cch=fa690;"
    system = [{"type": "text", "text": text} for text in (f"{head}{end}", "Be brief.")]
    said = [text for text in (end.strip(), "Be brief.") if text]
    assert message(system=system).prompt[0] == {"role": "system", "content": "\n\n".join(said)}


def test_tokens_are_counted_of_the_prompt_that_would_be_answered():
    request, encoded = message(tools=[CLOCK], top_p=0.9, system="Be brief."), []
    defaults = {"think": False, "top_p": 0.5}  # of the command line

    def encode(prompt, **options):
        encoded.append((prompt, options))
        return [5] * 7

    query = count_query(request)
    llm = SimpleNamespace(encode=encode, generation=GenerationConfig())
    assert query.answer(llm, defaults) == {"input_tokens": 7}
    options = GenerationConfig(**{**defaults, **request.generation}).chat_options
    assert options["tools"] and options["think"] is False
    assert encoded == [(request.prompt, options)]
    assert (query.prompt, query.tools) == (request.prompt, request.tools)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
BLOCK = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "thinking", "tool_use", "tool_result"]) | VALUES},
    optional=dict.fromkeys(
        ["text", "thinking", "id", "name", "input", "tool_use_id", "content"], VALUES
    ),
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant"]), "content": st.lists(BLOCK, max_size=3)}
)
BODY = st.fixed_dictionaries(
    {"messages": st.lists(MESSAGE | VALUES, max_size=3)},
    optional=dict.fromkeys(
        ["system", "tools", "tool_choice", "thinking", "output_config", "context_management"],
        VALUES,
    ),
)


@given(BODY)
def test_whatever_comes_is_a_request_or_refused(body):
    try:
        assert isinstance(anthropic_request(body), Request)
    except BadRequest as refused:
        assert refused.status == 400


# --- answers, through the anthropic package

CALL = ToolCall("abcdefghi", "clock", '{"zone": "UTC"}')
SCRIPT = [
    Started(3, 2),
    *(Piece("", [1], thought=text) for text in ("h", "m")),
    *(Piece(text, [1]) for text in ("It ", "is ü")),
    Piece("", [1], tool_calls=(CALL,)),
]
WHOLE = [*SCRIPT, output("It is ü", finish_reason="tool_calls", tool_calls=[CALL])]
ASKED = {"model": "m", "messages": [HELLO], "max_tokens": 9}


@pytest.fixture
def client():
    """`client(*script)`: of a server that answers so."""
    anthropic = pytest.importorskip("anthropic")
    opened = []

    def connected(*script):
        opened.append(listening(ScriptedWorker(*script)))
        address, _ = opened[-1].__enter__()
        base = f"http://{address[0]}:{address[1]}"
        return anthropic.Anthropic(base_url=base, api_key="none", max_retries=0)

    yield connected
    for server in opened:
        server.__exit__(None, None, None)


def assert_is_told(found):
    thought, text, call = found.content
    assert (thought.type, thought.thinking, text.text) == ("thinking", "hm", "It is ü")
    assert (call.id, call.name, call.input) == ("abcdefghi", "clock", {"zone": "UTC"})
    assert (found.stop_reason, found.stop_sequence) == ("tool_use", None)
    usage = found.usage
    assert (usage.input_tokens, usage.cache_read_input_tokens, usage.output_tokens) == (1, 2, 1)


def test_a_whole_answer_is_a_message_of_blocks(client):
    from anthropic.types import Message

    found = client(*WHOLE).messages.create(**ASKED)
    strictly(Message, found)
    assert_is_told(found)


def test_a_stream_is_events_in_their_order_that_join_to_the_whole(client):
    from anthropic.types import RawMessageStreamEvent

    events = [*client(*WHOLE).messages.create(**ASKED, stream=True)]
    for event in events:
        strictly(RawMessageStreamEvent, event)
    block = "content_block"
    assert [event.type for event in events] == [
        "message_start",
        *(f"{block}_start", *[f"{block}_delta"] * 3, f"{block}_stop"),  # with a signature
        *(f"{block}_start", *[f"{block}_delta"] * 2, f"{block}_stop"),
        *(f"{block}_start", f"{block}_delta", f"{block}_stop"),
        *("message_delta", "message_stop"),
    ]
    begun = events[0].message.usage
    assert (begun.input_tokens, begun.cache_read_input_tokens, begun.output_tokens) == (1, 2, 0)
    with client(*WHOLE).messages.stream(**ASKED) as stream:
        assert_is_told(stream.get_final_message())


def test_reading_shows_signs_of_life():
    progress = Progress("prefill", 1, 3, 0.5, 2.0, None)
    with listening(ScriptedWorker(progress, SCRIPT[0], progress, *WHOLE[1:])) as (address, _):
        _, text = ask(address, {**ASKED, "stream": True}, PATH)
    kinds = [part.partition("\n")[0] for part in text.split("event: ")[1:]]
    # Clients know no ping before the message.
    assert kinds[:4] == ["message_start", "ping", "ping", "content_block_start"]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"finish_reason": "stop"}, ("end_turn", None)),
        ({"finish_reason": "stop", "stop_string": "END"}, ("stop_sequence", "END")),
        ({"finish_reason": "length"}, ("max_tokens", None)),
    ],
)
def test_why_an_answer_ended_is_told(client, fields, reason):
    script = [Started(3, 2), Piece("He", [1]), output("He", **fields)]
    found = client(*script).messages.create(**ASKED)
    assert (found.stop_reason, found.stop_sequence) == reason
    *_, delta, _ = client(*script).messages.create(**ASKED, stream=True)
    assert (delta.delta.stop_reason, delta.delta.stop_sequence) == reason


def test_the_model_is_told_as_anthropic_does(client):
    from anthropic.types import ModelInfo

    models = client().models
    (found,) = models.list()
    strictly(ModelInfo, found)
    assert (found.id, found.display_name, found.max_input_tokens) == ("m", "m", 100)
    assert models.retrieve("m") == found and found.created_at.tzinfo is not None


def test_what_fails_is_a_status_or_an_error_event(client):
    import anthropic

    full = errors.StorageError("the disk is full")
    with pytest.raises(anthropic.InternalServerError, match="the disk is full"):
        client(full).messages.create(**ASKED, stream=True)
    with pytest.raises(anthropic.APIStatusError, match="the disk is full") as failed:
        [*client(*SCRIPT, full).messages.create(**ASKED, stream=True)]
    assert failed.value.body["error"]["type"] == "api_error"
    with pytest.raises(anthropic.NotFoundError, match="'m' is served"):
        client().messages.create(**{**ASKED, "model": "claude"})


@pytest.mark.parametrize(
    ("error", "status", "kind", "says"),
    [
        (BadRequest("x"), 400, "invalid_request_error", "x"),
        (BadRequest("x", status=401), 401, "authentication_error", "x"),
        (BadRequest("x", status=404), 404, "not_found_error", "x"),
        (BadRequest("x", status=405), 405, "invalid_request_error", "x"),
        (BadRequest("x", status=413), 413, "request_too_large", "x"),
        (BadRequest("x", status=503), 503, "overloaded_error", "x"),
        (
            errors.ContextOverflow("x", needed_tokens=20, available_tokens=10),
            *(400, "invalid_request_error", "prompt is too long: 20 tokens > 10 maximum: x"),
        ),
        (KeyError("x"), 500, "api_error", "KeyError"),
        (Stopping(), 503, "overloaded_error", "stopping"),
    ],
)
def test_errors_have_the_shape_of_the_protocol(error, status, kind, says):
    for path in (PATH, f"{PATH}/count_tokens"):
        found, body = error_object(error, path)
        assert found == status and set(body) == {"type", "error"} and body["type"] == "error"
        assert body["error"]["type"] == kind and says in body["error"]["message"]
    assert "type" not in error_object(error, f"{PATH}x")[1]


def test_a_prompt_may_be_read_beforehand():
    """As Anthropic has it: `max_tokens` of 0 answers nothing."""
    assert anthropic_request({**ASKED, "max_tokens": 0}).only_reads
    assert not anthropic_request(ASKED).only_reads


def test_the_tokens_of_a_conversation_may_be_counted_behind_an_answer():
    messages = [HELLO, {"role": "assistant", "content": "Hi"}]
    with pytest.raises(BadRequest, match="must not be the assistant's"):
        anthropic_request({"messages": messages})
    assert anthropic_request({"messages": messages}, is_counted=True).prompt == messages


def test_what_is_refused_before_it_is_read_has_that_shape_too():
    with listening(ScriptedWorker()) as (address, _):
        for body, status in ((ASKED | {"metadata": {"user_id": "x" * 2000}}, 413), ([], 400)):
            found, text = ask(address, body, PATH)
            assert found == status and json.loads(text)["type"] == "error"


def test_a_key_may_come_by_either_header():
    rules = Rules(hosts=None, api_key="right")
    for headers in (
        {"authorization": "Bearer right"},
        {"x-api-key": "right"},
        {"authorization": "Bearer wrong", "x-api-key": "right"},
    ):
        rules.check(PATH, headers)
    for headers in ({}, {"x-api-key": "wrong"}, {"x-api-key": ""}, {"authorization": "right"}):
        with pytest.raises(BadRequest, match="x-api-key: KEY"):
            rules.check(PATH, headers)

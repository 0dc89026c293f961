"""What clients send becomes what Ebbtide knows, or a refusal that names the field; and back."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from ebbtide import GenerationConfig, Piece, Progress, ToolCall, errors
from ebbtide.cli.server.answer import KEEP_ALIVE, event
from ebbtide.cli.server.bad_request import BadRequest
from ebbtide.cli.server.error_object import error_object
from ebbtide.cli.server.fields import read_json
from ebbtide.cli.server.job import Started, Stopping
from ebbtide.cli.server.request import Request, chat_request, completion_request
from ebbtide.cli.server.response import CompletionAnswer
from ebbtide.cli.server.text_query import template_query, tokenize_query

HELLO = [{"role": "user", "content": "Hello"}]


def chat(**fields):
    return chat_request({"messages": HELLO, **fields})


# --- requests


@pytest.mark.parametrize(
    ("fields", "generation"),
    [
        ({}, {}),
        ({"max_tokens": 5}, {"max_new_tokens": 5}),
        ({"max_completion_tokens": 5}, {"max_new_tokens": 5}),
        ({"max_tokens": 5, "max_completion_tokens": 5}, {"max_new_tokens": 5}),
        # Of clients that write all numbers with a point, and of those that know "no limit".
        ({"max_tokens": 5.0, "seed": -1.0}, {"max_new_tokens": 5, "seed": 2**64 - 1}),
        ({"max_tokens": -1}, {}),
        ({"max_tokens": -1, "max_completion_tokens": 5}, {"max_new_tokens": 5}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"stop": "."}, {"stop_strings": "."}),
        ({"stop": [".", "\n"]}, {"stop_strings": [".", "\n"]}),
        ({"temperature": 0, "top_p": 0.5, "seed": 1}, {"temperature": 0, "top_p": 0.5, "seed": 1}),
        (
            {"top_k": 9, "min_p": 0.1, "repetition_penalty": 1.1},
            {"top_k": 9, "min_p": 0.1, "repetition_penalty": 1.1},
        ),
        (
            {"presence_penalty": -0.5, "frequency_penalty": 0},
            {"presence_penalty": -0.5, "frequency_penalty": 0},
        ),
        ({"logit_bias": {"5": -100, "6": 2.5}}, {"logit_bias": {"5": -100, "6": 2.5}}),
        ({"logit_bias": {}}, {"logit_bias": {}}),
        ({"min_tokens": 3}, {"min_new_tokens": 3}),
        (
            {"no_repeat_ngram_size": 3, "suppress_tokens": [4], "bad_words_ids": [[1, 2]]},
            {"no_repeat_ngram_size": 3, "suppress_tokens": [4], "bad_words_ids": [[1, 2]]},
        ),
        ({"logprobs": True}, {"logprobs": 0}),
        ({"logprobs": True, "top_logprobs": 3}, {"logprobs": 3}),
        ({"logprobs": False, "top_logprobs": 0}, {}),
        ({"reasoning_effort": "high"}, {"think": "high"}),
        ({"reasoning_effort": "minimal"}, {"think": "low"}),
        ({"reasoning_effort": "none"}, {"think": False}),
        ({"chat_template_kwargs": {"enable_thinking": False}}, {"think": False}),
    ],
)
def test_settings_by_their_common_names(fields, generation):
    assert chat(**fields).generation == generation


def test_plain_texts_ask_for_log_probabilities_by_a_number():
    for asked, wanted in ((0, {"logprobs": 0}), (5, {"logprobs": 5}), (False, {}), (None, {})):
        assert completion_request({"prompt": "x", "logprobs": asked}).generation == wanted
    for body in ({"logprobs": True}, {"logprobs": 21}, {"top_logprobs": 1}):
        with pytest.raises(BadRequest, match="logprobs"):
            completion_request({"prompt": "x", **body})


def test_what_clients_send_besides_changes_nothing():
    """The fields of the openai package and of chat interfaces, as they are by default."""
    sent = {
        **{"model": "m", "stream": True, "n": 1, "user": "u", "store": False, "metadata": {"a": 1}},
        **{"parallel_tool_calls": True, "tools": [], "tool_choice": "auto"},
        **{"logprobs": False, "top_logprobs": 0},
        **{"response_format": {"type": "text"}, "modalities": ["text"], "service_tier": "auto"},
        **{
            "prediction": {"type": "content", "content": "x"},
            "audio": None,
            "unheard_of": None,
            "max_tokens": None,
        },
        "stream_options": {"include_usage": True, "include_obfuscation": False},
        # Of clients of other servers.
        **{"cache_prompt": True, "ignore_eos": False, "stop_token_ids": [], "priority": 0},
        **{"verbosity": "low", "functions": [], "function_call": "auto"},
        **{"skip_special_tokens": True, "length_penalty": 1.0, "add_generation_prompt": True},
    }
    assert chat(**sent) == Request(HELLO, {}, "m", stream=True, include_usage=True)


CLOCK = {"type": "function", "function": {"name": "clock"}}


def test_what_clients_keep_of_an_answer_may_come_back_with_it():
    kept = {"id": "m1", "refusal": None, "annotations": [], "reasoning_details": [{"text": "x"}]}
    kept |= {"provider_specific_fields": {}, "thinking_blocks": [], "cache_control": {"type": "e"}}
    answer = {"role": "assistant", "content": "Hi"}
    assert chat(messages=[*HELLO, {**answer, **kept}, *HELLO]).prompt == [*HELLO, answer, *HELLO]


def test_formats_become_schemas():
    whole = {"type": "object", "properties": {"a": {"type": "integer"}}}
    sent = schema_format(whole, strict=False, description="An a.")
    assert chat(response_format=sent).generation == {"json_schema": whole}
    found = completion_request({"prompt": "x", "response_format": {"type": "json_object"}})
    assert found.generation == {"json_schema": {"type": "object"}}
    sent = {"type": "json_object", "schema": whole}
    assert chat(response_format=sent).generation == {"json_schema": whole}


SCHEMA = "response_format.json_schema.schema"


def schema_format(schema, **more):
    return {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, **more}}


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"n": 2}, "n", "may only be 1"),
        ({"n": True}, "n", "may only be 1"),
        ({"tools": [{}]}, "tools", 'tools[0] must be {"type": "function"'),
        ({"tools": [CLOCK], "tool_choice": "some"}, "tool_choice", "auto, none, required"),
        ({"tool_choice": "required"}, "tool_choice", "no 'tools' are given"),
        ({"functions": [{}]}, "functions", "may only be []: offer them as 'tools', [{\"type\""),
        ({"function_call": {"name": "f"}}, "function_call", "use 'tools' and 'tool_choice'"),
        ({"logprobs": 1}, "logprobs", "true or false, not a number"),
        ({"top_logprobs": 2}, "top_logprobs", "needs 'logprobs': true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "whole number from 0 to 20"),
        ({"logprobs": True, "top_logprobs": True}, "top_logprobs", "not True"),
        ({"frequency_penalty": 2.5}, "frequency_penalty", "a number from -2 to 2, not 2.5"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "logit_bias of 5 must be a number from -100 to"),
        ({"logit_bias": {"the": 1}}, "logit_bias", "a key must be a token id"),
        ({"logit_bias": [[5, 1]]}, "logit_bias", "an object of token ids and numbers"),
        ({"logits_processors": []}, "logits_processors", "not a field that Ebbtide knows"),
        ({"response_format": {"type": "xml"}}, "response_format", "text, json_object or json_sch"),
        ({"response_format": {"type": "json_schema"}}, f"{SCHEMA}", "is missing"),
        (
            {"response_format": {"type": "json_object", "schema": [1]}},
            "response_format.schema",
            "response_format.schema must be a JSON schema",
        ),
        ({"response_format": schema_format([])}, f"{SCHEMA}", f"{SCHEMA} must be a JSON schema"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens must be a whole number from 1"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens", "contradicts"),
        ({"max_tokens": -2}, "max_tokens", "max_tokens must be a whole number from 1"),
        ({"max_tokens": 5.5}, "max_tokens", "not 5.5"),
        ({"temperature": -1}, "temperature", "at least 0"),
        ({"stop": [""]}, "stop", "stop: each must have"),
        ({"stream": "yes"}, "stream", "true or false, not a text"),
        ({"stream_options": {"include_usage": 1}}, "include_usage", "true or false"),
        ({"reasoning_effort": "vast"}, "reasoning_effort", "none, minimal, low"),
        ({"chat_template_kwargs": {"date": "x"}}, "chat_template_kwargs", "enable_thinking"),
        ({"ignore_eos": True}, "ignore_eos", "may only be false"),
        ({"length_penalty": 1.5}, "length_penalty", "may only be 1: tokens are chosen one by"),
        ({"best": 1}, "best", "'best' is not a field that Ebbtide knows; allowed are "),
        ({"model": 3}, "model", "must be a text"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(fields, param, says):
    with pytest.raises(BadRequest) as refused:
        chat(**fields)
    assert refused.value.status == 400
    assert refused.value.param == param and says in str(refused.value)


def test_messages_become_roles_and_texts():
    sent = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        # An answer as the openai package sends it back.
        {"role": "assistant", "content": None, "refusal": None, "tool_calls": [], "audio": None},
        {"role": "user", "name": "Ann", "content": ""},
    ]
    assert chat_request({"messages": sent}).prompt == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": ""},
    ]


CALL = {"id": "c1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
CALLS = {"role": "assistant", "content": None, "refusal": None, "tool_calls": [CALL]}


def test_calls_and_their_results_are_messages_too():
    result = {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "noon"}]}
    sent = [*HELLO, {**CALLS, "reasoning_content": "hm"}, result]
    thought = {"reasoning_content": "hm", "thinking": "hm"}
    assert chat_request({"messages": sent}).prompt == [
        *HELLO,
        {"role": "assistant", "content": "", "tool_calls": [CALL], **thought},
        {"role": "tool", "content": "noon", "tool_call_id": "c1", "name": "clock"},
    ]


def test_arguments_of_calls_may_be_the_object_they_are():
    arguments = {"a": "ü"}
    call = {"id": "c1", "function": {"name": "clock", "arguments": arguments}}
    (_, message) = chat_request({"messages": [*HELLO, {**CALLS, "tool_calls": [call]}]}).prompt
    assert message["tool_calls"][0]["function"]["arguments"] == '{"a": "ü"}'


def test_a_template_is_told_of_tools_as_for_an_answer():
    tool = {"type": "function", "function": {"name": "clock", "strict": True}}
    query = template_query({"messages": HELLO, "tools": [tool]})
    tokenizer = SimpleNamespace(chat_text=lambda messages, **options: options)
    llm = SimpleNamespace(tokenizer=tokenizer, generation=GenerationConfig())
    options = GenerationConfig(tools=[tool], think=False).chat_options
    assert query.answer(llm, {"think": False})["prompt"] == options


def test_tools_are_settings_of_an_answer():
    choice = {"type": "function", "function": {"name": "clock"}}
    given = {"tools": [CLOCK], "tool_choice": choice, "parallel_tool_calls": False}
    assert chat(**given).generation == given
    assert chat(**given).tools == [CLOCK] and chat(tools=[CLOCK], tool_choice="none").tools == []
    GenerationConfig().resolve(**given)
    assert chat(tools=[], tool_choice="none", parallel_tool_calls=False).generation == {}


def test_calls_are_told_as_openai_does():
    answer = CompletionAnswer(chat(), "m")
    calls = [ToolCall("c1", "clock", "{}"), ToolCall("c2", "clock", '{"a": 1}')]
    output = SimpleNamespace(
        text="", thought="", tool_calls=calls, finish_reason="tool_calls", usage={}
    )
    (choice,) = answer.whole(output)["choices"]
    assert choice["finish_reason"] == "tool_calls"
    message = choice["message"]
    assert message["content"] is None and message["tool_calls"][0] == CALL
    pieces = [SimpleNamespace(text="", thought="", tool_calls=(call,)) for call in calls]
    told = [event for piece in pieces for event in events(answer.piece(piece))]
    deltas = [event["choices"][0]["delta"]["tool_calls"][0] for event in told]
    assert [delta.pop("index") for delta in deltas] == [0, 1]
    assert deltas == message["tool_calls"]


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        (None, "'messages' is missing"),
        ([], "at least one message"),
        ("hello", "must be a list"),
        (["hello"], "messages[0] must be an object"),
        ([{"content": "x"}], "messages[0]: the role must be one of system"),
        ([{"role": "function", "content": "x"}], "what a call gave has the role 'tool', and the"),
        (
            [{"role": "assistant", "content": None, "function_call": {"name": "f"}}],
            "'function_call' is not supported; calls are in 'tool_calls'",
        ),
        ([*HELLO, {"role": "tool", "content": "x"}], "messages[1]: 'tool_call_id' must be the id"),
        ([{**CALLS, "role": "user"}], "messages[0]: 'tool_calls' is not supported"),
        ([{**CALLS, "tool_calls": {}}], "messages[0]: 'tool_calls' must be a list"),
        ([{"role": "user"}], "messages[0]: content must be a text"),
        ([{**CALLS, "tool_calls": [{}]}], "tool_calls[0] must be"),
        ([{**CALLS, "tool_calls": [{**CALL, "function": "clock"}]}], "tool_calls[0] must be"),
        ([{**CALLS, "tool_calls": [CALL, {**CALL, "id": None}]}], "tool_calls[1] must be"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            "a part of type 'image_url' cannot be read",
        ),
        (HELLO * 4097, "4,096 at most"),
    ],
)
def test_messages_that_cannot_be_read(messages, says):
    with pytest.raises(BadRequest) as refused:
        chat_request({"messages": messages})
    assert says in str(refused.value)


@pytest.mark.parametrize("prompt", ["text", ["text"], [1, 2], [[1, 2]]])
def test_prompts_are_one_text_or_its_tokens(prompt):
    assert completion_request({"prompt": prompt}).prompt in ("text", [1, 2])


@pytest.mark.parametrize("prompt", [None, "", [], [""], [1.5], [True], {}, ["a", ""], [[1], []]])
def test_other_prompts_are_refused(prompt):
    with pytest.raises(BadRequest):
        completion_request({"prompt": prompt})


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{", b"[]", b"NaN", b'{"a": Infinity}', b"\xff", b"[" * 100_000, b"1" * 5000),
        *('{"a": 1}'.encode(coding) for coding in ("utf-16", "utf-32")),
    ],
)
def test_what_is_no_json_object(body):
    with pytest.raises(BadRequest):
        read_json(body)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
NAMES = ["model", "messages", "prompt", "stop", "n", "tools", "think", "logprobs", "seed"]


@given(st.dictionaries(st.sampled_from(NAMES), VALUES), st.booleans())
def test_whatever_comes_is_a_request_or_refused(body, is_chat):
    parse = chat_request if is_chat else completion_request
    try:
        assert isinstance(parse(body), Request)
    except BadRequest as refused:
        assert refused.status == 400


# --- responses


@pytest.mark.parametrize(
    ("error", "status", "kind", "code"),
    [
        (BadRequest("x"), 400, "invalid_request_error", None),
        (BadRequest("x", status=401), 401, "authentication_error", None),
        (
            errors.ContextOverflow("x", needed_tokens=2, available_tokens=1),
            *(400, "invalid_request_error", "context_length_exceeded"),
        ),
        (
            errors.DoesNotFit("x", tier="host", needed_bytes=2, available_bytes=1),
            *(400, "invalid_request_error", "does_not_fit"),
        ),
        (errors.InputError("x"), 400, "invalid_request_error", None),
        (errors.StorageError("x"), 500, "server_error", "storage_error"),
        (errors.BadCheckpoint("x"), 503, "server_error", "model_unavailable"),
        (KeyError("x"), 500, "server_error", "internal_error"),
        (Stopping(), 503, "server_error", "stopping"),
    ],
)
def test_errors_have_a_status_and_a_type(error, status, kind, code):
    found, body = error_object(error)
    assert found == status and list(body) == ["error"]
    assert body["error"]["type"] == kind and body["error"]["code"] == code
    assert "x" in body["error"]["message"] or isinstance(error, Stopping)


def test_a_refusal_repeats_little_of_what_was_sent():
    for body in ({"messages": [{"role": "x" * 100_000, "content": ""}]}, {"x" * 100_000: 1}):
        with pytest.raises(BadRequest) as refused:
            chat_request(body)
        error = error_object(refused.value)[1]["error"]
        assert "allowed are" in error["message"] or "role must be one of" in error["message"]
        assert len(json.dumps(error)) < 3000


def events(data: bytes) -> list[dict]:
    return [json.loads(part.removeprefix(b"data: ")) for part in data.split(b"\n\n") if part]


def test_thoughts_are_told_from_the_answer():
    answer = CompletionAnswer(chat(), "m")
    output = SimpleNamespace(
        text="No.", thought="Hm.", tool_calls=[], finish_reason="stop", usage={}
    )
    (choice,) = answer.whole(output)["choices"]
    assert choice["message"] == {
        **{"role": "assistant", "content": "No.", "refusal": None},
        "reasoning_content": "Hm.",
    }
    both = events(answer.piece(Piece("No.", [], thought="Hm.")))
    deltas = [event["choices"][0]["delta"] for event in both]
    assert deltas == [{"reasoning_content": "Hm."}, {"content": "No."}]
    assert answer.piece(Piece("", [])) == b""


def test_progress_is_told_to_those_who_ask():
    progress = Progress("prefill", 10, 50, 0.5, 20.0, None)
    started = Started(prompt_tokens=150, cached_tokens=100)
    asked = replace(chat(stream=True), return_progress=True)
    (told,) = events(CompletionAnswer(asked, "m").progress(started, progress))
    assert told["prompt_progress"] == {"total": 150, "cache": 100, "processed": 110, "time_ms": 500}
    assert CompletionAnswer(chat(stream=True), "m").progress(started, progress) == KEEP_ALIVE
    assert CompletionAnswer(asked, "m").progress(None, progress) == KEEP_ALIVE  # of weights


def test_without_the_packages_it_says_what_to_install(monkeypatch):
    from ebbtide.cli import serve

    monkeypatch.setattr(serve, "find_spec", lambda name: None)
    with pytest.raises(errors.InputError, match=r"pip install 'ebbtide\[server\]'"):
        serve._require_packages()


def test_origins_are_what_browsers_send():
    from ebbtide.cli import serve

    for text in ("*", "http://localhost:3000", "https://a.example", "vscode-webview://1a2b"):
        assert serve._origin(text) == text
    assert serve._origin("HTTP://LocalHost") == "http://localhost"
    for wrong in ("", "localhost:3000", "http://localhost:3000/", "http://", "null"):
        with pytest.raises(ValueError, match="is not an origin; allowed are a scheme and"):
            serve._origin(wrong)


def test_a_model_is_known_by_its_name_and_not_by_where_it_lies(monkeypatch, tmp_path):
    from ebbtide.cli.serve import _names

    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(tmp_path))
    (tmp_path / "small").mkdir()
    (tmp_path / "small.gguf").touch()
    builtin = SimpleNamespace(model_name="ebb-nano (built in)")
    for model in (f"{tmp_path}/small/", "~/small", "~/small.gguf"):
        assert _names(builtin, None, model) == ("small", model)
    assert _names(builtin, None, None) == ("ebb-nano",)
    assert _names(builtin, "mine", "org/small") == ("mine", "org/small")


def test_what_is_set_aside_for_requests_leaves_room_for_a_model():
    from ebbtide.cli.serve import _body_size, _most_bytes
    from ebbtide.cli.server import guard
    from ebbtide.cli.server.bodies import reserved_bytes

    assert _most_bytes("auto", "auto", 8) == 2 << 20
    assert _most_bytes("auto", 500 << 20, 8) == (500 << 20) // 1000
    assert _most_bytes("1MiB", 500 << 20, 8) == 1 << 20
    with pytest.raises(typer.BadParameter, match=r"--host-memory is 500.0 MiB"):
        _most_bytes("40MiB", 500 << 20, 8)
    with pytest.raises(ValueError, match="16KiB or more"):
        _body_size("15KiB")
    assert reserved_bytes(1 << 20, 500) - reserved_bytes(1 << 20, 0) > 500 * guard.HEADERS_BYTES


@pytest.mark.parametrize(
    ("name", "neutral", "other"),
    [
        ("return_token_strs", False, True),
        ("add_generation_prompt", True, False),
        ("continue_final_message", False, True),
        ("add_special_tokens", False, True),
    ],
)
def test_tokens_are_asked_for_as_vllm_has_it(name, neutral, other):
    asked = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}
    for value in (neutral, None):
        assert tokenize_query({**asked, name: value}).model == "m"
    with pytest.raises(BadRequest, match=f"'{name}' may only be {str(neutral).lower()} or null"):
        tokenize_query({**asked, name: other})
    with pytest.raises(BadRequest, match="'stop' is unknown here; allowed: model, messages"):
        tokenize_query({**asked, "stop": "x"})


def test_an_event_is_one_line_to_every_reader():
    value = {"text": "a\u2028b\u2029c\x85d\n\\"}
    line, *rest = event(value).decode().splitlines()
    assert json.loads(line.removeprefix("data: ")) == value and rest == [""]


def test_who_asks_too_much_is_told_so_in_openais_words():
    """By which clients know that they must shorten a conversation."""
    error = errors.ContextOverflow("x", needed_tokens=20, available_tokens=10)
    found = error_object(error)[1]["error"]
    assert found["message"] == "This model's maximum context length is 10 tokens: x"
    assert found["code"] == "context_length_exceeded"

"""What a client asks for by OpenAI's Responses API, in Ebbtide's own words.

Nothing is kept between two requests: each brings its whole conversation, as items.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .bad_request import BadRequest, kind_of
from .conversation import Conversation
from .fields import Fields, check_neutral, effort_of, one_function, schema_of, tools_of, typed
from .messages import role_of, text_of
from .request import Request

NOT_KEPT = "no answers are kept here; send the whole conversation in 'input', answers included"
_ROLES = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}
_NAME_CHARS = 127  # with a function's name of 128 and a dot it makes a name
_TEXTS = ("input_text", "output_text", "text")  # parts of contents
_ITEMS = ("message", "reasoning", "function_call", "function_call_output")

_FIELDS = Fields(
    own=(
        *("model", "input", "instructions", "stream", "stream_options", "include"),
        *("text", "reasoning", "tools", "tool_choice", "parallel_tool_calls"),
    ),
    settings={"max_output_tokens": "max_new_tokens"},
    neutral={
        "previous_response_id": ((), NOT_KEPT),
        "conversation": ((), NOT_KEPT),
        "store": ((False,), NOT_KEPT),
        "background": ((False,), "answers come while the connection is open"),
        "context_management": (([],), "a conversation is read as it is sent"),
        "prompt": ((), "no prompts are kept here; send its text in 'instructions'"),
        "moderation": ((), "nothing is moderated here"),
        "top_logprobs": ((0,), "/v1/chat/completions tells log-probabilities"),
    },
    # truncation: what is too long is refused, as the message says then. max_tool_calls: of tools
    # that run on a server.
    ignored=(
        *("user", "metadata", "service_tier", "safety_identifier", "client_metadata"),
        *("prompt_cache_key", "prompt_cache_retention", "prompt_cache_options"),
        *("truncation", "max_tool_calls"),
    ),
)
_INCLUDE_LOGPROBS = "message.output_text.logprobs"


@dataclass(frozen=True)
class ResponsesRequest(Request):
    """namespaces: (namespace, name) of functions, by the one name that the model knows them by.
    settings: what an answer repeats of the request."""

    namespaces: dict[str, tuple[str, str]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


def responses_request(body: dict[str, Any]) -> ResponsesRequest:
    """For /v1/responses. Raises BadRequest."""
    given = _FIELDS.given(body)
    if _INCLUDE_LOGPROBS in typed(given, "include", list, []):
        reason = "/v1/chat/completions tells log-probabilities"
        raise BadRequest(
            f"'include' may not hold {_INCLUDE_LOGPROBS!r}: {reason}.", param="include"
        )
    tools, namespaces = _tools(typed(given, "tools", list, []))
    choice = _choice(given.get("tool_choice", "auto"))
    offered = tools_of({**given, "tools": tools, "tool_choice": choice})
    text, reasoning = typed(given, "text", dict, {}), typed(given, "reasoning", dict, {})
    typed(given, "stream_options", dict)
    generation = _thinking(reasoning) | _FIELDS.generation(given) | _format(text)
    return ResponsesRequest(
        prompt=_messages(given),
        generation=generation | offered,
        model=typed(given, "model", str),
        stream=typed(given, "stream", bool, False),
        namespaces=namespaces,
        settings={
            "temperature": generation.get("temperature"),
            "top_p": generation.get("top_p"),
            "max_output_tokens": generation.get("max_new_tokens"),
            "parallel_tool_calls": typed(given, "parallel_tool_calls", bool, True),
            "tool_choice": choice
            if isinstance(choice, str)
            else {"type": "function", **choice["function"]},
            "reasoning": {"effort": reasoning.get("effort"), "summary": None},
            "text": {} if "json_schema" in generation else {"format": {"type": "text"}},
        },
    )


def _thinking(reasoning: dict[str, Any]) -> dict[str, Any]:
    """summary changes nothing: thoughts are told whole. context: which of them a model is told
    again is its template's business."""
    check_neutral(
        "reasoning.mode", reasoning.get("mode") or "standard", ("standard",), "there is one"
    )
    if reasoning.get("effort") is None:
        return {}
    return {"think": effort_of(reasoning["effort"], "reasoning.effort")}


def _format(text: dict[str, Any]) -> dict[str, Any]:
    """verbosity changes nothing: models are not told of it."""
    format = typed(text, "format", dict, {})
    kind = format.get("type", "text")
    if kind == "text":
        return {}
    if kind == "json_object":
        return {"json_schema": {"type": "object"}}
    if kind == "json_schema":
        return {"json_schema": schema_of(format.get("schema"), "text.format.schema")}
    raise BadRequest(
        f"'text.format' must have the type text, json_object or json_schema, not {kind!r}.",
        param="text.format",
    )


# ---- tools ------------------------------------------------------------------------------------


def _tools(tools: list[Any]) -> tuple[list[dict[str, Any]], dict[str, tuple[str, str]]]:
    """Functions in the shapes of chat completions; and (namespace, name) of those that are in one,
    by the one name that a model knows them by."""
    found: list[dict[str, Any]] = []
    names: dict[str, tuple[str, str]] = {}
    for at, tool in enumerate(tools):
        where = f"tools[{at}]"
        kind = tool.get("type") if isinstance(tool, dict) else kind_of(tool)
        if kind != "namespace":
            found.append(_function(tool, kind, where))
            continue
        space = tool.get("name")
        if not isinstance(space, str) or len(space) > _NAME_CHARS:  # each function will have it
            raise BadRequest(
                f"{where}: a namespace must have a name, a text of {_NAME_CHARS} characters at "
                "most.",
                param="tools",
            )
        for index, inner in enumerate(typed(tool, "tools", list, [])):
            inside = f"{where}.tools[{index}]"
            kind = inner.get("type") if isinstance(inner, dict) else kind_of(inner)
            function = _function(inner, kind, inside)
            name = function["function"]["name"]
            if isinstance(name, str):
                function["function"]["name"] = flat = _flat(space, name)
                names[flat] = space, name
            found.append(function)
    return found, names


def _flat(space: str, name: str) -> str:
    """By what name a model knows a function of a namespace."""
    return f"{space}.{name}"


def _function(tool: Any, kind: Any, where: str) -> dict[str, Any]:
    if kind != "function":
        raise BadRequest(
            f"{where}: a tool of the type {kind!r} cannot be offered; functions are "
            '({"type": "function", "name": ..., "parameters": ...}), alone or in a namespace. '
            "Nothing runs on this server: leave it out, or turn it off in the client.",
            param="tools",
        )
    names = ("name", "description", "parameters", "strict")
    return {"type": "function", "function": {name: tool.get(name) for name in names}}


def _choice(choice: Any) -> Any:
    """In the shapes of chat completions."""
    if isinstance(choice, dict) and choice.get("type") == "function":
        return one_function(choice)
    if isinstance(choice, dict):
        raise BadRequest(
            "'tool_choice' must be auto, none, required, or "
            f'{{"type": "function", "name": ...}}, not of the type {choice.get("type")!r}.',
            param="tool_choice",
        )
    return choice


# ---- items ------------------------------------------------------------------------------------


def _messages(given: dict[str, Any]) -> list[dict[str, Any]]:
    said = Conversation("input")
    if instructions := typed(given, "instructions", str, ""):
        said.say("system", instructions)
    items = given.get("input")
    if isinstance(items, str):
        said.say("user", items)
    elif isinstance(items, list) and items:
        for at, item in enumerate(items):
            _add(said, item, f"input[{at}]")
    else:
        raise BadRequest("'input' must be a text, or a list with at least one item.", param="input")
    return said.messages


def _add(said: Conversation, item: Any, where: str) -> None:
    if not isinstance(item, dict):
        raise BadRequest(f"{where} must be an object, not {kind_of(item)}.", param=where)
    kind = item.get("type") or ("message" if "role" in item else "item_reference")
    if kind == "message":
        role = role_of(item, where, _ROLES)
        said.say(_ROLES[role], text_of(item.get("content"), where, _TEXTS))
    elif kind == "reasoning":
        # Of another server's there may be but a summary, or what only that server can read.
        if item.get("content"):
            said.think(text_of(item["content"], where, ("reasoning_text", "text")))
    elif kind == "function_call":
        given = [item.get(name) for name in ("call_id", "name", "arguments")]
        own = [text for text in given if isinstance(text, str)]
        if len(own) < len(given):
            raise BadRequest(
                f"{where}: a function_call must have 'call_id', 'name' and 'arguments', texts.",
                param=where,
            )
        call_id, name, arguments = own
        space = typed(item, "namespace", str)
        said.call(call_id, name if space is None else _flat(space, name), arguments)
    elif kind == "function_call_output":
        output = text_of(item.get("output"), where, _TEXTS, "output")
        said.result(output, item.get("call_id"), where, "call_id")
    elif kind == "item_reference":
        raise BadRequest(f"{where}: an item cannot be named by its id: {NOT_KEPT}.", param=where)
    else:
        raise BadRequest(
            f"{where}: an item of the type {kind!r} cannot be read; allowed are "
            f"{', '.join(_ITEMS)}.",
            param=where,
        )

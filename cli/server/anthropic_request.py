"""What a client asks for by Anthropic's Messages API, in Ebbtide's own words."""

from __future__ import annotations

import json
import re
from typing import Any

from .bad_request import BadRequest, kind_of
from .conversation import Conversation
from .documents import check_source, titled
from .fields import Fields, check_neutral, effort_of, one_function, schema_of, tools_of, typed
from .messages import role_of, text_of
from .request import Request

_FIELDS = Fields(
    own=(
        *("model", "messages", "system", "stream", "tools", "tool_choice"),
        *("thinking", "output_config", "context_management"),
    ),
    settings={"max_tokens": "max_new_tokens", "stop_sequences": "stop_strings"},
    neutral={
        "container": ((), "nothing runs on this server"),
        "mcp_servers": (([],), "nothing runs on this server"),
    },
    ignored=(
        *("metadata", "cache_control", "service_tier", "inference_geo", "speed"),
        *("diagnostics", "user_profile_id", "workspace_id"),
    ),
)
_BLOCKS = {  # by whose message they are in
    "user": ("text", "document", "tool_result"),
    "assistant": ("text", "thinking", "redacted_thinking", "tool_use"),
    "system": ("text",),
}
_IN_RESULTS = ("text", "document")
# Of a coding agent, at the beginning of its system prompt. It is not for the model, and another
# with each request, so that nothing behind it would ever be found in memory.
_BILLING = re.compile(r"x-anthropic-billing-header:(?:[ \t]*[\w-]+=[^;\n]*;)*\s*")


def anthropic_request(body: dict[str, Any], *, is_counted: bool = False) -> Request:
    """For /v1/messages. is_counted: whether only the prompt's tokens are, which may end with an
    answer then. Raises BadRequest."""
    given = _FIELDS.given(body)
    # Anthropic's way to have a prompt read beforehand.
    only_reads = type(given.get("max_tokens")) is int and given["max_tokens"] == 0
    if only_reads:
        given["max_tokens"] = 1
    _check_edits(typed(given, "context_management", dict, {}))
    generation = _thinking(given) | _FIELDS.generation(given)
    return Request(
        prompt=_messages(given, is_counted),
        only_reads=only_reads,
        generation=generation | _format(given) | _tools(given),
        model=typed(given, "model", str),
        stream=typed(given, "stream", bool, False),
    )


def _thinking(given: dict[str, Any]) -> dict[str, Any]:
    """Whether to think, and how much. budget_tokens is not kept to: max_tokens is, thoughts
    included. display changes nothing: thoughts are told whole."""
    config, effort = typed(given, "thinking", dict, {}), typed(given, "output_config", dict, {})
    kinds = {"enabled": True, "disabled": False, "adaptive": None}
    kind = config.get("type", "adaptive")
    if not isinstance(kind, str) or kind not in kinds:
        raise BadRequest(
            f"'thinking' must have the type {', '.join(kinds)}, not {kind!r}.", param="thinking"
        )
    think: bool | str | None = kinds[kind]
    if effort.get("effort") is not None:
        level = effort_of(effort["effort"], "output_config.effort")
        think = level if think is not False else False
    return {} if think is None else {"think": think}


def _check_edits(management: dict[str, Any]) -> None:
    """Which thoughts of earlier answers a model is told again is its chat template's business; all
    else is read as it is sent."""
    for edit in typed(management, "edits", list, []):
        kind = edit.get("type") if isinstance(edit, dict) else kind_of(edit)
        if not isinstance(kind, str) or not kind.startswith("clear_thinking"):
            raise BadRequest(
                f"'context_management' may not ask for {kind!r}: a conversation is read as it is "
                "sent. Shorten it in the client.",
                param="context_management",
            )


def _format(given: dict[str, Any]) -> dict[str, Any]:
    format = typed(typed(given, "output_config", dict, {}), "format", dict, {})
    if not format:
        return {}
    if format.get("type") != "json_schema":
        raise BadRequest(
            f"'output_config.format' must have the type json_schema, not {format.get('type')!r}.",
            param="output_config.format",
        )
    return {"json_schema": schema_of(format.get("schema"), "output_config.format.schema")}


# ---- tools ------------------------------------------------------------------------------------


def _tools(given: dict[str, Any]) -> dict[str, Any]:
    """In the shapes of chat completions."""
    tools = typed(given, "tools", list, [])
    offered: dict[str, Any] = {"tools": [_tool(tool, at) for at, tool in enumerate(tools)]}
    choice = typed(given, "tool_choice", dict, {})
    kind = choice.get("type", "auto")
    kinds = {"auto": "auto", "any": "required", "none": "none"}
    if kind == "tool":
        offered["tool_choice"] = one_function(choice)
    elif isinstance(kind, str) and kind in kinds:
        offered["tool_choice"] = kinds[kind]
    else:
        raise BadRequest(
            f"'tool_choice' must have the type {', '.join(kinds)} or tool, not {kind!r}.",
            param="tool_choice",
        )
    if typed(choice, "disable_parallel_tool_use", bool, False):
        offered["parallel_tool_calls"] = False
    return tools_of(offered)


def _tool(tool: Any, at: int) -> dict[str, Any]:
    kind = (tool.get("type") or "custom") if isinstance(tool, dict) else kind_of(tool)
    if kind != "custom":
        raise BadRequest(
            f"tools[{at}]: a tool of the type {kind!r} cannot be offered; those with a 'name' and "
            "an 'input_schema' of their own are. Nothing runs on this server: leave it out, or "
            "turn it off in the client.",
            param="tools",
        )
    if tool.get("input_examples"):
        raise BadRequest(
            f"tools[{at}]: 'input_examples' are not told to the model; put them into the "
            "description.",
            param="tools",
        )
    own = {name: tool.get(name) for name in ("name", "description", "strict")}
    return {"type": "function", "function": {**own, "parameters": tool.get("input_schema")}}


# ---- messages ---------------------------------------------------------------------------------


def _messages(given: dict[str, Any], is_counted: bool) -> list[dict[str, Any]]:
    said = Conversation("messages")
    for block in _blocks(given.get("system", ""), _BLOCKS["system"], "system"):
        begin = _BILLING.match(block["text"])
        if text := block["text"][begin.end() if begin else 0 :]:
            said.say("system", text)
    messages = given.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BadRequest("'messages' must be a list with at least one message.", param="messages")
    for at, message in enumerate(messages):
        _add(said, message, f"messages[{at}]")
    if said.ends_with_answer and not is_counted:
        raise BadRequest(
            "The last message must not be the assistant's: an answer that has begun is not "
            "continued here.",
            param="messages",
        )
    return said.messages


def _add(said: Conversation, message: Any, where: str) -> None:
    role = role_of(message, where, _BLOCKS)
    for block in _blocks(message.get("content"), _BLOCKS[role], where):
        kind = block["type"]
        if kind == "text":
            said.say(role, block["text"])
        elif kind == "thinking":
            said.think(block["thinking"])
        elif kind == "tool_use":
            arguments = json.dumps(block["input"], ensure_ascii=False)
            said.call(block["id"], block["name"], arguments)
        elif kind == "tool_result":
            content = [] if block.get("content") is None else block["content"]
            inside = _blocks(content, _IN_RESULTS, f"{where}: tool_result")
            text = "\n".join(part["text"] for part in inside)
            if block.get("is_error") is True:
                text = f"Error: {text}"
            said.result(text, block.get("tool_use_id"), where, "tool_use_id")


def _blocks(content: Any, kinds: tuple[str, ...], where: str) -> list[dict[str, Any]]:
    """The blocks of a content, each with what its type must have; a document is a text then. kinds:
    that it may hold."""
    if isinstance(content, str) or content == []:
        return [{"type": "text", "text": content or ""}]
    if not isinstance(content, list):
        raise BadRequest(
            f"{where}: content must be a text or a list of blocks, not {kind_of(content)}.",
            param=where,
        )
    return [_block(block, kinds, f"{where}.content[{at}]") for at, block in enumerate(content)]


def _block(block: Any, kinds: tuple[str, ...], where: str) -> dict[str, Any]:
    kind = block.get("type") if isinstance(block, dict) else kind_of(block)
    if not isinstance(kind, str) or kind not in kinds:
        raise BadRequest(
            f"{where}: a block of the type {kind!r} cannot be read here; allowed are "
            f"{', '.join(kinds)}. Ebbtide reads text alone, no images, and runs no tools.",
            param=where,
        )
    for name, type in _HOLDS[kind].items():
        if not isinstance(block.get(name), type):
            raise BadRequest(
                f"{where}: {name!r} of a {kind} must be "
                f"{'a text' if type is str else 'an object'}, not {kind_of(block.get(name))}.",
                param=f"{where}.{name}",
            )
    return {"type": "text", "text": _document(block, where)} if kind == "document" else block


def _document(block: dict[str, Any], where: str) -> str:
    """Its text, under its title and what is told of it."""
    cites = typed(block, "citations", dict, {}).get("enabled") or False
    check_neutral(f"{where}.citations.enabled", cites, (False,), "answers are text without them")
    source, inside = block["source"], f"{where}.source"
    check_source(source, inside)
    text = text_of(source["data"] if source["type"] == "text" else source.get("content"), inside)
    return titled(text, typed(block, "title", str, ""), typed(block, "context", str, ""))


_HOLDS: dict[str, dict[str, type]] = {
    "text": {"text": str},
    "thinking": {"thinking": str},
    "redacted_thinking": {},
    "document": {"source": dict},
    "tool_use": {"id": str, "name": str, "input": dict},
    "tool_result": {"tool_use_id": str},
}

"""The messages of a conversation that a client sends, checked: as chat templates take them.

What answers carry when they are sent back is understood, calls of functions among it.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

from .bad_request import BadRequest, kind_of
from .documents import file_text

MOST_MESSAGES = 4096  # a template's time is bounded for each of them
_ROLES = {
    **{"system": "system", "developer": "system", "user": "user", "assistant": "assistant"},
    "tool": "tool",
}
# Of a message: what answers carry when a client sends them back, and what changes nothing.
_MESSAGE_EXTRAS = (
    *("name", "refusal", "annotations", "reasoning_content", "reasoning", "reasoning_details"),
    *("id", "cache_control", "thinking_blocks", "provider_specific_fields"),
)
_OWN = {"assistant": ("tool_calls",), "tool": ("tool_call_id",)}
_INSTEAD = {  # of what was replaced in OpenAI's protocol
    "function_call": "calls are in 'tool_calls', with an id each",
    "function": "what a call gave has the role 'tool', and the call's id in 'tool_call_id'",
}
_FILE_PARTS = ("file", "input_file")  # of chats, and of responses


def messages_of(value: Any) -> list[dict[str, Any]]:
    """Messages as a chat template takes them: a role and a content, a text; calls of functions, and
    results with the name of what was called. Raises BadRequest."""
    if not isinstance(value, list) or not value:
        raise BadRequest("'messages' must be a list with at least one message.", param="messages")
    check_count(value, "messages")
    called: dict[str, str] = {}  # names of functions by the ids of their calls
    return [_message(message, f"messages[{at}]", called) for at, message in enumerate(value)]


def check_count(messages: list[Any], where: str) -> None:
    """Raises BadRequest where there are more than a template's time is bounded for."""
    if len(messages) > MOST_MESSAGES:
        raise BadRequest(
            f"{where!r} may hold {MOST_MESSAGES:,} at most, not {len(messages):,}.", param=where
        )


def _message(message: Any, where: str, called: dict[str, str]) -> dict[str, Any]:
    role = role_of(message, where, _ROLES)
    for name, value in message.items():
        if (
            name in ("role", "content", *_OWN.get(role, ()), *_MESSAGE_EXTRAS)
            or value is None
            or value == []
        ):
            continue
        instead = _INSTEAD.get(name, "a message has a role and a content, a text")
        raise BadRequest(f"{where}: {name!r} is not supported; {instead}.", param=f"{where}.{name}")
    content = message.get("content")
    if content is None and role == "assistant":
        content = ""  # all of its answer was thoughts, or calls
    text = text_of(content, where)
    if message.get("tool_calls") not in (None, []):
        thought = message.get("reasoning_content") or message.get("reasoning")
        return answer_message(text, _calls_of(message, where, called), thought)
    if role == "tool":
        return result_message(text, message.get("tool_call_id"), called, where, "tool_call_id")
    return {"role": _ROLES[role], "content": text}


def role_of(message: Any, where: str, roles: Collection[str]) -> str:
    """Whose a message is. Raises BadRequest for what is no message, or of nobody among `roles`."""
    if not isinstance(message, dict):
        raise BadRequest(f"{where} must be an object with role and content.", param=where)
    role = message.get("role")
    if not isinstance(role, str) or role not in roles:
        instead = f"; {_INSTEAD[role]}" if role == "function" else ""
        raise BadRequest(
            f"{where}: the role must be one of {', '.join(roles)}, not {role!r}{instead}.",
            param=f"{where}.role",
        )
    return role


def answer_message(text: str, calls: list[dict[str, Any]], thought: Any) -> dict[str, Any]:
    """What an assistant said and called, and what it thought before, which some templates want."""
    found: dict[str, Any] = {"role": "assistant", "content": text}
    if calls:
        found["tool_calls"] = calls
        if isinstance(thought, str) and thought and not text:  # a template may refuse to have both
            found |= {"reasoning_content": thought, "thinking": thought}
    return found


def result_message(
    text: str, call_id: Any, called: dict[str, str], where: str, field: str
) -> dict[str, Any]:
    """The result of a call. called: names of functions by the ids of the calls before it; field: of
    the id."""
    if not isinstance(call_id, str) or call_id not in called:
        raise BadRequest(
            f"{where}: '{field}' must be the id of a call in a message before it, not {call_id!r}.",
            param=f"{where}.{field}",
        )
    name = called[call_id]
    return {"role": "tool", "content": text, "tool_call_id": call_id, "name": name}


def _calls_of(message: dict[str, Any], where: str, called: dict[str, str]) -> list[dict[str, Any]]:
    calls = message["tool_calls"]
    if not isinstance(calls, list):
        raise BadRequest(
            f"{where}: 'tool_calls' must be a list, not {kind_of(calls)}.",
            param=f"{where}.tool_calls",
        )
    calls = [_call_of(call, f"{where}.tool_calls[{index}]") for index, call in enumerate(calls)]
    called |= {call["id"]: call["function"]["name"] for call in calls}
    return calls


def _call_of(call: Any, where: str) -> dict[str, Any]:
    """A call, with its arguments as JSON text. Some clients keep them as the object they are."""
    function = call.get("function") if isinstance(call, dict) else None
    if isinstance(function, dict):
        arguments = function.get("arguments")
        if isinstance(arguments, dict):
            arguments = json.dumps(arguments, ensure_ascii=False)
        if all(isinstance(text, str) for text in (call.get("id"), function.get("name"), arguments)):
            return {**call, "function": {**function, "arguments": arguments}}
    raise BadRequest(
        f'{where} must be {{"id": text, "type": "function", '
        '"function": {"name": text, "arguments": JSON as text}}.',
        param=where,
    )


def text_of(
    content: Any, where: str, kinds: tuple[str, ...] = ("text",), field: str = "content"
) -> str:
    """A text, or that of a list of parts. kinds: what such parts may be called; field: that holds
    it."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadRequest(
            f"{where}: {field} must be a text or a list of parts, not {kind_of(content)}.",
            param=f"{where}.{field}",
        )
    return "\n".join(_text_of_part(part, where, kinds, field) for part in content)


def _text_of_part(part: Any, where: str, kinds: tuple[str, ...], field: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else kind_of(part)
    if kind in _FILE_PARTS:
        return file_text(part.get("file") if kind == "file" else part, f"{where}.{field}")
    if kind not in kinds or not isinstance(part.get("text"), str):
        raise BadRequest(
            f"{where}: a part of type {kind!r} cannot be read; "
            f'{{"type": "{kinds[0]}", "text": ...}} is allowed: Ebbtide reads text alone, and '
            "files of text; no images, no sound.",
            param=f"{where}.{field}",
        )
    return part["text"]

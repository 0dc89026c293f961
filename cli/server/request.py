"""What a client asks for: the JSON of a request, checked, in Ebbtide's own words.

Pure functions from a decoded body to a Request. A field that would change the answer and is not
known is refused by name; one that changes nothing is passed over, as clients send many of those.
Knows no model: how long a prompt is, and what a chat template makes of it, is found out later.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from ebbtide import GenerationConfig, errors

MOST_MESSAGES = 4096  # a template's time is bounded for each of them


class BadRequest(Exception):
    """A request that is not answered. status: of HTTP; param: the field that is wrong; code: for
    programs."""

    def __init__(
        self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None
    ):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


@dataclass(frozen=True)
class Request:
    """prompt: messages, text or token ids. generation: names and values for `Session.stream`.
    model: the name that was given. return_progress: whether a stream tells how far reading is."""

    prompt: Any
    generation: dict[str, Any] = field(default_factory=dict)
    model: str | None = None
    stream: bool = False
    include_usage: bool = False
    return_progress: bool = False

    @property
    def is_chat(self) -> bool:
        return isinstance(self.prompt, list) and isinstance(self.prompt[0], dict)


# A client's name for a setting -> Ebbtide's.
_SETTINGS = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "max_new_tokens": "max_new_tokens",
    "stop": "stop_strings",
    "stop_strings": "stop_strings",
    **{
        name: name
        for name in (
            *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "do_sample", "seed"),
            "think",
        )
    },
}
# What changes no answer, whatever its value.
_IGNORED = (
    *("user", "metadata", "store", "service_tier", "safety_identifier", "parallel_tool_calls"),
    *("prompt_cache_key", "prompt_cache_retention"),
)
_ONLY_TEXT = "Ebbtide answers with text alone"
# What other servers offer -> the values that ask for nothing, and why others are refused.
_NEUTRAL: dict[str, tuple[tuple[Any, ...], str]] = {
    "n": ((1,), "there is one answer to a request"),
    "best_of": ((1,), "there is one answer to a request"),
    "presence_penalty": ((0,), "repetition_penalty is what Ebbtide has"),
    "frequency_penalty": ((0,), "repetition_penalty is what Ebbtide has"),
    "logit_bias": (({},), "tokens are chosen by the model alone"),
    "logprobs": ((False,), "probabilities are not told"),
    "top_logprobs": ((0,), "probabilities are not told"),
    "tools": (([],), f"{_ONLY_TEXT} and calls no tools"),
    "tool_choice": (("none", "auto"), f"{_ONLY_TEXT} and calls no tools"),
    "functions": (([],), f"{_ONLY_TEXT} and calls no functions"),
    "function_call": (("none", "auto"), f"{_ONLY_TEXT} and calls no functions"),
    "modalities": ((["text"],), _ONLY_TEXT),
    "verbosity": (("medium",), "say in a message how long the answer should be"),
    "echo": ((False,), "the prompt is not repeated"),
    "suffix": (("",), "text is continued at its end only"),
}
_EFFORTS: dict[str, bool | str] = {
    "none": False,
    "minimal": "low",
    "low": "low",
    "medium": "medium",
    "high": "high",
    "xhigh": "high",
}
_SWITCHES = ("enable_thinking", "thinking")  # of chat templates
_COMMON = ("model", "stream", "stream_options", "return_progress")
_KNOWN = {
    "messages": (*_COMMON, "messages", "reasoning_effort", "chat_template_kwargs"),
    "prompt": (*_COMMON, "prompt"),
}
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
# Of a message: what answers carry when a client sends them back, and what changes nothing.
_MESSAGE_EXTRAS = ("name", "refusal", "annotations", "reasoning_content", "reasoning")


def read_json(body: bytes | bytearray) -> dict[str, Any]:
    """The object that a body holds. Raises BadRequest."""

    def no_number(word: str) -> Any:
        raise ValueError(f"{word} is no JSON")

    try:
        found = json.loads(body.decode("utf-8-sig"), parse_constant=no_number)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"The body is not JSON: {error}.") from None
    if not isinstance(found, dict):
        raise BadRequest(f"The body must be a JSON object, not {_kind(found)}.")
    return found


def chat_request(body: dict[str, Any]) -> Request:
    """For /v1/chat/completions. Raises BadRequest."""
    return _request(body, "messages")


def completion_request(body: dict[str, Any]) -> Request:
    """For /v1/completions. Raises BadRequest."""
    return _request(body, "prompt")


def _request(body: dict[str, Any], asks: str) -> Request:
    """asks: the field that holds what is asked, "messages" or "prompt"."""
    given = {name: value for name, value in body.items() if value is not None}
    known = {*_KNOWN[asks], *_SETTINGS, *_NEUTRAL, *_IGNORED, "response_format"}
    for name, value in given.items():
        if name not in known:
            allowed = ", ".join(sorted({*_KNOWN[asks], *_SETTINGS, "response_format"}))
            raise BadRequest(
                f"{name!r} is not a field that Ebbtide knows; allowed are {allowed}.", param=name
            )
        if name in _NEUTRAL:
            _check_neutral(name, value)
    if asks not in given:
        raise BadRequest(f"{asks!r} is missing.", param=asks)
    options = _typed(given, "stream_options", dict, {})
    return Request(
        prompt=messages_of(given[asks]) if asks == "messages" else _prompt_of(given[asks]),
        generation=_generation(given),
        model=_typed(given, "model", str),
        stream=_typed(given, "stream", bool, False),
        include_usage=_typed(options, "include_usage", bool, False),
        return_progress=_typed(given, "return_progress", bool, False),
    )


def _check_neutral(name: str, value: Any) -> None:
    allowed, reason = _NEUTRAL[name]
    # True is 1 in Python, and no number in JSON.
    is_bool = isinstance(value, bool)
    if not any(value == item and isinstance(item, bool) == is_bool for item in allowed):
        values = " or ".join(map(json.dumps, allowed))
        raise BadRequest(f"{name!r} may only be {values}: {reason}.", param=name)


def _generation(given: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, own in _SETTINGS.items():
        if name not in given:
            continue
        value = given[name]
        try:
            GenerationConfig().resolve(**{own: value})
        except errors.InputError as error:
            text = str(error).replace(own, name, 1)
            raise BadRequest(f"{text}.", param=name) from None
        if found.setdefault(own, value) != value:
            raise BadRequest(f"{name!r} contradicts another field of the same meaning.", param=name)
    if "reasoning_effort" in given:
        effort = given["reasoning_effort"]
        if not isinstance(effort, str) or effort not in _EFFORTS:
            allowed = ", ".join(_EFFORTS)
            raise BadRequest(
                f"'reasoning_effort' must be one of {allowed}, not {effort!r}.",
                param="reasoning_effort",
            )
        found.setdefault("think", _EFFORTS[effort])
    for name, value in _typed(given, "chat_template_kwargs", dict, {}).items():
        if name not in _SWITCHES or not isinstance(value, bool):
            raise BadRequest(
                f"'chat_template_kwargs' may hold {' or '.join(_SWITCHES)}, true or false; "
                f"not {name!r}: {value!r}.",
                param="chat_template_kwargs",
            )
        found.setdefault("think", value)
    if (schema := _schema_of(_typed(given, "response_format", dict, {}))) is not None:
        found["json_schema"] = schema
    return found


def _schema_of(format: dict[str, Any]) -> Any:
    """Of a response_format; None where any text will do."""
    kind = format.get("type", "text")
    where = "response_format"
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    if kind != "json_schema":
        raise BadRequest(
            f"'{where}' must have the type text, json_object or json_schema, not {kind!r}.",
            param=where,
        )
    # strict is what they are always kept to, and the name is for the client.
    schema = _typed(format, "json_schema", dict, {}).get("schema")
    where = f"{where}.json_schema.schema"
    if schema is None:
        raise BadRequest(f"'{where}' is missing.", param=where)
    try:
        GenerationConfig(json_schema=schema)
    except errors.InputError as error:
        raise BadRequest(f"{error}.".replace("json_schema", where, 1), param=where) from None
    return schema


def messages_of(value: Any) -> list[dict[str, str]]:
    """Messages as a chat template takes them: role and content, a text. Raises BadRequest."""
    if not isinstance(value, list) or not value:
        raise BadRequest("'messages' must be a list with at least one message.", param="messages")
    if len(value) > MOST_MESSAGES:
        raise BadRequest(
            f"'messages' may hold {MOST_MESSAGES:,} at most, not {len(value):,}.", param="messages"
        )
    return [_message(message, f"messages[{index}]") for index, message in enumerate(value)]


def _message(message: Any, where: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise BadRequest(f"{where} must be an object with role and content.", param=where)
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        more = "; Ebbtide calls no tools" if role in ("tool", "function") else ""
        raise BadRequest(
            f"{where}: the role must be one of {', '.join(_ROLES)}, not {role!r}{more}.",
            param=f"{where}.role",
        )
    for name, value in message.items():
        if name in ("role", "content", *_MESSAGE_EXTRAS) or value is None or value == []:
            continue
        raise BadRequest(
            f"{where}: {name!r} is not supported; a message has a role and a content, a text.",
            param=f"{where}.{name}",
        )
    content = message.get("content")
    if content is None and role == "assistant":
        content = ""  # all of its answer was thoughts
    return {"role": _ROLES[role], "content": _text_of(content, where)}


def _text_of(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadRequest(
            f"{where}: content must be a text or a list of parts, not {_kind(content)}.",
            param=f"{where}.content",
        )
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else _kind(part)
        if kind != "text" or not isinstance(part.get("text"), str):
            raise BadRequest(
                f"{where}: a part of type {kind!r} cannot be read; "
                '{"type": "text", "text": ...} is allowed: Ebbtide reads text alone, no images, '
                "no sound, no files.",
                param=f"{where}.content",
            )
        texts.append(part["text"])
    return "\n".join(texts)


def _prompt_of(value: Any) -> str | list[int]:
    """A text or token ids; of a list of prompts the one that is in it."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
        value = value[0]
    are_ids = isinstance(value, list) and all(type(item) is int for item in value)
    if not value or not (isinstance(value, str) or are_ids):
        raise BadRequest(
            "'prompt' must be one text, or one list of token ids, and not empty.", param="prompt"
        )
    return value


def _typed(given: dict[str, Any], name: str, kind: type, default: Any = None) -> Any:
    value = given.get(name)
    if value is None:
        return default
    if not isinstance(value, kind):
        names = {str: "a text", bool: "true or false", dict: "an object"}
        raise BadRequest(f"{name!r} must be {names[kind]}, not {_kind(value)}.", param=name)
    return value


def _kind(value: Any) -> str:
    """A value's type, in the words of JSON."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false"}
    return "null" if value is None else names.get(type(value), "a number")

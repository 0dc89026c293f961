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

from .bad_request import BadRequest, kind_of
from .messages import messages_of

__all__ = ["BadRequest", "Request", "chat_request", "completion_request", "read_json"]


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
    def tools(self) -> list[Any]:
        """What the model is told of."""
        is_told = self.generation.get("tool_choice") != "none"
        return self.generation.get("tools", []) if is_told else []

    @property
    def tells_logprobs(self) -> bool:
        return "logprobs" in self.generation

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
            *("temperature", "top_p", "top_k", "min_p", "do_sample", "seed", "think"),
            *("repetition_penalty", "presence_penalty", "frequency_penalty"),
        )
    },
}
# What changes no answer, whatever its value.
_IGNORED = (
    *("user", "metadata", "store", "service_tier", "safety_identifier"),
    *("prompt_cache_key", "prompt_cache_retention"),
)
_ONLY_TEXT = "Ebbtide answers with text alone"
# What other servers offer -> the values that ask for nothing, and why others are refused.
_NEUTRAL: dict[str, tuple[tuple[Any, ...], str]] = {
    "n": ((1,), "there is one answer to a request"),
    "best_of": ((1,), "there is one answer to a request"),
    "logit_bias": (({},), "tokens are chosen by the model alone"),
    "functions": (([],), "tools is what they are called now"),
    "function_call": (("none", "auto"), "tool_choice is what it is called now"),
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
_COMMON = ("model", "stream", "stream_options", "return_progress", "response_format")
_TOOLS = ("tools", "tool_choice", "parallel_tool_calls")
_KNOWN = {
    "messages": (
        *(*_COMMON, "messages", "reasoning_effort", "chat_template_kwargs", *_TOOLS),
        *("logprobs", "top_logprobs"),
    ),
    "prompt": (*_COMMON, "prompt", "logprobs"),
}


def read_json(body: bytes | bytearray) -> dict[str, Any]:
    """The object that a body holds. Raises BadRequest."""

    def no_number(word: str) -> Any:
        raise ValueError(f"{word} is no JSON")

    try:
        found = json.loads(body.decode("utf-8-sig"), parse_constant=no_number)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"The body is not JSON: {error}.") from None
    if not isinstance(found, dict):
        raise BadRequest(f"The body must be a JSON object, not {kind_of(found)}.")
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
    known = {*_KNOWN[asks], *_SETTINGS, *_NEUTRAL, *_IGNORED}
    for name, value in given.items():
        if name not in known:
            allowed = ", ".join(sorted({*_KNOWN[asks], *_SETTINGS}))
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
        generation=_generation(given) | _logprobs(given, asks),
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
    return found | tools_of(given)


def _logprobs(given: dict[str, Any], asks: str) -> dict[str, Any]:
    """A chat asks for them by a switch, and for others' by a number; a plain text by a number."""
    name, num_top = "logprobs", given.get("logprobs", False)
    if asks == "messages":
        is_on, name = _typed(given, "logprobs", bool, False), "top_logprobs"
        num_top = given.get(name, 0)
        if not is_on and num_top != 0:
            raise BadRequest("'top_logprobs' needs 'logprobs': true.", param=name)
        num_top = is_on and num_top
    if num_top is False:
        return {}
    try:
        return {"logprobs": GenerationConfig(logprobs=num_top).logprobs}
    except errors.InputError as error:
        raise BadRequest(f"{error}.".replace("logprobs", name, 1), param=name) from None


def tools_of(given: dict[str, Any]) -> dict[str, Any]:
    """What is offered, and how it is to be used; without any, the rest says nothing."""
    if not given.get("tools"):
        if given.get("tool_choice", "auto") not in ("auto", "none"):
            raise BadRequest(
                "'tool_choice' asks for a call, and no 'tools' are given.", param="tool_choice"
            )
        return {}
    found = {name: given[name] for name in _TOOLS if name in given}
    for name, value in found.items():
        try:
            GenerationConfig(**{"tools": given["tools"], name: value})
        except errors.InputError as error:
            raise BadRequest(f"{error}.", param=name) from None
    return found


def _schema_of(format: dict[str, Any]) -> Any:
    """Of a response_format; None where any text will do."""
    kind, where = format.get("type", "text"), "response_format"
    if kind == "text":
        return None
    if kind == "json_object":
        schema = format.get("schema") or {"type": "object"}
    elif kind == "json_schema":
        # strict is what they are always kept to, and the name is for the client.
        schema = _typed(format, "json_schema", dict, {}).get("schema")
        where = f"{where}.json_schema"
    else:
        raise BadRequest(
            f"'{where}' must have the type text, json_object or json_schema, not {kind!r}.",
            param=where,
        )
    where = f"{where}.schema"
    if schema is None:
        raise BadRequest(f"'{where}' is missing.", param=where)
    try:
        GenerationConfig(json_schema=schema)
    except errors.InputError as error:
        raise BadRequest(f"{error}.".replace("json_schema", where, 1), param=where) from None
    return schema


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
        raise BadRequest(f"{name!r} must be {names[kind]}, not {kind_of(value)}.", param=name)
    return value

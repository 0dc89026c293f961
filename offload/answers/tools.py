"""Functions that a model is offered, and calls of them: checked, in OpenAI's shapes.

    offered  {"type": "function", "function": {"name", "description", "parameters", "strict"}}
    called   {"id", "type": "function", "function": {"name", "arguments"}}

Knows no templates and no tokens: how a model writes a call is `tool_formats.py`'s business.
"""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import InputError
from ..output import ToolCall
from ..text.control_text import SURROGATE
from .json_schema import check_kept, shown_schema

MAX_TOOLS = 128
CHOICES = ("auto", "none", "required")
# OpenAI takes 64 characters, Anthropic and MCP 128; with a namespace before them twice as many.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,255}")
_NO_PARAMETERS = {"type": "object", "properties": {}}
# Mistral's templates take ids of nine letters and digits alone; others take any.
_ID_CHARS, _ID_LENGTH = string.ascii_letters + string.digits, 9


def checked_tools(name: str, value: Any) -> tuple[dict[str, Any], ...]:
    """A copy of what is offered. InputError names what is wrong; name: of the setting."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise InputError(f"{name} must be a list of functions, not {type(value).__name__}")
    if len(value) > MAX_TOOLS:
        raise InputError(f"{name} may hold {MAX_TOOLS} functions at most, not {len(value)}")
    tools = [_checked_tool(tool, f"{name}[{index}]") for index, tool in enumerate(value)]
    names = [name_of(tool) for tool in tools]
    for index, own in enumerate(names):
        if own in names[:index]:
            raise InputError(f"{name}[{index}]: there is a function {own!r} before it")
    return tuple(tools)


def _checked_tool(tool: Any, where: str) -> dict[str, Any]:
    kind = tool.get("type") or "function" if isinstance(tool, Mapping) else None
    function = tool.get("function") if kind == "function" else None
    if not isinstance(function, Mapping):
        given = "" if kind in (None, "function") else f", not of the type {kind!r}"
        raise InputError(
            f'{where} must be {{"type": "function", "function": {{"name": ...}}}}{given}'
        )
    name = function.get("name")
    _check_name(where, name)
    if not isinstance(function.get("description") or "", str):
        raise InputError(f"{where}: the description of {name} must be text")
    parameters = function.get("parameters")
    if parameters is None:
        parameters = _NO_PARAMETERS
    text = shown_schema(f"{where}: the parameters of {name}", parameters)
    parameters = json.loads(text)
    if isinstance(parameters, dict):
        # Templates walk through these without asking; some clients send null for none.
        given = {key: own for key, own in parameters.items() if own is not None}
        parameters = {"type": "object", "properties": {}, **given}
    if not isinstance(parameters, dict) or parameters["type"] != "object":
        raise InputError(f'{where}: the parameters of {name} must have the type "object"')
    if not isinstance(parameters["properties"], dict):
        raise InputError(f"{where}: the properties of {name} must be an object")
    required = parameters.get("required", [])
    if not isinstance(required, list) or not all(isinstance(key, str) for key in required):
        raise InputError(f"{where}: required must be a list of names for {name}, not {required!r}")
    strict = function.get("strict") or False
    if not isinstance(strict, bool):
        raise InputError(f"{where}: strict must be True or False for {name}, not {strict!r}")
    described = function.get("description") or ""
    own = {"name": name, "description": described, "parameters": parameters, "strict": strict}
    return {"type": "function", "function": own}


def _check_name(where: str, name: Any) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InputError(
            f"{where}: a function's name must be 1 to 256 letters, digits, '_', '-' or '.', "
            f"not {name!r}"
        )


def shown_tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    """What a model is told of a tool: not how its answer is kept to it."""
    own = {name: value for name, value in tool["function"].items() if name != "strict"}
    return {"type": "function", "function": own}


def name_of(tool: Mapping[str, Any]) -> str:
    return tool["function"]["name"]


def parameters_of(tools: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The schema of each function's arguments, by its name."""
    return {name_of(tool): tool["function"]["parameters"] for tool in tools}


def check_kept_calls(tools: Iterable[Mapping[str, Any]]) -> None:
    """InputError for functions whose arguments cannot be kept to their schemas."""
    for name, schema in parameters_of(tools).items():
        check_kept(f"the parameters of {name}", schema)


def check_argument_names(function: str, names: Iterable[str], signs: str) -> None:
    """InputError for names that a format of calls cannot tell from what stands around them: blanks
    at their ends, or one of its signs."""
    for name in names:
        if not name or name != name.strip() or any(sign in name for sign in signs):
            raise InputError(
                f"the arguments of {function}: as the model writes calls, a name may be neither "
                f"empty nor have blanks at its ends or one of {signs!r}; {name!r} is none"
            )


def checked_choice(name: str, value: Any) -> str | dict[str, Any]:
    """One of CHOICES, or the one function that must be called."""
    if isinstance(value, str) and value in CHOICES:
        return value
    given = value if isinstance(value, Mapping) else {}
    function = given.get("function")
    own = function.get("name") if isinstance(function, Mapping) else None
    if given.get("type") != "function" or not isinstance(own, str):
        raise InputError(
            f"{name} must be {', '.join(CHOICES)}, or "
            f'{{"type": "function", "function": {{"name": ...}}}}, not {value!r}'
        )
    return {"type": "function", "function": {"name": own}}


@dataclass
class Calls:
    """What an answer has called so far. offered: schemas of arguments by the function's name; most:
    calls that are taken, or None for any number."""

    offered: Mapping[str, Mapping[str, Any]]
    most: int | None = None

    def __post_init__(self) -> None:
        self.num_found = 0
        self._new: list[ToolCall] = []

    @property
    def are_enough(self) -> bool:
        return self.most is not None and self.num_found >= self.most

    def add(self, found: Sequence[tuple[Any, Any]] | None) -> bool:
        """Names and arguments that were read. False, and none is taken, where one is no call."""
        made = [self._made(name, arguments) for name, arguments in found or ()]
        if not made or None in made:
            return False
        room = len(made) if self.most is None else self.most - self.num_found
        taken = [call for call in made[: max(0, room)] if call is not None]
        self._new += taken
        self.num_found += len(taken)
        return True

    def take(self) -> list[ToolCall]:
        """The calls since the last time."""
        taken, self._new = self._new, []
        return taken

    def _made(self, name: Any, arguments: Any) -> ToolCall | None:
        if isinstance(arguments, str):
            arguments = read_json(arguments)
        if not isinstance(name, str) or name not in self.offered or not isinstance(arguments, dict):
            return None
        try:
            text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        except (ValueError, RecursionError):  # a number that is too large is none
            return None
        text = SURROGATE.sub("\ufffd", text)  # nobody can encode them
        own = "".join(secrets.choice(_ID_CHARS) for _ in range(_ID_LENGTH))
        return ToolCall(own, name, text)


# A string of JSON's. end: the quote that ends it, or "" where none does. (No part of it is tried
# again: else a text of many quotes took time by its square.)
JSON_STRING = re.compile(r'"(?:[^"\\\x00-\x1f]|\\.)*+(?P<end>"?)')


def ends_in_string(text: str, strings: re.Pattern[str] = JSON_STRING) -> bool:
    """Whether text that was cut off ends within a string: one that has not ended, nor has its
    line."""
    begun = next((found for found in strings.finditer(text) if not found["end"]), None)
    return begun is not None and "\n" not in text[begun.end() :]


def read_json(text: str) -> Any:
    """The value that a text is; None where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def checked_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """The tool_calls of a message, with arguments as objects, as templates take them. InputError
    says what is wrong."""
    if not isinstance(calls, list):
        raise InputError(f"{where}: tool_calls must be a list, not {type(calls).__name__}")
    checked = []
    for index, call in enumerate(calls):
        at = f"{where}.tool_calls[{index}]"
        function = call.get("function") if isinstance(call, dict) else None
        function = function if isinstance(function, dict) else {}
        name = function.get("name")
        if not isinstance(name, str):
            raise InputError(f'{at} must be {{"id", "function": {{"name", "arguments"}}}}')
        _check_name(at, name)
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            arguments = read_json(arguments) if arguments.strip() else {}
        if not isinstance(arguments, dict):
            raise InputError(f"{at}: arguments must be an object, or its JSON as text")
        checked.append(
            {**call, "type": "function", "function": {"name": name, "arguments": arguments}}
        )
    return checked

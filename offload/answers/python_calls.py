"""Calls as Python writes them, with arguments by name: LFM2's format.

<|tool_call_start|>[weather(place="Varn", days=[1, 2], exact=True), clock()]<|tool_call_end|>
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from .grammar import RuleWriter
from .json_schema import property_schema, text_choices
from .tools import Calls, check_argument_names, ends_in_string

PYTHON_MARKS = ("<|tool_call_start|>", "<|tool_call_end|>")
_CALL = re.compile(r"([A-Za-z0-9_.-]+)\s*\(")
_NAME = re.compile(r"([^\s=,()\[\]{}'\"]+)\s*=\s*")
_STRING = re.compile(r"""(['"])(?:[^'"\\\n]|(?!\1)['"]|\\.)*+(?P<end>\1?)""", re.DOTALL)
_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]*)?([eE][-+]?[0-9]+)?")
_WORD = re.compile(r"[A-Za-z]+")
_WORDS = {"True": True, "False": False, "None": None, "true": True, "false": False, "null": None}
_BLANKS = re.compile(r"\s*")
_ESCAPE = re.compile(r"\\(u[0-9A-Fa-f]{4}|U[0-9A-Fa-f]{8}|x[0-9A-Fa-f]{2}|.)", re.DOTALL)
_ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "\n": ""}
_ESCAPED |= {sign: sign for sign in "\\'\"/"}
_MOST_DEPTH = 32


def read_python(block: str, calls: Calls) -> list[tuple[str, Any]] | None:
    """See ToolFormat."""
    text = block.removeprefix(PYTHON_MARKS[0]).removesuffix(PYTHON_MARKS[1]).strip()
    try:
        if not text.startswith("["):
            call, end = _call(text, 0)
            return None if text[end:] else [call]
        found, end = _items(text, 1, "]", _call)
    except ValueError:
        return None
    return None if text[end:] else found


def is_open_python(block: str, calls: Calls) -> bool:
    """See ToolFormat: a text has begun, and neither it nor its line has ended."""
    return ends_in_string(block, _STRING)


def python_value(text: str, at: int = 0) -> tuple[Any, int]:
    """The value that begins at a place, and where the blanks behind it end; ValueError where none
    does."""
    value, end = _value(text, _behind_blanks(text, at))
    return value, _behind_blanks(text, end)


def spell_python(calls: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """How a model writes these calls."""
    spelled = []
    for name, arguments in calls:
        pairs = (f"{key}={_spelled(value)}" for key, value in arguments.items())
        spelled.append(f"{name}({', '.join(pairs)})")
    return f"{PYTHON_MARKS[0]}[{', '.join(spelled)}]{PYTHON_MARKS[1]}"


def _spelled(value: Any) -> str:
    if isinstance(value, dict):
        pairs = (f"{_spelled(key)}: {_spelled(own)}" for key, own in value.items())
        return f"{{{', '.join(pairs)}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_spelled, value))}]"
    if value is None or isinstance(value, bool):
        return str(value)
    return json.dumps(value, ensure_ascii=False)


# ---- reading: (what begins at a place, where it ends). These raise ValueError. -------------------


def _behind_blanks(text: str, at: int) -> int:
    found = _BLANKS.match(text, at)
    assert found is not None
    return found.end()


def _items(text: str, at: int, closing: str, read: Callable[[str, int], Any]) -> tuple[list, int]:
    """What stands between commas up to a closing."""
    found: list[Any] = []
    at = _behind_blanks(text, at)
    while not text.startswith(closing, at):
        item, at = read(text, at)
        found.append(item)
        at = _behind_blanks(text, at)
        if text.startswith(",", at):
            at = _behind_blanks(text, at + 1)
        elif not text.startswith(closing, at):
            raise ValueError("neither a comma nor an end")
    return found, at + 1


def _call(text: str, at: int) -> tuple[tuple[str, dict[str, Any]], int]:
    head = _CALL.match(text, at)
    if head is None:
        raise ValueError("no call")
    arguments, end = _items(text, head.end(), ")", _argument)
    return (head[1], dict(arguments)), end


def _argument(text: str, at: int) -> tuple[tuple[str, Any], int]:
    name = _NAME.match(text, at)
    if name is None:
        raise ValueError("an argument without a name")
    value, end = _value(text, name.end())
    return (name[1], value), end


def _value(text: str, at: int, depth: int = 0) -> tuple[Any, int]:
    if depth > _MOST_DEPTH:
        raise ValueError("too deep")

    def inner(text: str, at: int) -> tuple[Any, int]:
        return _value(text, at, depth + 1)

    def pair(text: str, at: int) -> tuple[tuple[str, Any], int]:
        key, at = inner(text, at)
        at = _behind_blanks(text, at)
        if not isinstance(key, str) or not text.startswith(":", at):
            raise ValueError("a name without a value")
        value, at = inner(text, _behind_blanks(text, at + 1))
        return (key, value), at

    if text.startswith("{", at):
        pairs, end = _items(text, at + 1, "}", pair)
        return dict(pairs), end
    for opening, closing in ("[]", "()"):
        if text.startswith(opening, at):
            return _items(text, at + 1, closing, inner)
    if (found := _STRING.match(text, at)) and found["end"]:
        return _unescaped(found[0][1:-1]), found.end()
    if found := _NUMBER.match(text, at):
        is_whole = found[1] is None and found[2] is None
        return (int if is_whole else float)(found[0]), found.end()
    found = _WORD.match(text, at)
    if found is None or found[0] not in _WORDS:
        raise ValueError("no value")
    return _WORDS[found[0]], found.end()


def _unescaped(text: str) -> str:
    def sign(found: re.Match[str]) -> str:
        code = found[1]
        if len(code) > 1:
            number = int(code[1:], 16)
            if number > sys.maxunicode:
                raise ValueError("no character")
            return chr(number)
        return _ESCAPED.get(code, found[0])

    text = _ESCAPE.sub(sign, text)
    # Two halves of a character, as JSON escapes them, become one.
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


# ---- writing -----------------------------------------------------------------------------------


def write_python(rules: RuleWriter, name: str, schema: dict[str, Any]) -> str:
    """Arguments in the schema's order. Values are kept to their schemas where Python writes them as
    JSON does, and to their types elsewhere; what stands in objects is free."""
    check_argument_names(name, schema["properties"], "=,()[]{}'\" ")
    required = schema.get("required", ())
    arguments = [
        (
            f"{rules.text(f'{key}=')} {python_rule(rules, name, property_schema(schema, key))}",
            key in required,
        )
        for key in schema["properties"]
    ]
    return f"{rules.text(f'{name}(')} {rules.separated(arguments, ', ')} {rules.text(')')}"


_RULES = {
    "boolean": "python_boolean",
    "null": "python_null",
    "array": "python_list",
    "object": "python_object",
}


def python_rule(rules: RuleWriter, name: str, schema: Any) -> str:
    """An expression for an argument of a function; `add_python_values` says what it refers to."""
    if _is_json(schema):
        return rules.arguments(name, schema)
    kind = schema.get("type") if isinstance(schema, dict) else None
    return _RULES.get(kind, "python_value") if isinstance(kind, str) else "python_value"


def _is_json(schema: Any) -> bool:
    """Whether Python writes all values of a schema as JSON does: no truth, no null."""
    if not isinstance(schema, dict) or "$ref" in schema:
        return False
    if schema.get("type") == "array":
        return _is_json(schema.get("items"))
    return schema.get("type") in ("string", "integer", "number") or bool(text_choices(schema))


def add_python_values(rules: RuleWriter) -> None:
    """Any value."""
    text = rules.schema('{"type": "string"}')
    number = rules.schema('{"type": "number"}')
    rules.add(
        f"python_value: {text} | {number} | python_boolean | python_null | python_list"
        " | python_object"
    )
    rules.add('python_boolean: "True" | "False"')
    rules.add('python_null: "None"')
    rules.add('python_list: "[" (python_value (", " python_value)*)? "]"')
    rules.add('python_object: "{" (python_pair (", " python_pair)*)? "}"')
    rules.add(f'python_pair: {text} ": " python_value')

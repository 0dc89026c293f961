"""Calls whose arguments stand between tags, each by itself: Qwen3-Coder's and GLM's formats.

    <tool_call>                          <tool_call>weather
    <function=weather>                   <arg_key>place</arg_key>
    <parameter=place>                    <arg_value>Varn</arg_value>
    Varn                                 </tool_call>
    </parameter>
    </function>
    </tool_call>

Texts stand there as they are, all else as JSON; the function's schema says which it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from .grammar import RuleWriter, literal
from .json_schema import text_choices
from .tools import Calls, check_argument_names, read_json

_TAGGED = re.compile(r"<tool_call>\s*<function=([^>\n]+)>(.*)</function>\s*</tool_call>", re.DOTALL)
_PARAMETER = re.compile(r"\s*<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>\s*", re.DOTALL)
_KEYED = re.compile(r"<tool_call>\s*([^<\s]+)\s*(.*)</tool_call>", re.DOTALL)
_END = "</function>\n</tool_call>"
_PAIR = re.compile(r"\s*<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>\s*", re.DOTALL)

_TYPES = {  # of what JSON becomes: JSON schema's
    str: ("string",),
    bool: ("boolean",),
    int: ("integer", "number"),
    float: ("number", "integer"),
    type(None): ("null",),
    list: ("array",),
    dict: ("object",),
}


def read_tagged(block: str, calls: Calls) -> list[tuple[str, Any]] | None:
    return _read(block, calls, _TAGGED, _PARAMETER)


def read_keyed(block: str, calls: Calls) -> list[tuple[str, Any]] | None:
    return _read(block, calls, _KEYED, _PAIR)


def _read(
    block: str, calls: Calls, whole: re.Pattern[str], pair: re.Pattern[str]
) -> list[tuple[str, Any]] | None:
    """pair: matches one argument, its name and its value."""
    found = whole.fullmatch(block)
    if found is None:
        return None
    name, rest = found[1].strip(), found[2]
    known = calls.offered.get(name, {}).get("properties", {})
    arguments, end = {}, 0
    while end < len(rest) and (argument := pair.match(rest, end)):
        key = argument[1].strip()
        arguments[key] = _value(argument[2], known.get(key))
        end = argument.end()
    return [(name, arguments)] if not rest[end:].strip() else None


def _value(text: str, schema: Any) -> Any:
    """What an argument's text stands for."""
    if _is_text(schema):
        return text
    value = read_json(text.strip())
    if value is None and text.strip() != "null":
        # As Python writes them, in which some templates write arguments back.
        value = {"True": True, "False": False, "None": None}.get(text.strip(), text)
    types = _types(schema)
    return text if "string" in types and types.isdisjoint(_TYPES[type(value)]) else value


def _types(schema: Any) -> set[str]:
    """Those that a schema names, in itself and in its alternatives."""
    if not isinstance(schema, Mapping):
        return set()
    own = schema.get("type")
    types = {kind for kind in (own if isinstance(own, list) else [own]) if isinstance(kind, str)}
    for name in ("anyOf", "oneOf"):
        each = schema.get(name)
        types.update(*map(_types, each if isinstance(each, list) else ()))
    return types


def _is_text(schema: Any) -> bool:
    """Whether a schema asks for text; what has none is text too."""
    if not isinstance(schema, Mapping) or not schema:
        return True
    if "type" in schema:
        return schema["type"] == "string"
    return text_choices(schema) is not None


def write_tagged(rules: RuleWriter, name: str, schema: dict[str, Any]) -> str:
    def opening(key: str) -> str:
        return f"<parameter={key}>\n"

    arguments = _arguments(rules, name, schema, opening, "\n", "</parameter>")
    start = rules.text(f"\n<function={name}>\n")
    return f"{start} {arguments} {rules.text(_END)}"


def write_keyed(rules: RuleWriter, name: str, schema: dict[str, Any]) -> str:
    def opening(key: str) -> str:
        return f"<arg_key>{key}</arg_key>\n<arg_value>"

    arguments = _arguments(rules, name, schema, opening, "", "</arg_value>")
    start = rules.text(f"{name}\n")
    return f"{start} {arguments} {rules.text('</tool_call>')}"


def _arguments(
    rules: RuleWriter,
    name: str,
    schema: dict[str, Any],
    opening: Callable[[str], str],
    before_closing: str,
    closing: str,
) -> str:
    """An expression for all arguments, in the schema's order. What stands around a value: `opening`
    of its name, and before_closing and closing."""
    check_argument_names(name, schema["properties"], "<>\n")
    parts = []
    after, line_end = rules.text(f"{before_closing}{closing}\n"), rules.text("\n")
    for key, own in schema["properties"].items():
        choices = text_choices(own)
        if choices is not None:
            value = f"({' | '.join(map(literal, choices))}) {after}"
        elif _is_text(own):
            # It ends with the first closing, for who reads it too.
            value = f"{rules.up_to(closing)} {line_end}"
        else:
            whole = {**_definitions(schema), **_object(own)}
            value = f"{rules.arguments(name, whole)} {after}"
        is_needed = key in schema.get("required", ())
        parts.append(f"({rules.text(opening(key))} {value}){'' if is_needed else '?'}")
    return " ".join(parts)


def _definitions(schema: dict[str, Any]) -> dict[str, Any]:
    """What a part of a schema may refer to."""
    return {name: schema[name] for name in ("$defs", "definitions") if name in schema}


def _object(schema: Any) -> dict[str, Any]:
    return schema if isinstance(schema, dict) else {}

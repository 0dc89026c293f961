"""Calls as Gemma 4 writes them: JSON without quotes around names, and with a control token for
quotes around texts.

    <|tool_call>call:weather{days:[1,2],place:<|"|>Varn<|"|>}<tool_call|>
"""

from __future__ import annotations

import re
from typing import Any

from .grammar import RuleWriter, literal
from .json_schema import text_choices
from .tools import Calls, check_argument_names, read_json

_QUOTE = '<|"|>'
_CALL = re.compile(r"<\|tool_call>call:([^{\s]+)(\{.*)<tool_call\|>", re.DOTALL)
_PLAIN = re.compile(r"[^,}\]]*")  # a number or a word
_KEY = re.compile(r"([^:,{}\[\]]+):")
_WORDS = {"true": True, "false": False, "null": None, "None": None}
_MOST_DEPTH = 32


def read_gemma(block: str, calls: Calls) -> list[tuple[str, Any]] | None:
    found = _CALL.fullmatch(block)
    if found is None:
        return None
    try:
        value, end = _value(found[2], 0, 0)
    except ValueError:
        return None
    return [(found[1], value)] if not found[2][end:].strip() else None


def is_open_gemma(block: str, calls: Calls) -> bool:
    """See ToolFormat: a text has begun and not ended."""
    return block.count(_QUOTE) % 2 == 1


def _value(text: str, at: int, depth: int) -> tuple[Any, int]:
    """(the value that begins at a place, where it ends). Raises ValueError."""
    if depth > _MOST_DEPTH:
        raise ValueError("too deep")
    if text.startswith(_QUOTE, at):
        start = at + len(_QUOTE)
        end = text.index(_QUOTE, start)
        return text[start:end], end + len(_QUOTE)
    if text.startswith(("{", "["), at):
        return _items(text, at, depth)
    found = _PLAIN.match(text, at)
    assert found is not None
    word = found[0].strip()
    value = _WORDS[word] if word in _WORDS else read_json(word)
    if value is None and word not in _WORDS:
        raise ValueError(f"{word!r} is no value")
    return value, found.end()


def _items(text: str, at: int, depth: int) -> tuple[Any, int]:
    """Of an object or a list."""
    closing = "}" if text[at] == "{" else "]"
    pairs: dict[str, Any] = {}
    values: list[Any] = []
    at += 1
    while not text.startswith(closing, at):
        if closing == "}":
            key, at = _key(text, at)
            pairs[key], at = _value(text, at, depth + 1)
        else:
            value, at = _value(text, at, depth + 1)
            values.append(value)
        if text.startswith(",", at):
            at += 1
        elif not text.startswith(closing, at):
            raise ValueError("neither a comma nor an end")
    return (pairs if closing == "}" else values), at + 1


def _key(text: str, at: int) -> tuple[str, int]:
    if text.startswith(_QUOTE, at):
        key, at = _value(text, at, 0)
        if not text.startswith(":", at):
            raise ValueError("a name without a value")
        return key, at + 1
    found = _KEY.match(text, at)
    if found is None:
        raise ValueError("no name")
    return found[1].strip(), found.end()


def write_gemma(rules: RuleWriter, name: str, schema: dict[str, Any]) -> str:
    """Names in the order of the alphabet, as the template writes them. What values are is the
    schema's where it is a plain type or a choice of texts, and any value elsewhere."""
    properties = schema["properties"]
    check_argument_names(name, properties, ":,{}[]")
    arguments = [
        (f"{rules.text(f'{key}:')} {_rule(rules, own)}", key in schema.get("required", ()))
        for key, own in sorted(properties.items())
    ]
    first = rules.separated(arguments, ",")
    start = rules.text(f"call:{name}{{")
    return f"{start} {first} {rules.text('}<tool_call|>')}"


_TYPES = {
    "string": "gemma_text",
    "integer": "GEMMA_INTEGER",
    "number": "GEMMA_NUMBER",
    "boolean": "gemma_boolean",
    "null": "gemma_null",
    "array": "gemma_list",
    "object": "gemma_object",
}


def _rule(rules: RuleWriter, schema: Any) -> str:
    choices = text_choices(schema)
    if choices is not None:
        quote = rules.text(_QUOTE)
        return f"{quote} ({' | '.join(map(literal, choices))}) {quote}"
    kind = schema.get("type") if isinstance(schema, dict) else None
    return _TYPES.get(kind, "gemma_value") if isinstance(kind, str) else "gemma_value"


def add_gemma_values(rules: RuleWriter) -> None:
    """Any value."""
    quote = rules.text(_QUOTE)
    rules.add("gemma_value: gemma_plain | gemma_text | gemma_list | gemma_object")
    rules.add("gemma_plain: GEMMA_NUMBER | gemma_boolean | gemma_null")
    rules.add(f"gemma_text: {quote} {rules.up_to(_QUOTE)}")
    rules.add('gemma_boolean: "true" | "false"')
    rules.add('gemma_null: "null"')
    rules.add('gemma_list: "[" (gemma_value ("," gemma_value)*)? "]"')
    rules.add('gemma_object: "{" (GEMMA_KEY ":" gemma_value ("," GEMMA_KEY ":" gemma_value)*)? "}"')
    rules.add("GEMMA_KEY: /[A-Za-z0-9_. -]+/")
    rules.add("GEMMA_INTEGER: /-?(0|[1-9][0-9]*)/")
    rules.add("GEMMA_NUMBER: /-?(0|[1-9][0-9]*)(\\.[0-9]+)?([eE][-+]?[0-9]+)?/")

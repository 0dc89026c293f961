"""JSON schemas as callers give them: checked for what every schema must be, and bounded.

Whether a schema can be followed is known only when it is compiled (`constraint.py`). Knows no
tokens and no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..errors import InputError
from ..text.control_text import check_text

MAX_SCHEMA_CHARS = 64 * 1024  # those of real programs have up to some 20,000
_MAX_DEPTH = 64  # of lists and objects within one another
_MOST_MET = 6  # patterns and formats that one text may have to match
_PATTERNS = ("pattern", "format")
_MOST_WHOLE = (
    2**53 - 1
)  # that a double tells from its neighbours, which llguidance makes of numbers
_INNER = (  # what else may hold them
    *("properties", "patternProperties", "additionalProperties", "items", "prefixItems"),
)
ANY_OBJECT = '{"type": "object"}'


def checked_schema(name: str, value: Any) -> str:
    """A schema that an answer is kept to, as JSON text. value: an object as a mapping, or its JSON
    as text. InputError names what is wrong; name: of the setting, for that."""
    text = shown_schema(name, value)
    check_kept(name, json.loads(text))
    return text


def check_kept(name: str, schema: Any) -> None:
    """InputError for what a text that is kept to a schema could not be, or only at great cost."""
    objects = list(_objects(name, schema, 0))
    _check_patterns(name, objects)
    _check_choices(name, objects)


def shown_schema(name: str, value: Any) -> str:
    """The same of a schema that a model may only be told of."""
    if isinstance(value, str):
        value = _read(name, value)
    if not isinstance(value, Mapping | bool):
        raise InputError(
            f"{name} must be a JSON schema, an object such as {ANY_OBJECT}, not "
            f"{type(value).__name__}"
        )
    for _ in _objects(name, value, 0):  # none is too deep
        pass
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} holds what is not JSON: {error}") from None
    check_text(text, name)
    if len(text) > MAX_SCHEMA_CHARS:
        raise InputError(
            f"{name} has {len(text):,} characters as JSON; {MAX_SCHEMA_CHARS:,} are allowed"
        )
    return text


def text_choices(schema: Any) -> list[str] | None:
    """The texts that a schema leaves to choose from; None where other values or any text may be."""
    if not isinstance(schema, Mapping) or not ("enum" in schema or "const" in schema):
        return None
    choices = schema["enum"] if "enum" in schema else [schema["const"]]
    if not isinstance(choices, list) or not choices:
        return None
    return choices if all(isinstance(choice, str) for choice in choices) else None


def property_schema(schema: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A property's own schema, with the definitions that it may refer to."""
    own = schema["properties"][key]
    definitions = {name: schema[name] for name in ("$defs", "definitions") if name in schema}
    return {**definitions, **(own if isinstance(own, dict) else {})}


def _read(name: str, text: str) -> Any:
    def no_number(word: str) -> Any:
        raise ValueError(f"{word} is no JSON")

    try:
        return json.loads(text, parse_constant=no_number)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name} is not JSON: {error}") from None


def _objects(name: str, value: Any, depth: int) -> Iterator[Mapping[str, Any]]:
    """All in a schema. InputError where it is too deep."""
    if depth > _MAX_DEPTH:
        raise InputError(f"{name} is nested more than {_MAX_DEPTH} deep")
    if isinstance(value, Mapping):
        yield value
    items = value.values() if isinstance(value, Mapping) else value
    for item in items if isinstance(value, Mapping | list | tuple) else ():
        yield from _objects(name, item, depth + 1)


def _check_patterns(name: str, objects: Sequence[Mapping[str, Any]]) -> None:
    """What a text must match all of takes time and memory that triple with each pattern."""
    given = [each for each in objects for key in _PATTERNS if isinstance(each.get(key), str)]
    if len(given) > _MOST_MET and any(_num_joined(each) > 1 for each in objects):
        raise InputError(
            f"{name} has {len(given)} patterns and formats; {_MOST_MET} are allowed in a schema "
            "with parts that must hold together (allOf, or $ref, anyOf or oneOf beside others)"
        )


def _check_choices(name: str, objects: Sequence[Mapping[str, Any]]) -> None:
    """Numbers to choose from that would be written as others."""
    for each in objects:
        for number in [*_whole(each.get("const")), *_whole(each.get("enum"))]:
            if abs(number) > _MOST_WHOLE:
                raise InputError(
                    f"{name} has {number} to choose from; whole numbers are kept to exactly up to "
                    f"{_MOST_WHOLE}: make it a text"
                )


def _whole(choices: Any) -> Iterator[int]:
    """The whole numbers in a value, or in a list of values."""
    if isinstance(choices, int):
        yield choices
    elif isinstance(choices, list | tuple):
        for choice in choices:
            yield from _whole(choice)


def _num_joined(schema: Mapping[str, Any]) -> int:
    """How many parts of a schema must hold together."""
    parts = schema.get("allOf")
    num_joined = len(parts) if isinstance(parts, list) else 0
    num_joined += sum(key in schema for key in ("$ref", "anyOf", "oneOf"))
    return num_joined + any(key in schema for key in (*_PATTERNS, *_INNER))

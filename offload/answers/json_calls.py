"""Calls that are objects of JSON with a name and arguments, alone, in lists or behind a name.

    {"name": "f", "arguments": {...}}     or "parameters"; "tool_name" in Command's
    f[ARGS]{...}                          Mistral's

What stands around them is `tool_formats.py`'s business.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from .grammar import RuleWriter, literal
from .tools import Calls, read_json

Found = Sequence[tuple[Any, Any]] | None  # names and arguments; None: it is no call


def json_call(before: str, between: str, after: str) -> Callable[..., str]:
    """Writes calls with a name and an object of arguments; the three stand around them."""

    def write(rules: RuleWriter, name: str, schema: dict[str, Any]) -> str:
        start = rules.text(f"{before}{name}{between}")
        return f"{start} {rules.arguments(name, schema)} {rules.text(after)}"

    return write


def read_hermes(block: str, calls: Calls) -> Found:
    return _named(read_json(block.removeprefix("<tool_call>").removesuffix("</tool_call>")))


def _named(value: Any) -> Found:
    """An object with a name and arguments, which go by two names each."""
    if not isinstance(value, dict):
        return None
    name = value.get("name", value.get("tool_name"))
    return [(name, value.get("arguments", value.get("parameters")))]


def read_llama(block: str, calls: Calls) -> Found:
    """One object, or several behind one another, though but one of them counts; nothing else."""
    text = block.lstrip().removeprefix("<|python_tag|>").strip()
    found: list[tuple[Any, Any]] = []
    while text:
        try:
            value, end = json.JSONDecoder().raw_decode(text)
        except (ValueError, RecursionError):
            return None
        found += _named(value) or [(None, None)]
        text = text[end:].lstrip(" \n;,")
    return found


def list_between(opening: str, closing: str = "") -> Callable[[str, Calls], Found]:
    """Reads a list of objects."""

    def read(block: str, calls: Calls) -> Found:
        value = read_json(block.removeprefix(opening).removesuffix(closing))
        if not isinstance(value, list):
            return None
        return [pair for item in value for pair in _named(item) or [(None, None)]]

    return read


read_mistral_list = list_between("[TOOL_CALLS]")
_MISTRAL_CALL = re.compile(
    r"\s*([^\s\[{]+)\s*(?:\[CALL_ID\]\s*(?:\w+\s*)?)?\[ARGS\](.*)", re.DOTALL
)


def read_mistral(block: str, calls: Calls) -> Found:
    if block.removeprefix("[TOOL_CALLS]").lstrip().startswith("["):
        return read_mistral_list(block, calls)
    parts = [_MISTRAL_CALL.fullmatch(part) for part in block.split("[TOOL_CALLS]")[1:]]
    return [(part and part[1], part and read_json(part[2])) for part in parts]


def _objects(calls: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
    objects = ({"name": name, "arguments": arguments} for name, arguments in calls)
    return [json.dumps(each, ensure_ascii=False) for each in objects]


def spell_hermes(calls: Sequence[tuple[str, dict[str, Any]]]) -> str:
    return "\n".join(f"<tool_call>\n{each}\n</tool_call>" for each in _objects(calls))


def spell_granite(calls: Sequence[tuple[str, dict[str, Any]]]) -> str:
    return f"<|tool_call|>[{', '.join(_objects(calls))}]"


def write_cohere(rules: RuleWriter, name: str, schema: dict[str, Any]) -> str:
    """Calls are numbered through a conversation."""
    start, middle = literal('{"tool_call_id": "'), f'", "tool_name": "{name}", "parameters": '
    return f"{start} /[0-9]+/ {literal(middle)} {rules.arguments(name, schema)} {literal('}')}"

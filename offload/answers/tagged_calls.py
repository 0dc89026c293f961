"""Calls whose arguments stand between tags, each by itself: Qwen3-Coder's, Seed-OSS's, MiniMax-M2's
and GLM's formats.

    <tool_call>                          <tool_call>weather
    <function=weather>                   <arg_key>place</arg_key>
    <parameter=place>                    <arg_value>Varn</arg_value>
    Varn                                 </tool_call>
    </parameter>
    </function>
    </tool_call>

Texts stand there as they are, all else as JSON, or as Python writes it; the function's schema says
which it is. Seed-OSS has <seed:tool_call>, and no lines' ends around values; so has MiniMax, with
<invoke name="weather"> and <parameter name="place">, and several calls in one <minimax:tool_call>.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .grammar import RuleWriter, literal
from .json_schema import property_schema, text_choices
from .python_calls import python_rule, python_value
from .tools import JSON_STRING, Calls, check_argument_names, read_json

_NOTHING = ("null", "None")
_TYPES = {  # of what JSON becomes: JSON schema's
    str: ("string",),
    bool: ("boolean",),
    int: ("integer", "number"),
    float: ("number", "integer"),
    type(None): ("null",),
    list: ("array",),
    dict: ("object",),
}


@dataclass(frozen=True)
class Tags:
    """head: what a call begins with, up to its first argument, and its name. opening: of an
    argument, and its name. closing: of its value. line_end: what may stand before that. tail: what
    a call ends with."""

    head: re.Pattern[str]
    opening: re.Pattern[str]
    closing: str
    line_end: str
    tail: re.Pattern[str]

    def read(self, block: str, calls: Calls) -> list[tuple[str, Any]] | None:
        """See ToolFormat."""
        found, rest = self._whole(block, calls)
        return None if rest else found

    def is_open(self, block: str, calls: Calls) -> bool:
        """See ToolFormat: an argument has begun, and its closing has not come."""
        name, _, rest = self._parts(self._whole(block, calls)[1], calls)
        argument = self.opening.match(rest)
        return bool(name) and argument is not None

    def _whole(self, block: str, calls: Calls) -> tuple[list[tuple[str, Any]], str]:
        """(the calls that are whole, what follows them)."""
        found: list[tuple[str, Any]] = []
        while True:
            name, arguments, rest = self._parts(block, calls)
            tail = self.tail.match(rest) if name else None
            if tail is None:
                return found, block
            found.append((name, arguments))
            block = rest[tail.end() :]

    def _parts(self, block: str, calls: Calls) -> tuple[str, dict[str, Any], str]:
        """(the name, or "" where it is no call; the arguments that are whole; what follows)."""
        head = self.head.match(block)
        if head is None:
            return "", {}, block
        name, at = head[1].strip(), head.end()
        known, arguments = calls.offered.get(name, {}).get("properties", {}), {}
        while argument := self.opening.match(block, at):
            key, start = argument[1].strip(), argument.end()
            end = self._end_of_value(block, start, known.get(key))
            if end < 0:
                break
            value = block[start:end].removesuffix(self.line_end)
            arguments[key], at = _value(value, known.get(key)), end + len(self.closing)
        return name, arguments, block[at:]

    def _end_of_value(self, block: str, start: int, schema: Any) -> int:
        """Where its closing begins; -1 where that has not come. A text ends with the first; of JSON
        it is a part where it stands in a string."""
        end = block.find(self.closing, start)
        if end < 0 or _is_text(schema) or not block[start:end].lstrip().startswith(("{", "[", '"')):
            return end
        whole = _end_of_whole(block, start)
        if block.startswith(self.closing, whole):
            return whole
        for string in JSON_STRING.finditer(block, start):
            if end < string.start():
                break
            stop = string.end() if string["end"] else block.find("\n", string.end())
            if stop < 0:
                return -1
            if end < stop:
                end = block.find(self.closing, stop)
        return end


TAGGED = Tags(
    head=re.compile(r"<tool_call>\s*<function=([^>\n]+)>"),
    opening=re.compile(r"\s*<parameter=([^>\n]+)>\n?"),
    closing="</parameter>",
    line_end="\n",
    tail=re.compile(r"\s*</function>\s*</tool_call>"),
)
SEED = Tags(
    head=re.compile(r"<seed:tool_call>\s*<function=([^>\n]+)>"),
    opening=re.compile(r"\s*<parameter=([^>\n]+)>"),
    closing="</parameter>",
    line_end="",
    tail=re.compile(r"\s*</function>\s*</seed:tool_call>"),
)
MINIMAX = Tags(
    head=re.compile(r'(?:<minimax:tool_call>)?\s*<invoke name="([^"\n]+)">'),
    opening=re.compile(r'\s*<parameter name="([^"\n]+)">'),
    closing="</parameter>",
    line_end="",
    tail=re.compile(r"\s*</invoke>(?:\s*</minimax:tool_call>)?"),
)
KEYED = Tags(
    head=re.compile(r"<tool_call>\s*([^<\s]+)\s*"),
    opening=re.compile(r"\s*<arg_key>(.*?)</arg_key>\s*<arg_value>", re.DOTALL),
    closing="</arg_value>",
    line_end="",
    tail=re.compile(r"\s*</tool_call>"),
)


def _value(text: str, schema: Any) -> Any:
    """What an argument's text stands for."""
    if _is_text(schema):
        return text
    value = read_json(text.strip())
    if value is None and text.strip() not in _NOTHING:
        # Some templates write arguments as Python does.
        value = text if (value := _as_python(text)) is None else value
    types = _types(schema)
    return text if "string" in types and types.isdisjoint(_TYPES[type(value)]) else value


def _as_python(text: str) -> Any:
    """The value that a text is as Python writes it; None where it is none."""
    try:
        value, end = python_value(text)
    except ValueError:
        return None
    return value if end == len(text) else None


def _end_of_whole(text: str, start: int) -> int:
    """Where the value that begins there ends, of JSON's or Python's, with blanks behind it; the
    text's end where there is none."""
    try:
        return python_value(text, start)[1]
    except ValueError:
        return len(text)


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


_Rule = Callable[[RuleWriter, str, dict[str, Any]], str]  # an expression for an argument


def write_tagged(rules: RuleWriter, name: str, schema: dict[str, Any]) -> str:
    return _write_tagged(rules, name, schema, "\n", "</tool_call>", RuleWriter.arguments)


def write_seed(rules: RuleWriter, name: str, schema: dict[str, Any]) -> str:
    return _write_tagged(rules, name, schema, "", "</seed:tool_call>", python_rule)


def _write_tagged(
    rules: RuleWriter,
    name: str,
    schema: dict[str, Any],
    line_end: str,
    closing: str,
    rule: _Rule,
) -> str:
    """line_end: what stands around a value."""

    def opening(key: str) -> str:
        return f"<parameter={key}>{line_end}"

    arguments = _arguments(rules, name, schema, opening, line_end, "</parameter>", rule)
    start = rules.text(f"\n<function={name}>\n")
    end = rules.text("</function>\n" + closing)
    return f"{start} {arguments} {end}"


def write_minimax(rules: RuleWriter, name: str, schema: dict[str, Any]) -> str:
    def opening(key: str) -> str:
        return f'<parameter name="{key}">'

    arguments = _arguments(rules, name, schema, opening, "", "</parameter>")
    start = rules.text(f'<invoke name="{name}">\n')
    return f"{start} {arguments} {rules.text('</invoke>')}"


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
    rule: _Rule = RuleWriter.arguments,
) -> str:
    """An expression for all arguments, in the schema's order. What stands around a value: `opening`
    of its name, and before_closing and closing. rule: for what is no text."""
    check_argument_names(name, schema["properties"], '<>\n"')
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
            value = f"{rule(rules, name, property_schema(schema, key))} {after}"
        is_needed = key in schema.get("required", ())
        parts.append(f"({rules.text(opening(key))} {value}){'' if is_needed else '?'}")
    return " ".join(parts)

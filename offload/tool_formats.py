"""How models write calls of functions: one table of formats, chosen by the model's chat template.

    hermes   <tool_call>{"name": "f", "arguments": {...}}</tool_call>      Hermes, Qwen2.5 and 3
    tagged   <tool_call><function=f><parameter=a>...</tool_call>            Qwen3-Coder, Qwen3.5
    keyed    <tool_call>f<arg_key>a</arg_key><arg_value>...</tool_call>     GLM-4.5 and later
    llama    {"name": "f", "parameters": {...}}                             Llama 3.x, 4
    mistral  [TOOL_CALLS][{"name": "f", "arguments": {...}}]                to Mistral Nemo
    mistral  [TOOL_CALLS]f[ARGS]{...}                                       later ones
    apriel   <tool_calls>[{"name": "f", "arguments": {...}}]</tool_calls>   Apriel
    gemma    <|tool_call>call:f{a:1}<tool_call|>                            Gemma 4

gpt-oss's format is harmony, which `harmony.py` reads. Each format reads what stands in the text of
an answer, and has a grammar for answers that must call.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .errors import InputError
from .gemma_calls import add_gemma_values, is_open_gemma, read_gemma, write_gemma
from .grammar import RuleWriter
from .tagged_calls import KEYED, TAGGED, write_keyed, write_tagged
from .tools import Calls, ends_in_string, read_json

if TYPE_CHECKING:
    from .text import Tokenizer

Found = Sequence[tuple[Any, Any]] | None  # names and arguments; None: it is no call


@dataclass(frozen=True)
class ToolFormat:
    """opening, closing: what stands around calls; closing "": they go on to the answer's end. read:
    the calls of a block, from opening to closing. is_open: of a block that it cannot read, whether
    the closing may stand within an argument, which goes on. write: an expression for one call of a
    function.
    marks: of all this, what may be control tokens. at_start: whether nothing but white space may
    stand before. takes_one: whether templates refuse messages with several calls, so that an answer
    has but one. between: what stands between two calls, beside the closing and the next opening, or
    instead of these where `around` stands around all of them. rules: adds what calls refer to."""

    name: str
    opening: str
    closing: str
    read: Callable[[str, Calls], Found]
    is_open: Callable[[str, Calls], bool]
    write: Callable[[RuleWriter, str, dict[str, Any]], str]
    marks: tuple[str, ...]
    at_start: bool = False
    takes_one: bool = False
    between: str = ""
    around: tuple[str, str] | None = None
    rules: Callable[[RuleWriter], None] | None = None


def _json_call(before: str, between: str, after: str) -> Callable[..., str]:
    """Writes calls with a name and an object of arguments; the three stand around them."""

    def write(rules: RuleWriter, name: str, schema: dict[str, Any]) -> str:
        start = rules.text(f"{before}{name}{between}")
        return f"{start} {rules.arguments(name, schema)} {rules.text(after)}"

    return write


def _never(block: str, calls: Calls) -> bool:
    return False


def _is_in_string(block: str, calls: Calls) -> bool:
    return ends_in_string(block)


def _read_hermes(block: str, calls: Calls) -> Found:
    return _named(read_json(block.removeprefix("<tool_call>").removesuffix("</tool_call>")))


def _named(value: Any) -> Found:
    """An object with a name and arguments, which go by two names."""
    if not isinstance(value, dict):
        return None
    return [(value.get("name"), value.get("arguments", value.get("parameters")))]


def _read_llama(block: str, calls: Calls) -> Found:
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


def _read_list(block: str, calls: Calls) -> Found:
    text = block.removeprefix("[TOOL_CALLS]").removeprefix("<tool_calls>")
    value = read_json(text.removesuffix("</tool_calls>"))
    if not isinstance(value, list):
        return None
    return [pair for item in value for pair in _named(item) or [(None, None)]]


_MISTRAL_CALL = re.compile(r"\s*([^\s\[{]+)\s*(?:\[CALL_ID\]\s*\w*\s*)?\[ARGS\](.*)", re.DOTALL)


def _read_mistral(block: str, calls: Calls) -> Found:
    if block.removeprefix("[TOOL_CALLS]").lstrip().startswith("["):
        return _read_list(block, calls)
    parts = [_MISTRAL_CALL.fullmatch(part) for part in block.split("[TOOL_CALLS]")[1:]]
    return [(part and part[1], part and read_json(part[2])) for part in parts]


_TAGS = ("<tool_call>", "</tool_call>")
_HERMES = ToolFormat(
    "hermes",
    *_TAGS,
    _read_hermes,
    _is_in_string,
    _json_call('\n{"name": "', '", "arguments": ', "}\n</tool_call>"),
    _TAGS,
    between="\n",
)
_TAGGED = ToolFormat(
    "tagged", *_TAGS, TAGGED.read, TAGGED.is_open, write_tagged, _TAGS, between="\n"
)
_KEYED = ToolFormat(
    "keyed",
    *_TAGS,
    KEYED.read,
    KEYED.is_open,
    write_keyed,
    (*_TAGS, "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    between="\n",
)
_LLAMA = ToolFormat(
    "llama",
    "{",
    "",
    _read_llama,
    _never,
    _json_call('"name": "', '", "parameters": ', "}"),
    ("<|python_tag|>",),
    at_start=True,
    takes_one=True,
)
_LLAMA4 = replace(_LLAMA, marks=(), takes_one=False)
_MISTRAL_LIST = ToolFormat(
    "mistral",
    "[TOOL_CALLS]",
    "",
    _read_list,
    _never,
    _json_call('{"name": "', '", "arguments": ', "}"),
    ("[TOOL_CALLS]",),
    between=", ",
    around=("[", "]"),
)
_APRIEL = ToolFormat(
    "apriel",
    "<tool_calls>",
    "</tool_calls>",
    _read_list,
    _is_in_string,
    _json_call('{"name": "', '", "arguments": ', "}"),
    ("<tool_calls>", "</tool_calls>"),
    between=", ",
    around=("[", "]</tool_calls>"),
)
_MISTRAL = ToolFormat(
    "mistral",
    "[TOOL_CALLS]",
    "",
    _read_mistral,
    _never,
    _json_call("", "[ARGS]", ""),
    ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"),
)
_GEMMA = ToolFormat(
    "gemma",
    "<|tool_call>",
    "<tool_call|>",
    read_gemma,
    is_open_gemma,
    write_gemma,
    ("<|tool_call>", "<tool_call|>", '<|"|>'),
    rules=add_gemma_values,
)
# What a template holds -> the format; the first that it holds all of.
_KNOWN_BY: tuple[tuple[tuple[str, ...], ToolFormat], ...] = (
    (("<|tool_call>call:",), _GEMMA),
    (("<tool_calls>[",), _APRIEL),
    (("[TOOL_CALLS]", "[ARGS]"), _MISTRAL),
    (("[TOOL_CALLS]",), _MISTRAL_LIST),
    (("<tool_call>", "<arg_key>"), _KEYED),
    (("<tool_call>", "<function=", "<parameter="), _TAGGED),
    (("<tool_call>", '"arguments'), _HERMES),
    (("<tool_call>", '\\"arguments'), _HERMES),
    (("<tool_call>", "'arguments'"), _HERMES),
    (("<|python_start|>", '{"name": function name, "parameters": dictionary'), _LLAMA4),
    (('{"name": function name, "parameters": dictionary',), _LLAMA),
)


def format_of(tokenizer: Tokenizer) -> ToolFormat | None:
    """How a model writes calls; None where that is harmony. InputError where its chat template
    knows no tools, or has a format that is not in the table."""
    if not tokenizer.template.knows("tools"):
        raise InputError(
            f"the chat template of {tokenizer.name} knows no tools; a model that was trained to "
            "call functions has one that does"
        )
    if tokenizer.harmony_marks:
        return None
    source = tokenizer.template_source
    for words, format in _KNOWN_BY:
        if all(word in source for word in words):
            return format
    raise InputError(
        f"{tokenizer.name} writes calls of functions in a way that Ebbtide does not read; it reads "
        "those of Hermes and Qwen, GLM, Llama 3 and 4, Mistral, Apriel, gpt-oss and Gemma 4"
    )


def write_calls(
    format: ToolFormat, rules: RuleWriter, schemas: Mapping[str, Any], several: bool, must: bool
) -> str:
    """An expression for an answer that calls functions. schemas: of their arguments, by name;
    several: whether more than one may be called; must: whether it calls at all, and at once."""
    if format.rules is not None:
        format.rules(rules)
    several = several and not format.takes_one
    each = [format.write(rules, name, schema) for name, schema in schemas.items()]
    call, opening = rules.named(" | ".join(each)), rules.text(format.opening)
    before, after = format.around or ("", "")
    next_opening = "" if format.around else opening
    more = f"({rules.text(format.between)} {next_opening} {call})*" if several else ""
    calls = f"{rules.text(before)} {call} {more} {rules.text(after)}"
    if must:
        return f"{opening} {calls}"
    if format.at_start:
        return f"({opening} {calls} | {rules.not_beginning_with(format.opening)})"
    return f"({rules.up_to(format.opening)} {calls} | {rules.without(format.opening)})"

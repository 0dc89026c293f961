"""How models write calls of functions: one table of formats, chosen by the model's chat template.

    hermes   <tool_call>{"name": "f", "arguments": {...}}</tool_call>      Hermes, Qwen2.5 and 3
    tagged   <tool_call><function=f><parameter=a>...</tool_call>            Qwen3-Coder, Qwen3.5
    seed     <seed:tool_call><function=f><parameter=a>...                   Seed-OSS
    minimax  <minimax:tool_call><invoke name="f"><parameter name="a">...     MiniMax-M2
    keyed    <tool_call>f<arg_key>a</arg_key><arg_value>...</tool_call>     GLM-4.5 and later
    llama    {"name": "f", "parameters": {...}}                             Llama 3.x, 4
    mistral  [TOOL_CALLS][{"name": "f", "arguments": {...}}]                to Mistral Nemo
    mistral  [TOOL_CALLS]f[ARGS]{...}                                       later ones
    apriel   <tool_calls>[{"name": "f", "arguments": {...}}]</tool_calls>   Apriel
    granite  <|tool_call|>[{"name": "f", "arguments": {...}}]               Granite 3
    cohere   <|START_ACTION|>[{"tool_name": "f", "parameters": {...}}]...   Command R7B, A
    gemma    <|tool_call>call:f{a:1}<tool_call|>                            Gemma 4
    python   <|tool_call_start|>[f(a=1)]<|tool_call_end|>                   LFM2
    deepseek <｜tool▁calls▁begin｜>...f<｜tool▁sep｜>{...}...                  DeepSeek V3.1, R1
    kimi     <|tool_calls_section_begin|>...functions.f:0...{...}...        Kimi K2

gpt-oss's format is harmony, which `harmony.py` reads. Each format reads what stands in the text of
an answer, and has a grammar for answers that must call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .gemma_calls import add_gemma_values, is_open_gemma, read_gemma, write_gemma
from .grammar import RuleWriter
from .json_calls import (
    Found,
    json_call,
    list_between,
    read_hermes,
    read_llama,
    read_mistral,
    read_mistral_list,
    spell_granite,
    spell_hermes,
    write_cohere,
)
from .python_calls import (
    PYTHON_MARKS,
    add_python_values,
    is_open_python,
    read_python,
    spell_python,
    write_python,
)
from .section_calls import DEEPSEEK, DEEPSEEK_MARKS, KIMI, KIMI_MARKS, write_kimi
from .tagged_calls import (
    KEYED,
    MINIMAX,
    SEED,
    TAGGED,
    write_keyed,
    write_minimax,
    write_seed,
    write_tagged,
)
from .tools import Calls, ends_in_string

if TYPE_CHECKING:
    from ..text.text import Tokenizer

TOOL_VARIABLES = ("tools", "xml_tools")  # by which templates know them; SmolLM3's by the second


@dataclass(frozen=True)
class ToolFormat:
    """opening, closing: what stands around calls; closing "": they go on to the answer's end. read:
    the calls of a block, from opening to closing. is_open: of a block that it cannot read, whether
    the closing may stand within an argument, which goes on. write: an expression for one call of a
    function.
    marks: of all this, what may be control tokens. at_start: whether nothing but white space may
    stand before. takes_one: whether templates refuse messages with several calls, so that an answer
    has but one. between: what stands between two calls, beside the closing and the next opening, or
    instead of these where `around` stands around all of them. rules: adds what calls refer to.
    spell: how calls are written into a message, for templates that do not write them."""

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
    spell: Callable[[Sequence[tuple[str, dict[str, Any]]]], str] | None = None


def _never(block: str, calls: Calls) -> bool:
    return False


def _is_in_string(block: str, calls: Calls) -> bool:
    return ends_in_string(block)


_TAGS = ("<tool_call>", "</tool_call>")
_HERMES = ToolFormat(
    "hermes",
    *_TAGS,
    read_hermes,
    _is_in_string,
    json_call('\n{"name": "', '", "arguments": ', "}\n</tool_call>"),
    _TAGS,
    between="\n",
    spell=spell_hermes,
)
_TAGGED = ToolFormat(
    "tagged", *_TAGS, TAGGED.read, TAGGED.is_open, write_tagged, _TAGS, between="\n"
)
_SEED_TAGS = ("<seed:tool_call>", "</seed:tool_call>")
_SEED = ToolFormat(
    "seed",
    *_SEED_TAGS,
    SEED.read,
    SEED.is_open,
    write_seed,
    _SEED_TAGS,
    between="\n\n",
    rules=add_python_values,
)
_MINIMAX_TAGS = ("<minimax:tool_call>", "</minimax:tool_call>")
_MINIMAX = ToolFormat(
    "minimax",
    *_MINIMAX_TAGS,
    MINIMAX.read,
    MINIMAX.is_open,
    write_minimax,
    _MINIMAX_TAGS,
    between="\n",
    around=("\n", "\n</minimax:tool_call>"),
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
    read_llama,
    _never,
    json_call('"name": "', '", "parameters": ', "}"),
    ("<|python_tag|>",),
    at_start=True,
    takes_one=True,
)
_LLAMA4 = replace(_LLAMA, marks=(), takes_one=False)
_MISTRAL_LIST = ToolFormat(
    "mistral",
    "[TOOL_CALLS]",
    "",
    read_mistral_list,
    _never,
    json_call('{"name": "', '", "arguments": ', "}"),
    ("[TOOL_CALLS]",),
    between=", ",
    around=("[", "]"),
)
_APRIEL = ToolFormat(
    "apriel",
    "<tool_calls>",
    "</tool_calls>",
    list_between("<tool_calls>", "</tool_calls>"),
    _is_in_string,
    json_call('{"name": "', '", "arguments": ', "}"),
    ("<tool_calls>", "</tool_calls>"),
    between=", ",
    around=("[", "]</tool_calls>"),
)
_MISTRAL = ToolFormat(
    "mistral",
    "[TOOL_CALLS]",
    "",
    read_mistral,
    _never,
    json_call("", "[ARGS]", ""),
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
_GRANITE = ToolFormat(
    "granite",
    "<|tool_call|>",
    "",
    list_between("<|tool_call|>"),
    _never,
    json_call('{"name": "', '", "arguments": ', "}"),
    ("<|tool_call|>",),
    between=", ",
    around=("[", "]"),
    spell=spell_granite,
)
_ACTIONS = ("<|START_ACTION|>", "<|END_ACTION|>")
_COHERE = ToolFormat(
    "cohere",
    *_ACTIONS,
    list_between(*_ACTIONS),
    _is_in_string,
    write_cohere,
    _ACTIONS,
    between=",\n    ",
    around=("[\n    ", "\n]<|END_ACTION|>"),
)
_PYTHON = ToolFormat(
    "python",
    *PYTHON_MARKS,
    read_python,
    is_open_python,
    write_python,
    PYTHON_MARKS,
    between=", ",
    around=("[", f"]{PYTHON_MARKS[1]}"),
    rules=add_python_values,
    spell=spell_python,
)
_DEEPSEEK = ToolFormat(
    "deepseek",
    DEEPSEEK.opening,
    DEEPSEEK.closing,
    DEEPSEEK.read,
    _is_in_string,
    json_call("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"),
    DEEPSEEK_MARKS,
    around=("", DEEPSEEK.closing),
)
_DEEPSEEK_R1 = replace(
    _DEEPSEEK,
    write=json_call(
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>", "\n```json\n", "\n```<｜tool▁call▁end｜>"
    ),
    between="\n",
)
_KIMI = ToolFormat(
    "kimi",
    KIMI.opening,
    KIMI.closing,
    KIMI.read,
    _is_in_string,
    write_kimi,
    KIMI_MARKS,
    around=("", KIMI.closing),
)
# What a template holds -> the format; the first that it holds all of.
_KNOWN_BY: tuple[tuple[tuple[str, ...], ToolFormat], ...] = (
    (("<|tool_call>call:",), _GEMMA),
    (("<tool_calls>[",), _APRIEL),
    (("[TOOL_CALLS]", "[ARGS]"), _MISTRAL),
    (("[TOOL_CALLS]",), _MISTRAL_LIST),
    (("<|tool_call|> followed by a JSON list",), _GRANITE),
    (("<|START_ACTION|>", '"tool_name"'), _COHERE),
    (("<|tool_call_start|>",), _PYTHON),
    (("<|tool_list_start|>",), _PYTHON),
    (("<｜tool▁calls▁begin｜>", "```json"), _DEEPSEEK_R1),
    (("<｜tool▁calls▁begin｜>",), _DEEPSEEK),
    (("<|tool_calls_section_begin|>", "<|tool_call_argument_begin|>"), _KIMI),
    (("<seed:tool_call>", "<function=", "<parameter="), _SEED),
    (("<minimax:tool_call>", "<invoke name=", "<parameter name="), _MINIMAX),
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
    if not tokenizer.template.knows(*TOOL_VARIABLES):
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
    # Newer templates of LFM2 leave it to the model's training.
    if "List of tools: [" in source and isinstance(tokenizer.mark_parts(PYTHON_MARKS[0])[0], int):
        return _PYTHON
    raise InputError(
        f"{tokenizer.name} writes calls of functions in a way that Ebbtide does not read; it reads "
        "those of Hermes and Qwen, GLM, Llama 3 and 4, Mistral, Apriel, Granite, LFM2, gpt-oss, "
        "Gemma 4, Command R7B and A, Seed-OSS, MiniMax-M2, DeepSeek and Kimi"
    )


def with_calls_written(
    tokenizer: Tokenizer, messages: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Messages whose calls are in their contents, as a model writes them, where the chat template
    would leave them out. messages: guarded, see ControlText."""
    if "tool_calls" in tokenizer.template_source or not any(m.get("tool_calls") for m in messages):
        return messages
    try:
        format = format_of(tokenizer)
    except InputError:  # of a model that calls nothing
        return messages
    if format is None or format.spell is None:
        return messages
    return [_written(message, format.spell) for message in messages]


def _written(message: dict[str, Any], spell: Callable[..., str]) -> dict[str, Any]:
    functions = [call["function"] for call in message.get("tool_calls", ())]
    if not functions:
        return message
    written = spell([(function["name"], function["arguments"]) for function in functions])
    content = message["content"]
    if isinstance(content, list):
        content = "\n".join(part["text"] for part in content)  # as templates get them
    return {**message, "content": f"{content}\n{written}" if content else written}


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

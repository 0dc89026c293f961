"""Chat templates that know tools, small ones of each format, and tokenizers that have them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers_under_test import byte_level_backend, write

from ebbtide.offload.answers.call_reader import CallReader
from ebbtide.offload.answers.python_calls import PYTHON_MARKS
from ebbtide.offload.answers.section_calls import DEEPSEEK_MARKS, KIMI_MARKS
from ebbtide.offload.answers.tool_formats import format_of
from ebbtide.offload.answers.tools import Calls, checked_tools, parameters_of, shown_tool
from ebbtide.offload.text.text import Tokenizer

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"enum": ["Varn", "Leeds"]},
                "days": {"type": "integer", "minimum": 0, "maximum": 9},
                "note": {"type": "string", "maxLength": 5},
                "exact": {"type": "boolean"},
                "hours": {"type": "array", "items": {"type": "integer"}, "maxItems": 2},
            },
            "required": ["place", "days", "note"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock", "description": "Tells the time."}}
TOOLS = [
    *map(shown_tool, checked_tools("tools", [WEATHER, CLOCK]))
]  # as templates are told of them
OFFERED = parameters_of(TOOLS)
ARGUMENTS = {"place": "Varn", "days": 3, "note": "a <b>", "exact": True, "hours": [1, 2]}

# Whose turn it is, in ChatML; CALL writes one call of `f`, its function.
_CHATML = (
    "{% if tools %}{{ '<|im_start|>system\\n' + tools | tojson + '<|im_end|>\\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}"
    "{% for c in m.tool_calls or [] %}{% set f = c.function %}"
    "{{ '\\n' if m.content or not loop.first }}CALL{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# The same for templates that are told of tools, and write contents alone.
_SILENT = _CHATML.replace(
    "{% for c in m.tool_calls or [] %}{% set f = c.function %}"
    "{{ '\\n' if m.content or not loop.first }}CALL{% endfor %}",
    "",
)
_HINTS = {
    "granite": "{# respond only with <|tool_call|> followed by a JSON list of tools used #}",
    "lfm2": "{# List of tools: <|tool_list_start|>[ #}",
    "lfm2.5": "{# List of tools: [ #}",
    "smollm3": '{# <tool_call>\n{\\"name\\": <function-name>, \\"arguments\\": <args> #}',
}
_CALLS = {
    "hermes": (
        '<tool_call>\n{"name": "{{ f.name }}", "arguments": {{ f.arguments | tojson }}}\n'
        "</tool_call>"
    ),
    "tagged": (
        "<tool_call>\n<function={{ f.name }}>\n{% for k, v in f.arguments.items() %}"
        "<parameter={{ k }}>\n{{ v if v is string else v | tojson }}\n</parameter>\n{% endfor %}"
        "</function>\n</tool_call>"
    ),
    "keyed": (
        "<tool_call>{{ f.name }}\n{% for k, v in f.arguments.items() %}<arg_key>{{ k }}</arg_key>\n"
        "<arg_value>{{ v if v is string else v | tojson }}</arg_value>\n{% endfor %}</tool_call>"
    ),
    "llama": (
        '{"name": "{{ f.name }}", "parameters": {{ f.arguments | tojson }}}'
        '{# {"name": function name, "parameters": dictionary #}'
    ),
    "llama 4": (
        '{"name": "{{ f.name }}", "parameters": {{ f.arguments | tojson }}}'
        '{# <|python_start|> {"name": function name, "parameters": dictionary #}'
    ),
    "mistral": "[TOOL_CALLS]{{ f.name }}[ARGS]{{ f.arguments | tojson }}",
    "mistral list": (
        '[TOOL_CALLS][{"name": "{{ f.name }}", "arguments": {{ f.arguments | tojson }}}]'
    ),
    "apriel": (
        '<tool_calls>[{"name": "{{ f.name }}", "arguments": {{ f.arguments | tojson }}}]'
        "</tool_calls>"
    ),
    "gemma": (
        "<|tool_call>call:{{ f.name + '{' }}"
        "{% for k, v in f.arguments | dictsort %}{{ ',' if not loop.first }}{{ k }}:"
        '{% if v is string %}<|"|>{{ v }}<|"|>{% else %}'
        "{{ v | tojson(separators=[',', ':']) }}{% endif %}{% endfor %}{{ '}' }}<tool_call|>"
    ),
    "seed": (
        "<seed:tool_call>\n<function={{ f.name }}>\n{% for k, v in f.arguments.items() %}"
        "<parameter={{ k }}>{{ v if v is string else v | string }}</parameter>\n{% endfor %}"
        "</function>\n</seed:tool_call>"
    ),
    "minimax": (
        '<minimax:tool_call>\n<invoke name="{{ f.name }}">\n{% for k, v in f.arguments.items() %}'
        '<parameter name="{{ k }}">{{ v if v is string else v | tojson }}</parameter>\n{% endfor %}'
        "</invoke>\n</minimax:tool_call>"
    ),
    "cohere": (
        '<|START_ACTION|>[\n    {"tool_call_id": "{{ loop.index0 }}", "tool_name": '
        '"{{ f.name }}", "parameters": {{ f.arguments | tojson }}}\n]<|END_ACTION|>'
    ),
    "deepseek": (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>{{ f.name }}<｜tool▁sep｜>"
        "{{ f.arguments | tojson }}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
    ),
    "deepseek r1": (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>{{ f.name }}\n```json\n"
        "{{ f.arguments | tojson }}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
    ),
    "kimi": (
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.{{ f.name }}:{{ loop.index0 }}"
        "<|tool_call_argument_begin|>{{ f.arguments | tojson }}<|tool_call_end|>"
        "<|tool_calls_section_end|>"
    ),
}
FORMATS = (*_CALLS, *_HINTS)
# What ends a text in the formats that write texts as they are.
UNQUOTED_ENDS = {
    **dict.fromkeys(("tagged", "seed", "minimax"), "</parameter>"),
    "keyed": "</arg_value>",
}
_SPECIAL = (
    *("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|tool_call>", "<tool_call|>", '<|"|>'),
    *("<|im_start|>", "<|im_end|>"),
    *("<|START_ACTION|>", "<|END_ACTION|>", "<|tool_call|>", "<|tool_list_start|>"),
    *PYTHON_MARKS,
    *DEEPSEEK_MARKS,
    *KIMI_MARKS,
)
_SOFT = (
    *("<seed:tool_call>", "</seed:tool_call>", "<minimax:tool_call>", "</minimax:tool_call>"),
    *("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<think>", "</think>"),
)


def template_of(name: str, more: str = "") -> str:
    if name in _HINTS:
        source = _SILENT + _HINTS[name] + more
        return source.replace("tools", "xml_tools") if name == "smollm3" else source
    return _CHATML.replace("CALL", _CALLS[name]) + more


# What stands around thoughts and answers of Command.
COMMAND = ("<|START_THINKING|>", "<|END_THINKING|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>")


def with_tools(folder, name: str, more: str = "", special: tuple[str, ...] = ()):
    """A folder with a byte-level tokenizer whose template has the format; more: for its end;
    special: further control tokens."""
    backend = byte_level_backend()
    backend.add_special_tokens([*_SPECIAL, *special])
    if name == "llama 4":
        backend.add_special_tokens(["<|python_start|>", "<|python_end|>"])
    backend.add_tokens(list(_SOFT))
    return write(folder, backend, template=template_of(name, more), eos_token="<|im_end|>")


def call_text(tokenizer: Tokenizer, arguments=ARGUMENTS) -> str:
    """A call of `weather`, as the template writes it."""
    function = {"name": "weather", "arguments": json.dumps(arguments)}
    call = {"role": "assistant", "content": "", "tool_calls": [{"id": "x", "function": function}]}
    text = tokenizer.chat_text([call], add_generation_prompt=False)
    return text.removeprefix("<|im_start|>assistant\n").removesuffix("<|im_end|>\n")


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    """What a model samples: control tokens where they are spelled, and text."""
    ids: list[int] = []
    for part in tokenizer._control.parts(text):
        ids += tokenizer.encode(part) if isinstance(part, str) else [part.token_id]
    return ids


def tokenizer_of(name: str, folder: Path) -> Tokenizer:
    return Tokenizer.load(with_tools(folder, name))


def read(tokenizer, pieces, most=None) -> tuple[str, list[tuple[str, dict]]]:
    """(text, calls) of an answer that comes in pieces of text."""
    reader = CallReader(format_of(tokenizer), Calls(OFFERED, most))
    text = "".join([*map(reader.push, pieces), reader.finish()])
    return text, [(call.name, json.loads(call.arguments)) for call in reader.calls.take()]


@pytest.fixture(scope="module", params=FORMATS)
def tokenizer(request, tmp_path_factory) -> Tokenizer:
    """Of each format."""
    return Tokenizer.load(with_tools(tmp_path_factory.mktemp("format"), request.param))

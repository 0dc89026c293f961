"""Chat templates that know tools, small ones of each format, and tokenizers that have them."""

from __future__ import annotations

import json

import pytest
from tokenizers_under_test import byte_level_backend, write

from ebbtide.offload.text import Tokenizer
from ebbtide.offload.tools import checked_tools, parameters_of, shown_tool

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
}
FORMATS = tuple(_CALLS)
_SPECIAL = (
    *("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|tool_call>", "<tool_call|>", '<|"|>'),
    *("<|im_start|>", "<|im_end|>"),
)
_SOFT = ("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<think>", "</think>")


def template_of(name: str, more: str = "") -> str:
    return _CHATML.replace("CALL", _CALLS[name]) + more


def with_tools(folder, name: str, more: str = ""):
    """A folder with a byte-level tokenizer whose template has the format; more: for its end."""
    backend = byte_level_backend()
    backend.add_special_tokens(list(_SPECIAL))
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


@pytest.fixture(scope="module", params=FORMATS)
def tokenizer(request, tmp_path_factory) -> Tokenizer:
    """Of each format."""
    return Tokenizer.load(with_tools(tmp_path_factory.mktemp("format"), request.param))

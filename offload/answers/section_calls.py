"""Calls between control tokens, in a section of their own: DeepSeek's and Kimi's formats.

    <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{...}<｜tool▁call▁end｜><｜tool▁calls▁end｜>
    <|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>{...}
    <|tool_call_end|><|tool_calls_section_end|>

DeepSeek R1 and V3 write `function<｜tool▁sep｜>weather` and the arguments in a block of Markdown.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from .grammar import RuleWriter
from .tools import Calls

_NAME = r"(?P<name>[A-Za-z0-9_.-]+)"


@dataclass(frozen=True)
class Section:
    """opening, closing: of the section; head: of a call, up to its arguments; tail: what follows
    them."""

    opening: str
    closing: str
    head: re.Pattern[str]
    tail: re.Pattern[str]

    def read(self, block: str, calls: Calls) -> list[tuple[str, Any]] | None:
        """See ToolFormat."""
        found, at = [], len(self.opening)
        while head := self.head.match(block, at):
            try:
                arguments, end = json.JSONDecoder().raw_decode(block, head.end())
            except (ValueError, RecursionError):
                return None
            tail = self.tail.match(block, end)
            if tail is None:
                return None
            found.append((head["name"], arguments))
            at = tail.end()
        return found if block[at:].strip() == self.closing else None


DEEPSEEK_MARKS = (
    *("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁sep｜>"),
    *("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"),
)
DEEPSEEK = Section(
    *DEEPSEEK_MARKS[:2],
    head=re.compile(
        rf"\s*<｜tool▁call▁begin｜>\s*(?:\w+\s*<｜tool▁sep｜>\s*(?=[\w.-]+\s*```))?{_NAME}"
        r"\s*(?:<｜tool▁sep｜>|```json)\s*"
    ),
    tail=re.compile(r"\s*(?:```\s*)?<｜tool▁call▁end｜>"),
)
KIMI_MARKS = (
    *("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
    *("<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"),
)
KIMI = Section(
    *KIMI_MARKS[:2],
    head=re.compile(
        rf"\s*<\|tool_call_begin\|>\s*(?:functions\.)?{_NAME}(?::[0-9]+)?"
        r"\s*<\|tool_call_argument_begin\|>\s*"
    ),
    tail=re.compile(r"\s*<\|tool_call_end\|>"),
)


def write_kimi(rules: RuleWriter, name: str, schema: dict[str, Any]) -> str:
    """Calls are numbered through a conversation."""
    start = f"{rules.text(f'<|tool_call_begin|>functions.{name}:')} /[0-9]+/"
    middle, end = rules.text("<|tool_call_argument_begin|>"), rules.text("<|tool_call_end|>")
    return f"{start} {middle} {rules.arguments(name, schema)} {end}"

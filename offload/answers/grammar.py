"""What an answer may look like, as a grammar: thoughts as the model likes, then what is asked for.

Grammars are in llguidance's dialect of Lark, where a schema is a grammar of its own that others
name with @. A control token stands there as its id, <[7]>: text that spells it is something else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .harmony import FUNCTIONS, Mark

if TYPE_CHECKING:
    from ..text.text import Think, Tokenizer

EMPTY = '""'
ANYTHING = "/(?s:.*)/"


@dataclass(frozen=True)
class Grammar:
    """lark: begins at `start`. schemas: JSON text by the name that `lark` has for it; functions: by
    the same names, those whose arguments they are for."""

    lark: str
    schemas: Mapping[str, str] = field(default_factory=dict)
    functions: Mapping[str, str] = field(default_factory=dict)


class RuleWriter:
    """Collects the rules of one grammar. marks: texts that a model may write as control tokens;
    whatever else spells a control token is text."""

    def __init__(self, tokenizer: Tokenizer, marks: Sequence[str] = ()):
        self.tokenizer = tokenizer
        self._rules: list[str] = []
        self._schemas: dict[str, str] = {}
        self._functions: dict[str, str] = {}
        self.know(marks)

    def know(self, marks: Sequence[str]) -> None:
        """Of what is written from now on these are the marks."""
        self._marks = re.compile("|".join(map(re.escape, marks)) or "(?!)")

    def add(self, rule: str) -> None:
        self._rules.append(rule)

    def named(self, expression: str) -> str:
        """A rule for an expression: its name, an expression too."""
        name = f"part_{len(self._rules)}"
        self.add(f"{name}: {expression}")
        return name

    def schema(self, schema: str) -> str:
        """An expression for the values that a schema allows. schema: as JSON text."""
        name = f"value{len(self._schemas)}"
        self._schemas[name] = schema
        return f"@{name}"

    def arguments(self, function: str, schema: Mapping[str, Any]) -> str:
        """The same for the arguments of a function, or for one of them."""
        self._functions[f"value{len(self._schemas)}"] = function
        return self.schema(json.dumps(schema))

    def text(self, text: str) -> str:
        """An expression for a text with marks in it."""
        return " ".join(_spelled(part) for part in self._parts(text))

    def separated(self, items: Sequence[tuple[str, bool]], between: str) -> str:
        """An expression for some of several, in their order, with a text between them. items:
        expressions, and whether each must be there."""
        # From the last one back: what may follow where none was written before it, and where one
        # was.
        first = more = ""
        for item, is_needed in reversed(items):
            own = f"{item} {more}"
            first = self.named(own if is_needed else f"{own} | {first or EMPTY}")
            own = f"{self.text(between)} {own}"
            more = self.named(own if is_needed else f"{own} | {more or EMPTY}")
        return first

    def up_to(self, end: str) -> str:
        """An expression for anything up to the first of a text with marks, and that text."""
        if self._parts(end) == [end]:
            name = f"up_to_{len(self._rules)}"
            self.add(f"{name}[lazy]: /(?s:.*){_pattern(end)}/")
            return name
        # Who reads the answer takes the spelled text for it, so that may not come before.
        return f"{self.without(end)} {self.text(end)}"

    def without(self, text: str) -> str:
        """An expression for anything that does not hold a text."""
        name = f"WITHOUT_{len(self._rules)}"
        self.add(f"{name}: {ANYTHING} & ~/(?s:.*){_pattern(text)}(?s:.*)/")
        return name

    def not_beginning_with(self, sign: str) -> str:
        """An expression for anything whose first sign is another."""
        return f"/([^{re.escape(sign)}\\s](?s:.*))?/"

    def grammar(self, start: str) -> Grammar:
        return Grammar("\n".join([f"start: {start}", *self._rules]), self._schemas, self._functions)

    def _parts(self, text: str) -> list[int | str]:
        parts: list[int | str] = []
        end = 0
        for found in self._marks.finditer(text):
            parts += [text[end : found.start()], *self.tokenizer.mark_parts(found[0])]
            end = found.end()
        joined: list[int | str] = []
        for part in (*parts, text[end:]):
            if isinstance(part, str) and joined and isinstance(joined[-1], str):
                joined[-1] += part
            elif part != "":
                joined.append(part)
        return joined


def _spelled(part: int | str) -> str:
    return f"<[{part}]>" if isinstance(part, int) else literal(part)


def _pattern(text: str) -> str:
    """A regular expression for a text."""
    return "\\n".join(re.escape(line).replace("/", "\\/") for line in text.split("\n"))


def literal(text: str) -> str:
    """An expression for a text, all of it text."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def behind_thoughts(
    rules: RuleWriter, answer: str, prompt_ids: Sequence[int] | None, think: Think
) -> Grammar:
    """`answer`, an expression, and before it what the model thinks. prompt_ids: of a chat, behind
    which it may think first; None: behind plain text. think: False where it should not."""
    tokenizer = rules.tokenizer
    # Where a tokenizer drops a blank at the beginning, models have learnt to write one.
    answer = f"/ ?/ {answer}" if tokenizer.drops_first_blank else answer
    marks = None if prompt_ids is None else tokenizer.thought_marks
    if prompt_ids is None or marks is None:
        return rules.grammar(answer)
    is_inside = tokenizer.is_thinking(prompt_ids)
    if not is_inside and think is False:
        return rules.grammar(answer)
    rules.know(marks)
    thought = f"{rules.up_to(marks[1])} /\\n{{0,2}}/"
    if not is_inside:
        thought = f"({rules.text(marks[0])} {thought})?"
    return rules.grammar(f"{thought} {answer}")


def in_channels(
    rules: RuleWriter,
    final: str | None,
    calls: Mapping[str, Any],
    prompt_ids: Sequence[int],
) -> Grammar:
    """For the harmony format: analysis, as often as the model likes, then a final message or a
    call. final: an expression for the message, or None; calls: schemas by functions' names. Where
    there are both, what is said before a call is in the channel commentary."""
    marks = rules.tokenizer.harmony_marks
    ids = {mark: f"<[{token}]>" for token, mark in marks.items()}
    channel, message = ids[Mark.CHANNEL], ids[Mark.MESSAGE]
    if final is not None and marks.get(prompt_ids[-1]) is Mark.MESSAGE:
        return rules.grammar(final)  # the prompt has begun it
    format = f"(/ ?/ {ids[Mark.CONSTRAIN]} /(?i:json)/)?" if Mark.CONSTRAIN in ids else ""
    ends = [] if final is None else [f'"final" {format} {message} {final}']
    for name, schema in calls.items():
        header = literal(f"commentary to={FUNCTIONS}{name}")
        ends.append(f"{header} {format} {message} {rules.arguments(name, schema)}")
    first = '("analysis" | "commentary")' if final is not None and calls else '"analysis"'
    before = rules.named(
        f'{channel} {first} {message} {ANYTHING} {ids[Mark.END]} {ids[Mark.START]} "assistant"'
    )
    return rules.grammar(f"{before}* {channel} ({' | '.join(ends)})")

"""What an answer may look like, as a grammar: thoughts as the model likes, then a JSON value.

Grammars are in llguidance's dialect of Lark, where a schema is a grammar of its own that others
name with @. A control token stands there as its id, <[7]>: text that spells it is something else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .harmony import Mark
from .text import Think, Tokenizer

_ANYTHING = "/(?s:.*)/"


@dataclass(frozen=True)
class Grammar:
    """lark: begins at `start`. schemas: JSON text by the name that `lark` has for it."""

    lark: str
    schemas: Mapping[str, str] = field(default_factory=dict)


def schema_grammar(
    schema: str, tokenizer: Tokenizer, prompt_ids: Sequence[int] | None, think: Think
) -> Grammar:
    """An answer that is one JSON value. prompt_ids: of a chat, behind which a model may think
    first; None: behind plain text. think: False where it should not."""
    return Grammar(behind_thoughts("@value", tokenizer, prompt_ids, think), {"value": schema})


def behind_thoughts(
    answer: str, tokenizer: Tokenizer, prompt_ids: Sequence[int] | None, think: Think
) -> str:
    """Rules for `answer`, an expression, and before it what the model thinks."""
    if prompt_ids is not None and tokenizer.harmony_marks:
        return _in_channels(answer, tokenizer, prompt_ids)
    # Where a tokenizer drops a blank at the beginning, models have learnt to write one.
    blank = "/ ?/ " if tokenizer.drops_first_blank else ""
    marks = None if prompt_ids is None else tokenizer.thought_marks
    if marks is None:
        return f"start: {blank}{answer}"
    is_inside = tokenizer.is_thinking(prompt_ids)
    if not is_inside and think is False:
        return f"start: {blank}{answer}"
    thought = "thought" if is_inside else f"({terminal(tokenizer, marks[0])} thought)?"
    return (
        f"start: {thought} {blank}{answer}\n"
        f"thought: until_closed /\\n{{0,2}}/\n"
        f"{up_to('until_closed', tokenizer, marks[1])}"
    )


def _in_channels(answer: str, tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> str:
    """For the harmony format: analysis, as often as the model likes, then the final message."""
    ids = {mark: f"<[{token}]>" for token, mark in tokenizer.harmony_marks.items()}
    channel, message = ids[Mark.CHANNEL], ids[Mark.MESSAGE]
    if tokenizer.harmony_marks.get(prompt_ids[-1]) is Mark.MESSAGE:
        return f"start: {answer}"  # the prompt has begun it
    format = f"(/ ?/ {ids[Mark.CONSTRAIN]} /(?i:json)/)?" if Mark.CONSTRAIN in ids else ""
    return (
        f"start: analysis* final\n"
        f'analysis: {channel} "analysis" {message} {_ANYTHING} {ids[Mark.END]} '
        f'{ids[Mark.START]} "assistant"\n'
        f'final: {channel} "final" {format} {message} {answer}'
    )


def terminal(tokenizer: Tokenizer, mark: str) -> str:
    """A mark as a model writes it: control tokens where there are such, else text."""
    parts = [
        f"<[{part}]>" if isinstance(part, int) else literal(part)
        for part in tokenizer.mark_parts(mark)
    ]
    return " ".join(parts)


def up_to(rule: str, tokenizer: Tokenizer, mark: str) -> str:
    """A rule for anything up to the first `mark`, and the mark."""
    pattern = re.escape(mark).replace("/", "\\/")
    parts = tokenizer.mark_parts(mark)
    if len(parts) == 1 and isinstance(parts[0], str):
        return f"{rule}[lazy]: /(?s:.*){pattern}/"
    # Who reads the answer takes the spelled mark for the mark, so that may not come before it.
    return (
        f"{rule}: {rule.upper()} {terminal(tokenizer, mark)}\n"
        f"{rule.upper()}: {_ANYTHING} & ~/(?s:.*){pattern}(?s:.*)/"
    )


def literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)

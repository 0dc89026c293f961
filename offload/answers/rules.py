"""What the answers of one model are kept to: from settings of an answer to its Constraint, and the
memory that takes.

    unused --expect, or the first answer that is kept to something--> expected --> built

Without any nothing is counted, imported or computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from ..errors import InputError
from ..sessions.generation import GenerationConfig
from ..text.text import Tokenizer
from .constraint import Constrainer, Constraint, constrainer_bytes
from .grammar import ANYTHING, Grammar, RuleWriter, behind_thoughts, in_channels
from .tool_formats import ToolFormat, format_of, write_calls
from .tools import parameters_of

if TYPE_CHECKING:
    from ..llm import LLM


class AnswerRules:
    """Of one LLM."""

    def __init__(self, llm: LLM):
        self._llm = llm
        self._is_expected = False

    def expect(self) -> None:
        """Count the memory now. May be called again. Raises DoesNotFit where sessions that are
        open have taken it."""
        if not self._is_expected:
            num_bytes = constrainer_bytes(self._llm.config.vocab_size)
            self._llm.admission.set_aside(num_bytes, "an answer that keeps to a schema")
            self._is_expected = True

    def constraint(
        self, config: GenerationConfig, prompt_ids: Sequence[int] | None
    ) -> Constraint | None:
        """Of one answer; None where it is free. prompt_ids: of a chat; None behind plain text.
        Raises InputError for tools and tokens that the model does not know, and for a schema that
        cannot be followed; DoesNotFit."""
        format = self.check(config, prompt_ids is not None)
        if config.json_schema is None and not config.keeps_calls:
            return None
        grammar = answer_grammar(self._llm.tokenizer, config, prompt_ids, format)
        return self._constrainer.begin(grammar, config.eos_token_ids)

    def check(self, config: GenerationConfig, is_chat: bool) -> ToolFormat | None:
        """How the model writes the calls that it is told of. Raises InputError for tools and tokens
        that it does not know."""
        config.check_ids(self._llm.config.vocab_size)
        if not config.offered_tools:
            return None
        if not is_chat:
            raise InputError("tools are for answers to messages, and the prompt is plain text")
        return format_of(self._llm.tokenizer)

    @cached_property
    def _constrainer(self) -> Constrainer:
        self.expect()
        return Constrainer(self._llm.tokenizer, self._llm.config.vocab_size)


def answer_grammar(
    tokenizer: Tokenizer,
    config: GenerationConfig,
    prompt_ids: Sequence[int] | None,
    format: ToolFormat | None,
) -> Grammar:
    """What config asks for: a JSON value, calls, either, or text that may call. format: how the
    model writes calls; None for harmony, and without tools."""
    schemas = parameters_of(config.offered_tools)
    must = config.must_call
    if isinstance(must, str):
        schemas = {must: schemas[must]}
    rules = RuleWriter(tokenizer, () if format is None else format.marks)
    value = None
    if config.json_schema is not None and not must:
        value = rules.schema(config.json_schema)
    if prompt_ids is not None and tokenizer.harmony_marks:
        final = None if must else value or ANYTHING
        return in_channels(rules, final, schemas, prompt_ids)
    if format is not None:
        is_free = not must and value is None
        several = config.parallel_tool_calls and not isinstance(must, str)
        calls = write_calls(format, rules, schemas, several, not is_free)
        value = calls if value is None else f"({value} | {calls})"
    assert value is not None
    return behind_thoughts(rules, value, prompt_ids, config.think)

"""What the answers of one model are kept to: from settings of an answer to its Constraint, and the
memory that takes.

    unused --expect, or the first schema--> expected (memory is counted) --the first schema--> built

Without a schema nothing is counted, imported or computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from .constraint import Constrainer, Constraint, constrainer_bytes
from .generation import GenerationConfig
from .grammar import schema_grammar

if TYPE_CHECKING:
    from .llm import LLM


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
        Raises InputError for a schema that cannot be followed, and DoesNotFit."""
        if config.json_schema is None:
            return None
        tokenizer = self._llm.tokenizer
        grammar = schema_grammar(config.json_schema, tokenizer, prompt_ids, config.think)
        return self._constrainer.begin(grammar, config.eos_token_ids)

    @cached_property
    def _constrainer(self) -> Constrainer:
        self.expect()
        return Constrainer(self._llm.tokenizer, self._llm.config.vocab_size)

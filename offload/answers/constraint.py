"""Keeps an answer to a grammar: says before each token which ones may come.

    Grammar --Constrainer.begin--> Constraint --allowed, accept, allowed, ...--> is_over

A Constrainer knows the bytes of every token of one tokenizer; a Constraint is one answer's place in
one grammar. The work is done by the library llguidance (an extra, imported when it is first asked
for), within limits that also hold for schemas made to take time or memory. Control tokens are no
text: they come where a grammar names them by id, and nowhere else.

Knows no sampling and no logits.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from copy import copy
from itertools import takewhile

import numpy as np
import torch

from ..errors import InputError
from ..text.text import Tokenizer
from .grammar import Grammar

EXTRA = "pip install 'ebbtide[structured]'"
# How JSON is written: on one line, as json.dumps does. White space that is left to the model is
# where small ones get lost. And nothing of a schema is passed over in silence.
_JSON_STYLE = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "coerce_one_of": False,
    "lenient": False,
}
# Symbols of a grammar, and states of its lexer of up to 2 KiB: a schema of the largest size takes
# no more than _GRAMMAR_BYTES with them. The rest are steps, some tens of milliseconds at most.
_LIMITS = {
    "max_grammar_size": 50_000,
    "max_lexer_states": 8_000,
    "max_items_in_row": 1_000,
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "precompute_large_lexemes": False,
    "verbose_errors": False,
}
_GRAMMAR_BYTES = 32 << 20
_TOKEN_BYTES = 256  # of each token: its bytes, its place in the library's tree, and masks
_LIBRARY_BYTES = 4 << 20


def constrainer_bytes(num_ids: int) -> int:
    """Host memory that a Constrainer and the Constraint in use take at most."""
    return _LIBRARY_BYTES + _GRAMMAR_BYTES + _TOKEN_BYTES * num_ids


class Constrainer:
    """vocab_size: of the model's logits, which may have more entries than the tokenizer has ids.

    Raises InputError where the library is missing, and UnsupportedModel for a tokenizer whose
    tokens are joined by more than their bytes.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        try:
            import llguidance
        except ImportError:
            raise InputError(
                f"keeping an answer to a JSON schema needs the package llguidance: {EXTRA}"
            ) from None
        self._matcher = llguidance.LLMatcher
        self._limits = llguidance.LLParserLimits(**_LIMITS)
        self._vocab_size = vocab_size
        # Without slices, which would double its memory to save a millisecond for each token.
        self._tokens = llguidance.LLTokenizer(
            _Vocabulary(tokenizer, vocab_size),  # pyright: ignore[reportArgumentType] - as a wrapper
            slices=[],
        )

    def begin(self, grammar: Grammar, end_ids: tuple[int, ...]) -> Constraint:
        """An answer's beginning. end_ids: the tokens that end it, allowed where it is complete.
        InputError for a schema that cannot be followed."""
        parts: list[dict] = [{"lark_grammar": grammar.lark}]
        for name, text in grammar.schemas.items():
            schema = json.loads(text)
            if isinstance(schema, dict):
                schema = {**schema, "x-guidance": _JSON_STYLE}
            parts.append({"name": name, "json_schema": schema})
        matcher = self._matcher(
            self._tokens, json.dumps({"grammars": parts}), log_level=0, limits=self._limits
        )
        constraint = Constraint(matcher, self._vocab_size, end_ids)
        try:
            constraint.allowed()  # some that nothing satisfies are found out here
        except InputError as error:
            raise InputError(f"{self._owner(grammar, parts[1:])}{error}") from None
        return constraint

    def _owner(self, grammar: Grammar, parts: list[dict]) -> str:
        """Of the first schema that cannot be followed by itself, for an error; "" for none."""
        for part in parts:
            alone = json.dumps({"grammars": [part]})
            if self._matcher.validate_grammar(alone, self._tokens, limits=self._limits):
                function = grammar.functions.get(part["name"])
                return f"the arguments of {function}: " if function else ""
        return ""


class Constraint:
    """Made by `Constrainer.begin`. A token that was allowed must be accepted before the next."""

    def __init__(self, matcher, vocab_size: int, end_ids: tuple[int, ...]):
        self._matcher, self._vocab_size = matcher, vocab_size
        self._end_ids = [i for i in end_ids if i < vocab_size]

    def twin(self) -> Constraint:
        """Another one in the same place, that goes its own way."""
        other = copy(self)
        other._matcher = self._matcher.deep_copy()
        return other

    def allowed(self) -> torch.Tensor:
        """The ids that may come, (n,) int64, ascending; none where the answer is over. InputError
        where the schema asks for more work than a token is worth, or for a text that the model has
        no tokens for."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        may = np.unpackbits(bits, bitorder="little")[: self._vocab_size + 1]
        may[self._end_ids] = may[self._vocab_size]
        ids = may[: self._vocab_size].nonzero()[0]
        if len(ids) == 0 and not self._matcher.is_stopped():
            raise InputError(
                "the JSON schema cannot be followed: the model has no token for what comes next"
            )
        return torch.from_numpy(ids)

    def forced(self) -> list[int]:
        """The tokens that come next whatever is chosen, as far as there is no choice."""
        ids = self._matcher.compute_ff_tokens()
        return list(takewhile(lambda token: token < self._vocab_size, ids))

    def accept(self, token: int) -> None:
        """An allowed token was chosen."""
        if token not in self._end_ids:
            self._matcher.consume_token(token)
            self._check()

    @property
    def is_over(self) -> bool:
        """Whether nothing can follow, not even a token that ends the answer."""
        return not self._end_ids and self._matcher.is_stopped()

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = self._matcher.get_error().split("<non-verbose/>")[0].strip()
            if reason.startswith("NoExtension"):
                reason = "nothing satisfies it"
            raise InputError(f"the JSON schema cannot be followed: {reason}")


class _Vocabulary:
    """A tokenizer as the library takes it. One id more than the model has stands for the end of an
    answer, whichever tokens end it."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        self._tokenizer = tokenizer
        self.eos_token_id = vocab_size
        self.special_token_ids = [i for i in tokenizer.special_ids if i < vocab_size]
        self.special_token_ids.append(vocab_size)
        self.tokens = tokenizer.token_bytes(vocab_size)
        for token in self.special_token_ids[:-1]:
            self.tokens[token] = b"<control %d>" % token
        self.tokens.append(b"<end>")

    def __call__(self, text: str | bytes) -> list[int]:
        """The ids of text that a grammar leaves no choice about."""
        if isinstance(text, bytes):
            text = text.decode()
        ids = self._tokenizer.encoder.encode_inside(text)
        if ids is None:
            return self._spelled(text.encode())
        if max(ids, default=0) < self.eos_token_id:
            return ids
        # Tokens that the tokenizer has and the model has not.
        parts = [
            [i] if i < self.eos_token_id else self._spelled(self._tokenizer.bytes_of(i))
            for i in ids
        ]
        return [token for part in parts for token in part]

    def _spelled(self, text: bytes) -> list[int]:
        """The fewest of the model's tokens for a text; one that it has not where there are none.
        (What is left to the library by no ids at all ends in a parser error of its own.)"""
        special, found = set(self.special_token_ids), defaultdict(list)
        for token, spelled in enumerate(self.tokens):
            if spelled and spelled in text and token not in special:
                found[spelled[0]].append((token, spelled))
        # What is left from each place on: in how many tokens it can be spelled, and the first one.
        count, first = [*([math.inf] * len(text)), 0], [0] * len(text)
        for at in reversed(range(len(text))):
            for token, spelled in found[text[at]]:
                if text.startswith(spelled, at) and count[at + len(spelled)] + 1 < count[at]:
                    count[at], first[at] = count[at + len(spelled)] + 1, token
        if math.isinf(count[0]):
            return [self.eos_token_id + 1]
        ids: list[int] = []
        at = 0
        while at < len(text):
            ids.append(first[at])
            at += len(self.tokens[first[at]])
        return ids

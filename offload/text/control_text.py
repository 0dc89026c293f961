"""Keeps what users write apart from a model's control tokens, such as <|im_start|>.

Control tokens come from the chat template alone. Before rendering, a *guard* (a character that
nothing in the messages holds) is put inside every control string that a user wrote. After
rendering, what still reads as a control string is the template's, and is replaced by its *alias*:
an added token whose spelling holds a random number, so that no text can forge it. The guards are
taken out again, and everything but the aliases is encoded as text.

Out of reach: a template that builds control strings from the names and roles that it is given.

Works on strings; it knows neither tokenizers nor templates.
"""

from __future__ import annotations

import re
import secrets
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..errors import InputError

# Noncharacters: Unicode reserves them for uses like this, and forbids them in open interchange.
GUARDS = tuple(map(chr, (*range(0xFDD0, 0xFDF0), 0xFFFE, 0xFFFF)))
SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class ControlToken:
    """`is_special`: of the tokenizer's own making. The others (<think>, <tool_call>) are text that
    assistants write, and control only what users must not."""

    token_id: int
    text: str
    is_special: bool
    eats_left: bool = False  # white space before it belongs to it
    eats_right: bool = False


def check_text(text: str, what: str) -> None:
    """InputError where `text` is no Unicode: half of a surrogate pair cannot be encoded."""
    if not text.isascii() and (found := SURROGATE.search(text)):
        raise InputError(
            f"{what} is not valid Unicode: character {found.start()} is U+{ord(found[0]):04X}, "
            "half of a surrogate pair. Decode it as UTF-8 or UTF-16 first"
        )


class ControlText:
    """The control strings of one tokenizer, and their aliases."""

    def __init__(self, tokens: Iterable[ControlToken]):
        self.tokens = tuple(tokens)
        nonce = secrets.token_hex(8)
        self.aliases = {
            t.text: f"{GUARDS[-2]}{nonce}:{t.token_id}{GUARDS[-2]}" for t in self.tokens
        }
        # Stands between two pieces that must not be encoded as one, and adds nothing.
        self.cut = f"{GUARDS[-2]}{nonce}:cut{GUARDS[-2]}"
        self._sorted = sorted(self.aliases)
        self._longest = max(map(len, self.aliases), default=0)
        self._eaters = [t for t in self.tokens if t.eats_left or t.eats_right]
        self._found_patterns: dict[str, re.Pattern] = {}
        self._starts = {
            soft: _starts_pattern(t.text for t in self.tokens if soft or t.is_special)
            for soft in (True, False)
        }

    def break_up(self, text: str, guard: str, soft: bool = True) -> str:
        """`text` with `guard` after the first character of every control string, and of what may
        be the start of one at its end. `soft`: the ones assistants may write too."""
        text = self._starts[soft].sub(lambda found: found[0] + guard, text)
        body = text.rstrip()  # templates trim
        for num_chars in range(1, min(self._longest - 1, len(body)) + 1):
            end = body[-num_chars:]
            at = bisect_left(self._sorted, end)
            if at < len(self._sorted) and self._sorted[at].startswith(end):
                after = len(body) - num_chars + 1
                text = text[:after] + guard + text[after:]
        return text

    def break_up_all(self, value: Any, guard: str, soft: bool = True) -> Any:
        """A copy of messages, or of anything in them, with every text broken up. An assistant may
        have written the soft ones; roles are checked elsewhere."""
        if isinstance(value, str):
            return self.break_up(value, guard, soft)
        if isinstance(value, list):
            return [self.break_up_all(item, guard, soft) for item in value]
        if isinstance(value, dict):
            soft = soft and value.get("role") != "assistant"
            for key in value:
                # It cannot be broken up: templates ask for keys by their names.
                if not key.isidentifier() and self._starts[True].search(key):
                    raise InputError(f"a name may hold no control text of the model: {key!r}")
            return {
                key: item if key == "role" else self.break_up_all(item, guard, soft)
                for key, item in value.items()
            }
        return value

    def guard_for(self, value: Any) -> str:
        """A guard that no text in `value` holds, nor its JSON escape."""
        texts = list(_texts(value))
        for text in texts:
            check_text(text, "a message")
        texts = [text for text in texts if not text.isascii() or "\\u" in text]
        for guard in GUARDS[:-2]:
            escaped = f"\\u{ord(guard):04x}"
            if not any(guard in text or escaped in text for text in texts):
                return guard
        raise InputError("the messages hold all 32 noncharacters from U+FDD0 on; leave one out")

    def with_aliases(self, rendered: str, guard: str, at_guards: str = "") -> str:
        """A rendered text whose control strings are the template's: aliases in their places, and
        `at_guards` where guards were."""
        text = self._found(guard).sub(lambda found: self.aliases[found[0]], rendered)
        escaped = f"\\u{ord(guard):04x}"  # from a template that writes JSON in ASCII
        text = text.replace(guard, at_guards).replace(escaped, at_guards)
        for token in self._eaters:
            alias = self.aliases[token.text]
            parts = text.split(alias)
            if token.eats_left:
                parts = [*(part.rstrip() for part in parts[:-1]), parts[-1]]
            if token.eats_right:
                parts = [parts[0], *(part.lstrip() for part in parts[1:])]
            text = alias.join(parts)
        return text

    def parts(self, text: str) -> list[ControlToken | str]:
        """A text of a template's, cut at the control strings in it."""
        by_text = {token.text: token for token in self.tokens}
        parts: list[ControlToken | str] = []
        end = 0
        for found in self._found(GUARDS[0]).finditer(text):
            parts += [text[end : found.start()], by_text[found[0]]]
            end = found.end()
        return [part for part in (*parts, text[end:]) if part]

    def as_written(self, text: str) -> str:
        """A text of an assistant's: aliases for the marks in it that it may write."""
        return "".join(
            part
            if isinstance(part, str)
            else part.text
            if part.is_special
            else self.aliases[part.text]
            for part in self.parts(text)
        )

    def _found(self, guard: str) -> re.Pattern:
        """Matches the control strings that have no guard in them. Only one of a single character
        can have it right behind."""
        if guard not in self._found_patterns:
            pattern = f"(?:{_trie_pattern(self.aliases)})(?!{guard})"
            self._found_patterns[guard] = re.compile(pattern)
        return self._found_patterns[guard]


def _texts(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _trie_pattern(words: Iterable[str]) -> str:
    """A pattern that matches the longest of `words`. As a tree of common beginnings: an alternation
    of thousands of words would be tried one by one at every character."""
    words = sorted(set(words))
    if not words:
        return "(?!)"

    def branch(low: int, high: int, depth: int) -> str:
        start = depth
        first, last = words[low], words[high - 1]
        while depth < len(first) and depth < len(last) and first[depth] == last[depth]:
            depth += 1
        pattern = re.escape(first[start:depth])
        ends_here = len(first) == depth
        low += ends_here
        branches = []
        while low < high:
            next_low = low
            while next_low < high and words[next_low][depth] == words[low][depth]:
                next_low += 1
            branches.append(branch(low, next_low, depth))
            low = next_low
        if branches:
            pattern += f"(?:{'|'.join(branches)})" + ("?" if ends_here else "")
        return pattern

    return branch(0, len(words), 0)


def _starts_pattern(words: Iterable[str]) -> re.Pattern:
    """Matches the first character of each of `words`, wherever they overlap."""
    rests: dict[str, list[str]] = {}
    for word in words:
        rests.setdefault(word[0], []).append(word[1:])
    parts = []
    for first, ends in rests.items():
        ahead = "" if "" in ends else f"(?={_trie_pattern(ends)})"
        parts.append(re.escape(first) + ahead)
    return re.compile("|".join(parts) or "(?!)")

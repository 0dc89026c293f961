"""Sentences written into a text, evenly spread, each between two sentences of it."""

from __future__ import annotations

import re
from collections.abc import Sequence

_SENTENCE_END = re.compile(r"[.!?][\"'”’)]*\s+")


def plant(text: str, sentences: Sequence[str]) -> str:
    """`text` with each of `sentences` in it once, in their order, at the sentence's end nearest
    behind its place: a text of n parts has one in the middle of each.
    """
    ends = [match.end() for match in _SENTENCE_END.finditer(text)] or [len(text)]
    parts, begin = [], 0
    for number, sentence in enumerate(sentences):
        wanted = len(text) * (2 * number + 1) // (2 * len(sentences))
        place = max(begin, next((end for end in ends if end >= wanted), ends[-1]))
        before = text[begin:place]
        gap = "" if not before or before[-1].isspace() else " "
        parts += [before, gap, sentence, " "]
        begin = place
    return "".join([*parts, text[begin:]])

"""Guesses of the next tokens: what followed the last few where they stood in the text before.

Answers quote, repeat names and copy numbers, and then a guess costs nothing but a look. (Prompt
lookup decoding; A. Saxena, 2023.) Knows ids only.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

SHORTEST, LONGEST = 3, 6  # tokens that must be the same; fewer are the same by chance


def look_up(tokens: Sequence[int], count: int) -> list[int]:
    """Up to `count` tokens that may follow: those behind the latest place where the last few stand
    once more, the longer the better. None where there is no such place.
    """
    ids = np.array(tokens)  # a view would keep the tokens from growing for as long as it lives
    if count < 1 or len(ids) <= SHORTEST:
        return []
    # Where the last token stands before, then the last two, and so on.
    ends, found = np.flatnonzero(ids[:-1] == ids[-1]), None
    for length in range(2, min(LONGEST, len(ids) - 1) + 1):
        ends = ends[ends >= length - 1]
        ends = ends[ids[ends - length + 1] == ids[-length]]
        if not len(ends):
            break
        found = ends[-1] if length >= SHORTEST else None
    return [] if found is None else ids[found + 1 : found + 1 + count].tolist()

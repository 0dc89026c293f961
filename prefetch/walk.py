"""Follows the fetches: which pass is under way, and what it used when it ends.

A pass is a walk over spans of one group (one layer of one table). It ends when another group is
fetched from, or when a span comes again. Knows numbers only, and waits for nothing.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple


class Pass(NamedTuple):
    """A pass that has ended.

    spans: what it used, in order; batch: the latest batch of wishes that was known at its last
    fetch, so wishes of the group up to it were for this pass; is_left: another group has its turn.
    """

    group: Any
    spans: list[int]
    batch: int
    is_left: bool


class Walk:
    """The pass that is under way."""

    def __init__(self):
        self._group: Hashable | None = None
        self._spans: dict[int, None] = {}  # a set that keeps the order of use
        self._batch = 0

    def follow(self, group: Hashable, span: int, batch: int) -> Pass | None:
        """Notes a fetch; returns the pass that it ended, if it did. batch: of the latest wishes."""
        ended = None
        if group != self._group or span in self._spans:
            if self._group is not None:
                ended = Pass(self._group, list(self._spans), self._batch, group != self._group)
            self._group, self._spans = group, {}
        self._spans[span] = None
        self._batch = batch
        return ended

    def forget(self) -> None:
        """The table of the pass is gone: whatever comes next starts anew."""
        self._group, self._spans = None, {}

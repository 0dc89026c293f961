"""What room there is for the pages of a session and its forks, whose store was planned for one
context: all may grow, as long as what they hold, counted once where they share it, fits.

A sequence that is alone always has the room that was planned. Where there are several, whoever
comes first has it: what there is no room for is refused before it is begun, and an answer is
promised room as it goes on. Tokens that wait to be processed hold nothing. Counts extents;
allocates none.
"""

from __future__ import annotations

from collections import Counter

from ..errors import DoesNotFit
from ..pages.geometry import Geometry
from ..pages.pager import PageStore
from ..pages.windows import Windows
from ..running.sequence import Sequence
from .plan import Plan


class PageRoom:
    """Of the open sequences of one store."""

    def __init__(self, plan: Plan, store: PageStore, geometry: Geometry, windows: Windows):
        self._plan, self._store, self._geometry = plan, store, geometry
        layers = range(store.num_layers)
        # Layers with a window have theirs by the plan, whoever looks back.
        self._record_tokens = {
            layer: geometry.layout_of(layer).record_tokens
            for layer in layers
            if not windows.bounds(layer)
        }
        # How many tokens an answer may reach; 0: there is none.
        self._promised: dict[Sequence, int] = {}

    def __len__(self) -> int:
        """Sequences that are open."""
        return len(self._promised)

    def add(self, sequence: Sequence) -> None:
        self._promised[sequence] = 0

    def remove(self, sequence: Sequence) -> None:
        self._promised.pop(sequence, None)

    def check(self, sequence: Sequence, length: int, common: int | None = None) -> None:
        """Raises DoesNotFit where a sequence, of which the first `common` tokens stay (default:
        all), cannot come to have `length`."""
        left = sequence.length if common is None else sequence.left_after(common)
        lacking = self._num_lacking(sequence, length, left)
        if lacking <= 0:
            return
        span_bytes, plan = self._geometry.span_bytes, self._plan
        needed = self._wanted(sequence, length, left).total()
        most = self._most(sequence, left)
        larger = plan.context < plan.model_context
        raise DoesNotFit(
            f"{length:,} tokens are asked for, and this session may reach {most:,}: a session and "
            f"its forks have room for {plan.context:,} tokens in all, what they share counted "
            "once. Close or truncate one of them"
            + (", or open the session with a larger context." if larger else "."),
            tier=[tier.value for tier, of in self._store.usage().items() if of.capacity_bytes][-1],
            needed_bytes=needed * span_bytes,
            available_bytes=max(0, needed - lacking) * span_bytes,
            largest_context=most or None,
        )

    def promise(self, sequence: Sequence, length: int) -> bool:
        """Whether the sequence may come to have `length` tokens. If so it is promised them, until
        `end_promise`."""
        if len(self._promised) > 1 and length > self._promised[sequence]:
            if self._num_lacking(sequence, length, sequence.length) > 0:
                return False
            cell = self._geometry.cell_tokens
            self._promised[sequence] = -(-length // cell) * cell  # which takes no more pages
        return True

    def end_promise(self, sequence: Sequence) -> None:
        """Its answer is over."""
        if sequence in self._promised:
            self._promised[sequence] = 0

    # ---- inside ------------------------------------------------------------------------------

    def _num_lacking(self, sequence: Sequence, length: int, left: int) -> int:
        """How many spans are not there for that, after what others were promised."""
        if len(self._promised) == 1:
            return 0
        wanted = self._wanted(sequence, length, left)
        if max(wanted.values(), default=0) <= 0:
            return 0
        for other, promised in self._promised.items():
            if other is not sequence and promised:
                wanted.update(self._wanted(other, promised, other.length))  # adds them
        return self._store.num_lacking(wanted)

    def _wanted(self, sequence: Sequence, length: int, left: int) -> Counter[int]:
        """How many spans of each layer a sequence takes more when it has `length` tokens."""
        wanted: Counter[int] = Counter()
        table, sealed_tokens = sequence.table, self._geometry.sealed_tokens
        for layer, record_tokens in self._record_tokens.items():
            kept = table.num_records(layer)
            if left < sequence.length:
                kept = min(kept, sealed_tokens(left + 1) // record_tokens)
            more = max(0, sealed_tokens(length) // record_tokens - kept)
            wanted[layer] = table.extents_needed(layer, more, kept)
        return wanted

    def _most(self, sequence: Sequence, left: int) -> int:
        """The most tokens that it may come to have."""
        cell = self._geometry.cell_tokens
        low, high = 0, -(-self._plan.context // cell)  # there is room, and none; in cells
        while high - low > 1:
            middle = (low + high) // 2
            has_room = self._num_lacking(sequence, middle * cell, left) <= 0
            low, high = (middle, high) if has_room else (low, middle)
        return low * cell

"""How many spans of pages a request comes to have, by layer: what the planner counts, in numbers
alone.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from functools import cache, cached_property

from ..models.model_config import ModelConfig
from ..pages.geometry import Geometry
from ..pages.windows import Windows


class PageSpans:
    """Of a request of `context` tokens in as many sequences, whose prefill takes some cells at once
    (`sweep`)."""

    def __init__(self, config: ModelConfig, geometry: Geometry, context: int, sequences: int):
        self._geometry, self._context, self._sequences = geometry, context, sequences
        layers = range(config.num_page_layers)
        self._windows, self._layouts = Windows(config, geometry), geometry.layouts(layers)
        self._at_once = list(map(geometry.spans_at_once, layers))
        self.keeping = [n for n in layers if not self._windows.bounds(n)]  # all their pages
        # A token sees of each layer with a window at most so many spans.
        shown = [self._windows.most_shown(n) for n in layers]
        kinds = list(zip(self._at_once, shown, strict=True))
        self._kinds = Counter(kinds)  # of layers
        self._readers = Counter(kinds[layer] for layer in config.kv_pages)
        # Plans are tried many times.
        self.total, self.near_bytes = cache(self._total), cache(self._near_bytes)
        self.of_windows, self._of_layers = cache(self._of_windows), cache(self._count)

    def _count(self, sweep: int) -> list[int]:
        """Of each layer at the end, with what forks copy."""
        longest = self._geometry.num_spans(self._context)
        most = self._windows.most_spans(self._context, sweep, self._sequences)
        return [
            longest * self._at_once[layer] + self._spare_of(layer) if spans is None else spans
            for layer, spans in enumerate(most)
        ]

    def _total(self, sweep: int) -> int:
        """Of all layers at the end, but for `spare`."""
        return sum(self._of_layers(sweep)) - self.spare

    def _of_windows(self, sweep: int) -> int:
        """See Windows.spans_of_one."""
        return self._windows.spans_of_one(self._context, sweep)

    def _near_bytes(self, sweep: int) -> int:
        """Of all layers' near planes, which `spare` spans have too."""
        spans = zip(self._of_layers(sweep), self._layouts, strict=True)
        records = self._geometry.records_per_span
        return sum(count * records * layout.near_record_bytes for count, layout in spans)

    @cached_property
    def spare(self) -> int:
        """What forks copy of the layers that keep all pages."""
        return sum(map(self._spare_of, self.keeping))

    def _spare_of(self, layer: int) -> int:
        is_any = self._geometry.num_spans(self._context) > 0
        return self._geometry.spare_spans(layer, self._sequences) * is_any

    def read(self, sweep: int, held: dict[str, int]) -> tuple[dict[str, float], dict[str, float]]:
        """How many spans the last token reads from each tier where none are selected, those that
        layers share for each of them; and, of them, those that grow with the text. held: the spans
        that tiers hold, fastest first. As the store places them for a sequence that is alone: what
        its windows show in the fastest, then what layers keep."""
        shown, growing = self._of_kinds(windows=True), self._of_kinds(windows=False)
        left = dict(held)
        of_windows = _dealt(left, self.of_windows(sweep), self._seen(shown, self._context))
        kept = self._geometry.num_spans(self._context) * sum(self._at_once[n] for n in self.keeping)
        of_others = _dealt(left, kept, self._seen(growing, self._context))
        return {tier: of_windows[tier] + of_others[tier] for tier in held}, of_others

    def _of_kinds(self, *, windows: bool) -> Counter:
        """The layers that read, with a window or without."""
        kinds = {kind: n for kind, n in self._readers.items() if (kind[1] is not None) == windows}
        return Counter(kinds)

    def walked(self, sweep: int) -> int:
        """By all sweeps of prefill."""
        ends = range(0, self._context, sweep * self._geometry.cell_tokens)
        walked = 0
        for (at_once, shown), num_layers in self._kinds.items():
            growing = len(ends)  # sweeps before the one that sees as many as any
            if shown is not None:
                growing = bisect_left(ends, shown, key=lambda end: self._longest(end) * at_once)
                walked += num_layers * shown * (len(ends) - growing)
            walked += num_layers * at_once * self._longest_of_all(growing, sweep)
        return walked

    def _longest(self, length: int) -> int:
        return self._geometry.num_spans(length)

    def _longest_of_all(self, num_sweeps: int, sweep: int) -> int:
        """The sum of `_longest` at the beginnings of the first sweeps, however many these are."""
        cell, span = self._geometry.cell_tokens, self._geometry.most_span_tokens
        first = -(-2 // sweep)  # those before it see nothing: two cells are raw
        sealed = (first * sweep - 2) * cell
        return _floor_sum(num_sweeps - first, span, sweep * cell, sealed + span - 1)

    def _seen(self, kinds: Counter, length: int) -> int:
        """How many spans of some layers a token behind `length` others sees."""
        longest = self._longest(length)
        return sum(
            count * min(longest * at_once, longest * at_once if shown is None else shown)
            for (at_once, shown), count in kinds.items()
        )


def _floor_sum(count: int, divisor: int, step: int, start: int) -> int:
    """The sum of (start + i * step) // divisor for i below count, none of them negative; as Euclid
    would, in the time of a logarithm."""
    total = 0
    while count > 0:
        total += count * (start // divisor) + count * (count - 1) // 2 * (step // divisor)
        start, step = start % divisor, step % divisor
        count, start = divmod(start + step * count, divisor)
        divisor, step = step, divisor
    return total


def _dealt(left: dict[str, int], num_spans: int, num_reads: int) -> dict[str, float]:
    """How many of these reads are from each tier, where spans fill what is left of tiers, fastest
    first, and each is read as often. Takes them from what is left."""
    reads, rest = {}, num_spans
    for tier, room in left.items():
        here = min(room, rest)
        left[tier], rest = room - here, rest - here
        reads[tier] = num_reads * here / max(1, num_spans)
    return reads

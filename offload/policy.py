"""Where a new extent gets its home. One replaceable object; decides, and never moves anything.

An exact pass walks all pages for every token, the pattern that least-recently-used caches serve
worst: they would evict each page just before its turn. So homes are chosen once, when a span's
first record arrives, and a pass changes nothing. Knows numbers of extents, no bytes and no files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from .errors import InputError
from .page_table import Tier


class Policy(Protocol):
    """Chooses homes. `choose` is asked once for each new extent."""

    def choose(
        self,
        layer: int,
        span: int,
        free: Mapping[Tier, int],
        num_layers: int,
        expected_spans: int | None,
    ) -> Tier:
        """The tier for (layer, span).

        free: extents left in each tier, at least one of them above 0;
        expected_spans: how many spans each layer is expected to reach, if anybody knows.
        """
        ...


class FastestFirst:
    """The fastest tier that has room: leaves the slow tier to the spans that come last."""

    def choose(self, layer, span, free, num_layers, expected_spans):
        return next(tier for tier in Tier if free.get(tier, 0))


class Interleave:
    """Spreads the faster tiers' room evenly over the spans of every layer.

    Reading a span from disk hides behind computing the resident spans next to it; were the resident
    ones all at the start, reads would run out of slots there and computing would wait at the end.

    The share is taken anew for each extent, from what is free and what is still expected. So the
    faster tier is full when the expected number of spans is reached, whatever was forked or freed
    meanwhile, and full earlier when there are more than expected.
    """

    def __init__(self):
        # What each (layer, tier) is owed: grows by the share, is paid in whole extents.
        self._owed: dict[tuple[int, Tier], float] = {}

    def choose(self, layer, span, free, num_layers, expected_spans):
        expected = max(span + 1, expected_spans or 0)
        # Layers are written in order, so those above this one already have their span.
        remaining = max(1, num_layers * (expected - span) - layer)
        choices = [tier for tier in Tier if free.get(tier, 0)]
        for tier in choices[:-1]:
            share = min(1.0, free[tier] / remaining)
            owed = self._owed.get((layer, tier), 0.0) + share
            # A sum of shares like 1/3 may end a rounding error below 1.
            if owed >= 1 - 1e-9:
                self._owed[layer, tier] = owed - 1
                return tier
            self._owed[layer, tier] = owed
            remaining = max(1, remaining - free[tier])
        return choices[-1]


class FirstLayers:
    """Gives the faster tiers' room to the first layers, whole layers as far as it goes.

    Where pages are selected, the first layers' choices can be foreseen least: nothing precedes
    layer 0, and its attention changes the residual most.
    """

    def choose(self, layer, span, free, num_layers, expected_spans):
        # What lower layers will still need; their part of this span they have already.
        owed = layer * max(0, (expected_spans or 0) - span - 1)
        choices = [tier for tier in Tier if free.get(tier, 0)]
        for tier in choices[:-1]:
            if free[tier] > owed:
                return tier
            owed -= free[tier]
        return choices[-1]


POLICIES: dict[str, type[Policy]] = {
    "interleave": Interleave,
    "fastest_first": FastestFirst,
    "first_layers": FirstLayers,
}


def make_policy(name: str) -> Policy:
    """A fresh policy by name; InputError with the known names for any other."""
    if name not in POLICIES:
        raise InputError(f"unknown policy {name!r}; known: {', '.join(sorted(POLICIES))}")
    return POLICIES[name]()

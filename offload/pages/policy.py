"""Where a new extent gets its home. One replaceable object; decides, and never moves anything.

An exact pass walks all pages for every token, the pattern that least-recently-used caches serve
worst: they would evict each page just before its turn. So homes are chosen once, when a span's
first record arrives, and a pass changes nothing. Knows numbers of extents, no bytes and no files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from ..errors import InputError
from .page_table import Extents, Tier


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


class Homes:
    """Of one store's extents: what layers have that let go of theirs comes first, and a policy
    deals out the rest. See PageStore for spans_at_once, most_spans and spans_first."""

    def __init__(
        self,
        policy: Policy,
        extents: Extents,
        spans_at_once: Sequence[int],
        most_spans: Sequence[int | None],
        spans_first: int,
    ):
        self._policy, self._extents, self._spans_first = policy, extents, spans_first
        self._spans_at_once = spans_at_once
        self._keeping = [layer for layer, most in enumerate(most_spans) if most is None]
        self._num_at_once = sum(spans_at_once[layer] for layer in self._keeping)

    def choose(self, layer: int, span: int, expected_spans: int | None) -> Tier:
        """expected_spans: how many the layers with the longest spans may reach."""
        free = {tier: self._extents.num_free(tier) for tier in Tier}
        if layer not in self._keeping:
            return next((tier for tier in Tier if free[tier]), Tier.HOST)
        # As if all layers that keep theirs had spans as long as this one's.
        own = self._spans_at_once[layer]
        expected = None if expected_spans is None else expected_spans * own
        number, num_layers = self._keeping.index(layer), -(-self._num_at_once // own)
        free = self._less_what_comes_first(free)
        return self._policy.choose(number, span, free, num_layers, expected)

    def _less_what_comes_first(self, free: dict[Tier, int]) -> dict[Tier, int]:
        """What is free for layers that keep their spans: not what the others may still want of the
        fastest, as long as something else is."""
        wanted, left = max(0, self._spans_first - self._extents.num_bounded), {}
        for tier, count in free.items():
            left[tier] = count - min(wanted, count)
            wanted -= min(wanted, count)
        return left if any(left.values()) else free


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

"""Which record a full cache gives up: one replaceable object, with a registry by name.

Knows record numbers only, those of records that are not in the cache too: what was given up too
early is worth more when it comes back. Sizes are equal, so value is all that counts.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from ..errors import InputError


class Eviction(Protocol):
    """Values of records. Every method takes record numbers (int64)."""

    def use(self, records: np.ndarray) -> None:
        """The records were attended to, in one layer of one step."""
        ...

    def touch(self, records: np.ndarray) -> None:
        """The records were put into the cache, or are expected to be attended to soon."""
        ...

    def forget(self, records: slice) -> None:
        """The numbers are other records' from now on."""
        ...

    def worth(self, records: np.ndarray) -> np.ndarray:
        """Of each of the records, float64: the least is given up first."""
        ...


class LeastRecent:
    """Gives up what was used, or expected to be used, longest ago."""

    def __init__(self, num_records: int):
        self._last = np.zeros(num_records, dtype=np.int64)
        self._now = 0

    def use(self, records: np.ndarray) -> None:
        self._now += 1
        self._last[records] = self._now

    touch = use

    def forget(self, records: slice) -> None:
        self._last[records] = 0

    def worth(self, records: np.ndarray) -> np.ndarray:
        return self._last[records].astype(np.float64)


class LeastFrequent:
    """Gives up what was used least; a use counts half after `half_life` further uses of anything.

    Resists passes that touch everything once, where the most recent uses say nothing. Uses count on
    while a record is not in the cache: if they did not, what came last would be the first to go
    again, however often it comes back. Of records used about as much the latest used goes first:
    layers take turns, so its next use is furthest away.
    """

    half_life = 256
    _STEPS = 2  # into which a factor of two is divided: what lies within one is about as much

    def __init__(self, num_records: int):
        # Kept as logarithms in base 2 of sums that grow instead of decaying: no record needs a
        # visit when time passes.
        self._score = np.full(num_records, -np.inf)
        self._used = np.zeros(num_records)  # when last
        self._now = 0.0

    def use(self, records: np.ndarray) -> None:
        self._now += 1 / self.half_life
        self._score[records] = np.logaddexp2(self._score[records], self._now)
        self._used[records] = self._now

    def touch(self, records: np.ndarray) -> None:
        self._score[records] = np.maximum(self._score[records], self._now - 1.0)

    def forget(self, records: slice) -> None:
        self._score[records] = -np.inf
        self._used[records] = 0.0

    def worth(self, records: np.ndarray) -> np.ndarray:
        amount = np.round((self._score[records] - self._now) * self._STEPS)
        return amount - self._used[records] / (1.0 + self._now)  # a whole number less a part of one


EVICTIONS: dict[str, type[LeastRecent] | type[LeastFrequent]] = {
    "least_recent": LeastRecent,
    "least_frequent": LeastFrequent,
}


def make_eviction(name: str, num_records: int) -> Eviction:
    """A fresh one by name, for records 0 up to num_records; InputError with the known names for any
    other.
    """
    if name not in EVICTIONS:
        raise InputError(f"unknown eviction {name!r}; known: {', '.join(sorted(EVICTIONS))}")
    return EVICTIONS[name](num_records)

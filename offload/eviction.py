"""Which record a full cache gives up: one replaceable object, with a registry by name.

Knows frame numbers only. Sizes are equal, so value is all that counts.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from .errors import InputError


class Eviction(Protocol):
    """Values of frames. Every method takes frame numbers (int64)."""

    def admit(self, frames: np.ndarray) -> None:
        """The frames have new records."""
        ...

    def use(self, frames: np.ndarray) -> None:
        """The frames' records were attended to, in one layer of one step."""
        ...

    def touch(self, frames: np.ndarray) -> None:
        """The frames' records are expected to be attended to soon."""
        ...

    def order(self, frames: np.ndarray) -> np.ndarray:
        """Indices into `frames`, the least valuable first; ties go to the lowest frame."""
        ...


class LeastRecent:
    """Gives up what was used, or expected to be used, longest ago."""

    def __init__(self, num_frames: int):
        self._last = np.zeros(num_frames, dtype=np.int64)
        self._now = 0

    def admit(self, frames: np.ndarray) -> None:
        self._last[frames] = self._now

    def use(self, frames: np.ndarray) -> None:
        self._now += 1
        self._last[frames] = self._now

    touch = use

    def order(self, frames: np.ndarray) -> np.ndarray:
        return np.argsort(self._last[frames], kind="stable")


class LeastFrequent:
    """Gives up what was used least; a use counts half after `half_life` further uses of anything.

    Resists passes that touch everything once, where the most recent uses say nothing.
    """

    half_life = 256

    def __init__(self, num_frames: int):
        # Kept as logarithms in base 2 of sums that grow instead of decaying: no frame needs a
        # visit when time passes.
        self._score = np.full(num_frames, -np.inf)
        self._now = 0.0

    def admit(self, frames: np.ndarray) -> None:
        self._score[frames] = self._now - 1.0

    def use(self, frames: np.ndarray) -> None:
        self._now += 1 / self.half_life
        self._score[frames] = np.logaddexp2(self._score[frames], self._now)

    def touch(self, frames: np.ndarray) -> None:
        self._score[frames] = np.maximum(self._score[frames], self._now - 1.0)

    def order(self, frames: np.ndarray) -> np.ndarray:
        return np.argsort(self._score[frames], kind="stable")


EVICTIONS: dict[str, type[LeastRecent] | type[LeastFrequent]] = {
    "least_recent": LeastRecent,
    "least_frequent": LeastFrequent,
}


def make_eviction(name: str, num_frames: int) -> Eviction:
    """A fresh one by name; InputError with the known names for any other."""
    if name not in EVICTIONS:
        raise InputError(f"unknown eviction {name!r}; known: {', '.join(sorted(EVICTIONS))}")
    return EVICTIONS[name](num_frames)

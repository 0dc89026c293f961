"""Parts of a model's files that are read again and again: as many of them as the system's cache can
hold come through it, the first ones; the rest comes past it.

What does not fit in the cache goes before it is read once more, and pushes out what would have
stayed; so what is read past it is always the same part, and the cache keeps the other one. Knows
places, and no tensors.
"""

from __future__ import annotations

import bisect
import itertools
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from ..models.past_cache import BounceBuffers, PastCacheReader
from ..planning.memory_at_hand import memory_at_hand

# Of the memory at hand: other programs and files have a use for some, and the system begins to let
# go of pages before there is none left.
_CACHE_SHARE = 0.85
_ASKED_AGAIN_S = 1.0
# What is shorter goes through the cache: a row, a vector, a scale. There is little of it.
_FEWEST_BYTES = 64 << 10


def bounce_bytes(most_read: int) -> int:
    """Of buffers, where the longest part has so many bytes."""
    return BounceBuffers.num_bytes(most_read) if most_read >= _FEWEST_BYTES else 0


class Rereading:
    """places: (file, offset, bytes) of the parts. Several threads may read."""

    def __init__(self, places: Iterable[tuple[Path, int, int]]):
        places = sorted(set(places))
        self._starts = [(path, offset) for path, offset, _ in places]
        self._before = [0, *itertools.accumulate(size for *_, size in places)]
        self._bounce = BounceBuffers(max((size for *_, size in places), default=0))
        self._readers: dict[Path, PastCacheReader] = {}
        self._opening = threading.Lock()
        self._room, self._asked_at = 0, -_ASKED_AGAIN_S

    def reader(
        self, path: Path, descriptor: int, offset: int, num_bytes: int
    ) -> PastCacheReader | None:
        """What reads some bytes of a file past the cache; None: they come through it. descriptor:
        of the file, open as usual."""
        if num_bytes < _FEWEST_BYTES or self._is_held(path, offset, num_bytes):
            return None
        with self._opening:
            reader = self._readers.get(path)
            if reader is None:
                reader = PastCacheReader(descriptor, str(path), self._bounce)
                self._readers[path] = reader
        return reader if reader.has_way else None

    def close(self) -> None:
        """May be called again; not while others read."""
        self._bounce.close()
        while self._readers:
            self._readers.popitem()[1].close()

    def _is_held(self, path: Path, offset: int, num_bytes: int) -> bool:
        """Whether the cache can hold this part beside all that come before it."""
        at = bisect.bisect_right(self._starts, (path, offset)) - 1
        if at < 0 or self._starts[at][0] != path:
            return True  # it is none of these
        before = self._before[at] + offset - self._starts[at][1]
        return before + num_bytes <= self._cache_room()

    def _cache_room(self) -> int:
        """How much the cache can hold. What it holds by now counts as memory that is there, so that
        reading through it does not move this number."""
        now = time.monotonic()
        if now - self._asked_at >= _ASKED_AGAIN_S:
            self._asked_at = now
            self._room = int(_CACHE_SHARE * memory_at_hand().available)
        return self._room

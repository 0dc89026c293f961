"""The queue of wishes: in the order they were made, no duplicates, dropped when their time is past.

Knows neither pages nor threads: a wish is for an opaque key; whoever calls holds the lock.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(slots=True, eq=False)
class Wish:
    """One key that somebody expects to ask for.

    group: what is walked together (one layer of one table);
    batch: number of the batch that made the wish or last renewed it;
    order: place in the sequence of all wishes: the larger, the later it is expected to be needed.
    """

    key: Any
    group: Hashable
    batch: int
    order: int


class WishQueue:
    """First wished, first served.

    W1: a key is queued at most once. Wishing again renews its batch and keeps its place, here and
        where it was taken to: it is needed no later than before.
    W2: batch and order only grow, so "wished before" is a comparison of numbers.
    """

    def __init__(self):
        self._wishes: dict[Hashable, Wish] = {}  # W1; insertion order is the order of service
        self.batch = 0  # W2: number of the latest `open_batch`
        self._order = 0

    def __len__(self) -> int:
        return len(self._wishes)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._wishes

    def open_batch(self) -> int:
        """Starts the next batch and returns its number."""
        self.batch += 1
        return self.batch

    def make(self, key: Hashable, group: Hashable) -> Wish:
        """A wish of the current batch, not queued: for keys that are on their way already."""
        self._order += 1
        return Wish(key, group, self.batch, self._order)

    def add(self, keys: Iterable[Hashable], group: Hashable) -> None:
        """Queues keys in order, as part of the current batch."""
        for key in keys:
            queued = self._wishes.get(key)
            if queued is None:
                self._wishes[key] = self.make(key, group)
            else:
                self.renew(queued, group)

    def renew(self, wish: Wish, group: Hashable) -> None:
        """A wish, queued or not, is one of the current batch now and keeps its place."""
        wish.group, wish.batch = group, self.batch

    def put_back(self, wish: Wish) -> None:
        """Queues a wish again that was taken, before all others: it was taken before they were."""
        if wish.key not in self._wishes:
            self._wishes = {wish.key: wish} | self._wishes

    def take(self, accept: Callable[[Any], bool]) -> Wish | None:
        """Removes and returns the first wish whose key is acceptable now, if any."""
        for key, wish in self._wishes.items():
            if accept(key):
                del self._wishes[key]
                return wish
        return None

    def remove(self, key: Hashable) -> Wish | None:
        """Takes one key's wish out, if there is one."""
        return self._wishes.pop(key, None)

    def drop(self, group: Hashable, batch: int) -> int:
        """Forgets the group's wishes up to and including that batch; returns how many."""
        stale = [k for k, w in self._wishes.items() if w.group == group and w.batch <= batch]
        for key in stale:
            del self._wishes[key]
        return len(stale)

    def clear(self) -> None:
        self._wishes.clear()

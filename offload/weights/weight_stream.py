"""Weights that do not stay in memory: groups of tensors are read into two buffers in turn, the next
one while this one is multiplied. Knows no files; groups go by their keys.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from ..pages.tier import aligned_bytes
from .packing import Kept

# read(key, buffer (uint8)): a group's tensors, in the buffer
Read = Callable[[Any, torch.Tensor], dict[str, Kept]]


class WeightStream:
    """keys: of the groups, in the order that one token needs them. buffer_bytes: room for the
    largest. What is read ahead is the group that followed this one the last time: several sweeps of
    a prompt pass through the layers before the output head is needed."""

    def __init__(self, keys: Sequence[Hashable], read: Read, buffer_bytes: int):
        self._read = read
        self._following = dict(zip(keys, [*keys[1:], keys[0]], strict=True))
        self._buffers = [aligned_bytes(buffer_bytes) for _ in range(2)]
        self._thread = ThreadPoolExecutor(1, "ebbtide-weights")
        self._latest: Hashable = None  # the key of what was asked for last
        self._ahead: tuple[Hashable, Future] | None = None
        self._begin(keys[0])

    def next(self, key: Hashable) -> dict[str, Kept]:
        """A group's tensors, until another group is asked for."""
        if self._latest is not None:
            self._following[self._latest] = key
        ahead = self._ahead
        if ahead is None or ahead[0] != key:  # another order, or an interruption
            if ahead is not None:
                ahead[1].exception()
            ahead = self._begin(key)
        try:
            tensors = ahead[1].result()
        except Exception:
            self._ahead = None  # it is read once more when it is asked for
            raise
        self._latest = key
        self._begin(self._following[key])
        return tensors

    def close(self) -> None:
        """Stop reading and let go of the buffers. May be called again."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._ahead = None
        self._buffers.clear()

    def _begin(self, key: Hashable) -> tuple[Hashable, Future]:
        # The caller may still use the buffer that was read last, never the one before it.
        self._ahead = None
        self._buffers.reverse()
        self._ahead = ahead = key, self._thread.submit(self._read, key, self._buffers[0])
        return ahead
